"""Law: decoding lies within twice the error of same-dtype eager computation of the oracle's, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_cases import CASES, Case, Make
from torch import Tensor

from attnreg import AttentionSpec, Problem, attention, hardware, masks, scores, sparsity, use_backend
from attnreg.testing.oracle import attend, oracle
from attnreg.testing.sequences import put_together
from attnreg.validate import check
from attnreg_cpu import build, product
from attnreg_cpu.conjunction import read_conjunction
from attnreg_cpu.decode import Decode, decode_space, decode_supports
from attnreg_cpu.native import NativeBackend
from attnreg_cpu.paths import decodes

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CPU = hardware.detect("cpu")
CAUSAL = masks.Causal()


def spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(return_lse=True, **fields)


def lengths(*values: int) -> Any:
    return lambda g: torch.tensor(values)


TABLE = torch.tensor([[3, 0, 7, 1, 9, 2, 11, 5, 8], [6, 4, 10, -1, 0, 0, 0, 0, 0]])
ROWS = (6, 7, 15, 16, 17, 24, 32, 33, 64, 71)
DECODE = [
    *[Case(f"keys_{n}", spec(mask=CAUSAL), sq=1, skv=n) for n in (1, 63, 65, 127, 129, 1000)],
    *[Case(f"group_{h}", spec(mask=CAUSAL), heads=(h, 1), sq=1, skv=333, dim=80, dim_v=48) for h in (1, 2, 3, 5, 8, 9)],
    *[Case(f"rows_{h}", spec(), heads=(h, 1), sq=1, skv=200, dim=33, dim_v=20) for h in ROWS],
    Case("mha", spec(), heads=(4, 4), sq=1, skv=700, dim=128, dim_v=128),
    Case("few_rows", spec(mask=CAUSAL), heads=(6, 2), sq=5, skv=444),
    Case("window", spec(mask=masks.SlidingWindow(100)), sq=2, skv=600),
    Case("prefix", spec(mask=masks.PrefixLM(50), align="top_left"), sq=3, skv=600),
    Case("chunked", spec(mask=CAUSAL & masks.Chunked(64)), sq=3, skv=600),
    Case("padding", spec(mask=masks.Padding()), make=lambda g: {"kv_lengths": torch.tensor([0, 333])}, sq=2, skv=600),
    Case(
        "offset",
        spec(mask=CAUSAL, align="offset"),
        make=lambda g: {"query_offset": torch.tensor([-2, 450])},
        sq=2,
        skv=500,
    ),
    Case(
        "documents",
        spec(mask=masks.Document() & CAUSAL),
        make=lambda g: {"document_ids": (torch.arange(700) // 90 % 4).to(torch.int32).expand(2, 700)},
        sq=2,
        skv=700,
    ),
    Case(
        "dense",
        spec(mask=masks.Dense()),
        make=lambda g: {"attn_mask": torch.rand(2, 4, 2, 500, generator=g) < 0.3},
        sq=2,
        skv=500,
    ),
    Case("bias", spec(bias=True), make=lambda g: {"bias": torch.randn(1, 4, 1, 500, generator=g)}, sq=2, skv=500),
    Case("alibi", spec(alibi=True), make=lambda g: {"alibi_slopes": torch.rand(2, 4, generator=g)}, sq=2, skv=500),
    Case("sinks", spec(sinks=True), make=lambda g: {"sinks": torch.randn(4, generator=g)}, sq=1, skv=500),
    Case("no_keys_but_sinks", spec(sinks=True), make=lambda g: {"sinks": torch.randn(4, generator=g)}, sq=1, skv=0),
    Case("softcap", spec(softcap=3.0), sq=1, skv=500, scale_q=5.0),
    Case("large_logits", spec(), sq=1, skv=500, scale_q=100.0),
    Case("bshd", spec(layout="bshd"), heads=(10, 5), sq=1, skv=500),
    Case("thd", spec(mask=CAUSAL, layout="thd"), heads=(6, 3), lengths=((1, 500), (1, 1), (0, 9), (2, 77), (1, 300))),
    Case(
        "paged",
        spec(mask=CAUSAL, page_size=16),
        make=lambda g: {"block_table": TABLE.clone(), "seqused_k": torch.tensor([140, 41])},
        pages=12,
        sq=1,
        skv=144,
    ),
    Case(
        "paged_thd_padding",
        spec(mask=CAUSAL & masks.Padding(), page_size=5, layout="thd"),
        make=lambda g: {
            "block_table": torch.tensor([[3, 0, 2], [1, 5, 4]], dtype=torch.int32),
            "kv_lengths": torch.tensor([14, 9]),
        },
        lengths=((1, 14), (2, 9)),
        pages=6,
    ),
]  # fmt: skip


def many(name: str, make: Make = lambda g: {}, **fields: Any) -> Case:
    """23 heads at two positions: rows enough for vector lanes on each instruction set, and two lanes without one."""
    return Case(f"many_{name}", spec(**fields), heads=(46, 2), sq=2, skv=301, scale_q=3.0, make=make)


DECODE += [
    many("causal", mask=CAUSAL),
    many("softcap", softcap=3.0),
    many("bias", lambda g: {"bias": torch.randn(2, 46, 2, 301, generator=g)}, bias=True),
    many("alibi", lambda g: {"alibi_slopes": torch.rand(2, 46, generator=g)}, alibi=True),
    many("sinks", lambda g: {"sinks": torch.randn(46, generator=g)}, sinks=True),
    many("dense", lambda g: {"attn_mask": torch.rand(2, 46, 2, 301, generator=g) < 0.3}, mask=masks.Dense()),
    many("padding", lambda g: {"kv_lengths": torch.tensor([0, 133])}, mask=masks.Padding()),
]
# The forward kernels' table too: more rows than decoding is chosen for, but the law holds for any number.
TABLE_CASES = [
    c
    for c in CASES
    if read_conjunction(c.spec.mask) is not None
    and isinstance(c.spec.sparsity, sparsity.Dense)
    and not isinstance(c.spec.score, (scores.General, scores.Additive))
]
CUTS: list[dict[str, Any]] = [
    {"kv_splits": 1, "block_kv": 32, "prefetch": 0, "streams": 1},
    {"kv_splits": 2, "block_kv": 128, "kv_heads": 2},
    {"kv_splits": 8, "block_kv": 64, "widen_rows": 1, "prefetch": 1024, "streams": 1},
    {"kv_splits": 2, "block_kv": 32, "kv_heads": 2, "streams": 8},
    {"kv_splits": 32, "block_kv": 256, "widen_rows": 3},
]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}_threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def prepare(the_spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, named: Any, **config: Any) -> Any:
    """The decode path's callable; it takes any number of rows, whatever the backend would choose it for."""
    problem = Problem.of(the_spec, check(the_spec, q, k, v, named), q, k, v, named)
    space = decode_space(problem, CPU)
    return Decode(problem, space.check({name: x for name, x in config.items() if x in space.choices[name]}))


def error(got: Tensor, exact: Tensor) -> float:
    """Largest difference; infinities must agree, NaN is infinitely wrong."""
    got = got.double()
    wrong = torch.where(got == exact, 0.0, (got - exact).abs())
    return float(wrong.nan_to_num(nan=torch.inf).max()) if got.numel() else 0.0


def compare(case: Case, dtype: torch.dtype, **config: Any) -> None:
    q, k, v, named = case.draw(dtype)
    out, lse = prepare(case.spec, q, k, v, named, **config)(q, k, v, **named)
    exact_out, exact_lse = oracle(case.spec, q, k, v, **named)
    plain = [(p.out, p.lse) for p in attend(case.spec, q, k, v, named, dtype=dtype)]
    plain_out, plain_lse = put_together(case.spec.layout, q, plain, case.dim_v)
    assert (out.shape, out.dtype) == (exact_out.shape, dtype)
    assert (lse.shape, lse.dtype) == (exact_lse.shape, torch.float32)
    assert error(out, exact_out) <= 2 * error(plain_out, exact_out) + FLOOR[dtype]
    assert error(lse, exact_lse) <= 2 * error(plain_lse, exact_lse) + 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*DECODE, *TABLE_CASES], ids=str)
def test_decode_is_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_every_cut_gives_the_same(case: Case, cut: dict[str, Any], threads: int) -> None:
    compare(case, torch.bfloat16 if "widen_rows" in cut else torch.float32, **cut)


@pytest.mark.parametrize("splits", range(1, 9))
def test_splits_that_hold_no_key_change_nothing(splits: int, threads: int) -> None:
    for case in DECODE[:3]:
        q, k, v, named = case.draw(torch.float32)
        problem = Problem.of(case.spec, check(case.spec, q, k, v, named), q, k, v, named)
        config = {**decode_space(problem, CPU).default, "kv_splits": splits}
        out, lse = Decode(problem, config)(q, k, v)
        exact_out, exact_lse = oracle(case.spec, q, k, v)
        assert error(out, exact_out) <= FLOOR[torch.float32]
        assert error(lse, exact_lse) <= 4e-6


@pytest.mark.parametrize("page_size", [1, 7, 16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pages_equal_the_contiguous_cache(page_size: int, dtype: torch.dtype, threads: int) -> None:
    g = torch.Generator().manual_seed(1)
    batch, hq, hkv, dim, used = 3, 6, 2, 64, torch.tensor([1, 300, 129])
    count = -(-int(used.max()) // page_size)
    table = torch.randperm(batch * count + 2, generator=g)[: batch * count].view(batch, count)
    pages_k = torch.randn(batch * count + 2, hkv, page_size, dim, generator=g).to(dtype)
    pages_v = torch.randn(batch * count + 2, hkv, page_size, dim, generator=g).to(dtype)
    q = torch.randn(batch, hq, 1, dim, generator=g).to(dtype)
    k = pages_k[table].transpose(1, 2).reshape(batch, hkv, count * page_size, dim)
    v = pages_v[table].transpose(1, 2).reshape(batch, hkv, count * page_size, dim)
    for b, n in enumerate(used.tolist()):  # entries beyond the used pages are arbitrary
        table[b, -(-n // page_size) :] = -1 if b % 2 else 0
    paged, padded = spec(page_size=page_size), spec(mask=masks.Padding())
    named = {"block_table": table, "seqused_k": used}
    got = prepare(paged, q, pages_k, pages_v, named)(q, pages_k, pages_v, **named)
    want = prepare(padded, q, k, v, {"kv_lengths": used})(q, k, v, kv_lengths=used)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("stale", [1e30, -3e38, float("nan")])
def test_what_lies_beyond_the_length_leaves_no_trace(stale: float) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 4, n, 32, generator=g) for n in (1, 300, 300))
    used = torch.tensor([77, 0])
    run = prepare(spec(mask=masks.Padding()), q, k, v, {"kv_lengths": used})
    want = run(q, k, v, kv_lengths=used)
    for b, n in enumerate(used.tolist()):
        k[b, :, n:] = v[b, :, n:] = stale
    got = run(q, k, v, kv_lengths=used)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_masked_keys_leave_no_trace_whatever_they_hold() -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 4, n, 32, generator=g) for n in (2, 200, 200))
    allowed = torch.rand(1, 1, 1, 200, generator=g) < 0.5
    run = prepare(spec(mask=masks.Dense()), q, k, v, {"attn_mask": allowed})
    want = run(q, k, v, attn_mask=allowed)
    hidden = ~allowed[0, 0, 0]
    k[:, :, hidden] = 3e38
    v[:, :, hidden] = -3e38
    got = run(q, k, v, attn_mask=allowed)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    "mask", [CAUSAL, CAUSAL & masks.SlidingWindow(20), masks.PrefixLM(30) & masks.Chunked(64)], ids=str
)
def test_token_by_token_equals_the_full_causal_pass(mask: masks.Mask) -> None:
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, 100, 32, generator=g) for h in (4, 2, 2))
    whole, whole_lse = oracle(spec(mask=mask), q, k, v)
    run = prepare(spec(mask=mask), q[:, :, :1], k[:, :, :1], v[:, :, :1], {})
    for n in range(1, 101):
        out, lse = run(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n])
        if isinstance(mask, masks.And) and any(isinstance(part, masks.PrefixLM) for part in mask.of) and n < 30:
            continue  # a prefix lets early queries see keys that are not there yet
        assert error(out, whole[:, :, n - 1 : n]) <= 2e-6
        assert error(lse, whole_lse[:, :, n - 1 : n]) <= 4e-6


@pytest.mark.parametrize("change", ["expanded", "transposed", "strided", "sliced"])
def test_strides(change: str) -> None:
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, n, 32, generator=g) for h, n in ((4, 1), (2, 150), (2, 150)))
    want = prepare(spec(), q, k, v, {})(q, k, v)
    if change == "expanded":
        k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
        want = prepare(spec(), q, k.contiguous(), v.contiguous(), {})(q, k.contiguous(), v.contiguous())
    elif change == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif change == "strided":
        q, k, v = (torch.stack([x, x + 1], -1)[..., 0] for x in (q, k, v))
    else:
        q, k, v = (torch.cat([x, x + 1], 2)[:, :, : x.shape[2]] for x in (q, k, v))
    got = prepare(spec(), q, k, v, {})(q, k, v)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_one_callable_serves_a_growing_cache() -> None:
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, h, n, 64, generator=g) for h, n in ((8, 1), (2, 2048), (2, 2048)))
    run = prepare(spec(), q, k[:, :, :1025], v[:, :, :1025], {})
    for n in (1025, 1500, 2047, 2048):
        exact, _ = oracle(spec(), q, k[:, :, :n], v[:, :, :n])
        assert error(run(q, k[:, :, :n], v[:, :, :n])[0], exact) <= 2e-6


def test_repeats_bit_for_bit(threads: int) -> None:
    q, k, v = (torch.randn(1, h, n, 64) for h, n in ((8, 1), (2, 5000), (2, 5000)))
    run = prepare(spec(), q, k, v, {}, kv_splits=8)
    first = run(q, k, v)
    for _ in range(20):
        again = run(q, k, v)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize(("change", "word"), [
    ({"spec": spec(mask=CAUSAL | masks.Chunked(4))}, "conjunction"),
    ({"spec": spec(dropout_p=0.1)}, "dropout_p"),
    ({"grads": frozenset({"q"})}, "gradients"),
    ({"dtype": "float64", "kv_dtype": "float64"}, "float64"),
])  # fmt: skip
def test_refusals_name_their_cause(change: dict[str, Any], word: str) -> None:
    plain: dict[str, Any] = {"spec": spec(), "batch": 1, "q_heads": 1, "kv_heads": 1, "sq": 1, "skv": 64}
    problem = Problem(**{**plain, "head_dim": 8, "head_dim_k": 8, "head_dim_v": 8})
    assert decode_supports(problem) == []
    assert any(word in reason for reason in decode_supports(replace(problem, **change)))


@pytest.mark.parametrize(("arch", "dtype", "heads", "sq", "skv", "path"), [
    ("avx2", "float32", (8, 2), 1, 4096, "decode"),
    ("avx2", "float32", (8, 2), 1, 5, "decode"),
    ("avx2", "float32", (8, 8), 32, 32, "tiles"),
    ("avx2", "float32", (8, 8), 32, 4096, "decode"),
    ("avx2", "bfloat16", (8, 8), 16, 4096, "decode"),
    ("avx2", "float32", (8, 8), 65, 4096, "tiles"),
    ("amx", "bfloat16", (64, 8), 1, 4096, "decode"),
    ("amx", "bfloat16", (64, 4), 1, 4096, "tiles"),
    ("amx", "bfloat16", (16, 1), 1, 4096, "decode"),  # one tile for four cores
    ("amx", "float16", (64, 4), 1, 4096, "decode"),
])  # fmt: skip
def test_few_rows_of_many_keys_are_decoded(
    monkeypatch: pytest.MonkeyPatch, arch: str, dtype: str, heads: tuple[int, int], sq: int, skv: int, path: str
) -> None:
    monkeypatch.setattr(product, "refused", lambda: False)
    isa = ("avx512_bf16", "amx_tile", "amx_bf16") if arch == "amx" else ()
    machine = replace(CPU, arch=arch, isa=isa, cores=4)
    size = {"sq": sq, "skv": skv, "head_dim": 64, "head_dim_k": 64, "head_dim_v": 64}
    problem = Problem(spec(), 1, *heads, **size, dtype=dtype, kv_dtype=dtype)
    assert decodes(problem, machine) == (path == "decode")
    assert NativeBackend().supports(problem, machine) == []
    # A cache of another precision is read by decoding alone, at up to 64 rows.
    assert decodes(replace(problem, kv_dtype="float32" if dtype != "float32" else "float16"), machine) == (sq < 65)


def test_many_rows_decode_where_prefill_would_leave_cores_idle() -> None:
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, h, n, 64, generator=g) for h, n in ((128, 1), (1, 3000), (1, 3000)))
    problem = Problem.of(spec(), check(spec(), q, k, v, {}), q, k, v, {})
    for cores, choice in ((2, "tiles"), (64, "kv_splits")):
        backend, machine = NativeBackend(), replace(CPU, cores=cores)
        space = backend.space(problem, machine)
        assert choice in space.default
        assert backend.supports(problem, machine) == []
        out, lse = backend.prepare(problem, space.default)(q, k, v)
        exact_out, exact_lse = oracle(spec(), q, k, v)
        assert error(out, exact_out) <= 2e-6
        assert error(lse, exact_lse) <= 4e-6


@pytest.mark.parametrize("score", [scores.General(), scores.Additive()], ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_step_with_a_trained_score(score: scores.Score, layout: Any) -> None:
    """The general score decodes as a dot product of weighted queries; the additive one is left to prefill."""
    step = spec(mask=CAUSAL, score=score, layout=layout)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 24, generator=g) for h, n in ((4, 1), (2, 333), (2, 333)))
    q, k, v = (x.transpose(1, 2).contiguous() if layout == "bshd" else x for x in (q, k, v))
    weight = torch.randn(4, 24, *([24] if isinstance(score, scores.General) else []), generator=g) / 5
    with use_backend("cpu"):
        out, lse = attention(step, q, k, v, score_weight=weight)
    want, want_lse = oracle(step, q, k, v, score_weight=weight)
    assert error(out, want) <= 5e-6
    assert error(lse, want_lse) <= 5e-6
