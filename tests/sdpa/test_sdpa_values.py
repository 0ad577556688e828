"""What the sdpa backend computes, in every configuration, equals attention by its definition in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dense import Allowed, problem_of, reference, table
from torch import Tensor

from attnreg import AttentionSpec, HeadGrouping, Precision, masks, scores, sparsity
from attnreg.hardware import detect
from attnreg_sdpa import Sdpa

SDPA = Sdpa()
CPU = detect("cpu")


@dataclass
class Case:
    """A spec, the sizes (B, Hq, Hkv, Sq, Skv, D, Dv), what it allows said again in plain Python, and its tensors."""

    name: str
    spec: AttentionSpec
    sizes: tuple[int, int, int, int, int, int, int]
    allowed: Allowed | None = None
    tensors: dict[str, Any] = field(default_factory=dict)
    shift: list[int] | None = None  # position of row 0 in each batch; Skv - Sq unless given
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of `reference`


def _t(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _distances(b: int, h: int, sq: int, skv: int, slopes: Tensor) -> Tensor:
    away = (torch.arange(sq)[:, None] + skv - sq - torch.arange(skv)[None, :]).abs()
    return -slopes.view(1, h, 1, 1).double() * away


M = masks
HOLES = torch.rand(2, 1, 9, 13, generator=torch.Generator().manual_seed(3)) > 0.5
HOLES[0, 0, 4] = False  # a row that attends nothing
HOLES[:, :, :, 6] = False  # a key that nobody attends
DOCS = torch.tensor([[5, 5, 5, -1, -1, 9, 9, 9, 9, 9, 5, 5, 5], [0] * 13])
BIAS = _t(1, 4, 9, 13).masked_fill(_t(1, 4, 9, 13, seed=8) > 1.2, -math.inf)
BIAS[:, :, 2] = -math.inf
BIAS[:, :, 3, 0] = 1e4
BIAS[:, :, 5, :12] = -1e4
STD = (2, 4, 2, 9, 13, 16, 16)
BLOCKS = torch.rand(1, 4, 3, 4, generator=torch.Generator().manual_seed(5)) > 0.4

CASES = [
    Case("full", AttentionSpec(), STD),
    Case("full, mqa", AttentionSpec(heads=HeadGrouping(q=4, kv=1)), (1, 4, 1, 65, 63, 8, 8)),
    Case("scale", AttentionSpec(score=scores.ScaledDot(0.3)), STD, extra={"scale": 0.3}),
    *(
        Case(
            f"scale {scale}", AttentionSpec(score=scores.ScaledDot(scale), mask=M.Causal()), (1, 4, 2, 9, 9, 16, 16),
            lambda b, h, i, p, j: j <= p, extra={"scale": scale},
        )
        for scale in (0.0, -0.5, 1e-60)
    ),
    Case(
        "lse, one column", AttentionSpec(return_lse=True, mask=M.Causal()), (1, 4, 2, 9, 9, 1, 1),
        lambda b, h, i, p, j: j <= p,
    ),
    Case("dot", AttentionSpec(score=scores.Dot()), STD, extra={"scale": 1.0}),
    Case("causal square", AttentionSpec(mask=M.Causal()), (2, 4, 2, 13, 13, 16, 16), lambda b, h, i, p, j: j <= p),
    Case("causal wide", AttentionSpec(mask=M.Causal()), STD, lambda b, h, i, p, j: j <= p),
    Case("causal tall", AttentionSpec(mask=M.Causal()), (1, 4, 4, 13, 9, 16, 16), lambda b, h, i, p, j: j <= p),
    Case("causal decode", AttentionSpec(mask=M.Causal()), (2, 4, 2, 1, 13, 16, 16), lambda b, h, i, p, j: j <= p),
    Case(
        "causal top left", AttentionSpec(mask=M.Causal(), align="top_left"), STD, lambda b, h, i, p, j: j <= i,
        shift=[0, 0],
    ),
    Case(
        "one row, top left", AttentionSpec(mask=M.Causal(), align="top_left"), (2, 4, 2, 1, 13, 16, 16),
        lambda b, h, i, p, j: j <= i, shift=[0, 0],
    ),
    Case(
        "offset", AttentionSpec(mask=M.Causal(), align="offset"), STD, lambda b, h, i, p, j: j <= p,
        {"query_offset": torch.tensor([-3, 7])}, [-3, 7],
    ),
    Case(
        "one row, offset", AttentionSpec(mask=M.Causal(), align="offset"), (2, 4, 2, 1, 13, 16, 16),
        lambda b, h, i, p, j: j <= p, {"query_offset": torch.tensor([-1, 3])}, [-1, 3],
    ),
    Case(
        "window", AttentionSpec(mask=M.SlidingWindow(3, 2)), STD, lambda b, h, i, p, j: p - 3 <= j <= p + 2
    ),
    Case("prefix", AttentionSpec(mask=M.PrefixLM(6)), STD, lambda b, h, i, p, j: j < 6 or j <= p),
    Case(
        "prefix lengths", AttentionSpec(mask=M.PrefixLM()), STD, lambda b, h, i, p, j: j < (11, 0)[b] or j <= p,
        {"prefix_lengths": torch.tensor([11, 0])},
    ),
    Case(
        "chunked or dilated", AttentionSpec(mask=M.Chunked(4) | M.Dilated(4, 3)), STD,
        lambda b, h, i, p, j: p // 4 == j // 4 or ((j - p) % 3 == 0 and abs(j - p) <= 6),
    ),
    Case("not causal", AttentionSpec(mask=~M.Causal()), STD, lambda b, h, i, p, j: j > p),
    Case(
        "documents", AttentionSpec(mask=M.Document() & M.Causal()), STD,
        lambda b, h, i, p, j: bool(DOCS[b, p] == DOCS[b, j]) and j <= p, {"document_ids": DOCS},
    ),
    Case(
        "padding", AttentionSpec(mask=M.Padding()), STD, lambda b, h, i, p, j: j < (5, 0)[b],
        {"kv_lengths": torch.tensor([5, 0])}, [5 - 9, -9],
    ),
    Case(
        "causal padding", AttentionSpec(mask=M.Padding() & M.Causal()), STD,
        lambda b, h, i, p, j: j < (5, 13)[b] and j <= p, {"kv_lengths": torch.tensor([5, 13])}, [5 - 9, 13 - 9],
    ),
    Case(
        "dense", AttentionSpec(mask=M.Dense()), STD, lambda b, h, i, p, j: bool(HOLES[b, 0, i, j]),
        {"attn_mask": HOLES},
    ),
    Case(
        "dense, low rank", AttentionSpec(mask=M.Dense()), STD, lambda b, h, i, p, j: bool(HOLES[1, 0, 0, j]),
        {"attn_mask": HOLES[1, 0, 0]},
    ),
    Case(
        "custom", AttentionSpec(mask=M.Custom(lambda b, h, p, j: (p + j + h) % 3 != 0)), STD,
        lambda b, h, i, p, j: (p + j + h) % 3 != 0,
    ),
    Case(
        "block mask", AttentionSpec(sparsity=sparsity.Blocks(4, 4), mask=M.Causal()), STD,
        lambda b, h, i, p, j: bool(BLOCKS[0, h, i // 4, j // 4]) and j <= p, {"block_mask": BLOCKS},
    ),
    Case(
        "strided", AttentionSpec(sparsity=sparsity.Strided(2, 2, 3)), STD,
        lambda b, h, i, p, j: 0 <= p // 2 - j // 2 < 2 or (j // 2) % 3 == 0,
    ),
    Case("bias", AttentionSpec(bias=True), STD, tensors={"bias": BIAS}, extra={"added": BIAS}),
    Case(
        "bias, masked", AttentionSpec(bias=True, mask=M.Causal()), (2, 4, 2, 9, 9, 16, 16),
        lambda b, h, i, p, j: j <= p, {"bias": _t(2, 1, 1, 9)}, extra={"added": _t(2, 1, 1, 9)},
    ),
    Case(
        "alibi", AttentionSpec(alibi=True, mask=M.Causal()), STD, lambda b, h, i, p, j: j <= p,
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0])},
        extra={"added": _distances(2, 4, 9, 13, torch.tensor([0.5, 0.25, 0.1, 1.0]))},
    ),
    Case("wide values", AttentionSpec(mask=M.Causal()), (1, 4, 2, 9, 9, 8, 24), lambda b, h, i, p, j: j <= p),
    Case("narrow values", AttentionSpec(), (1, 4, 2, 9, 13, 24, 5)),
    Case(
        "general", AttentionSpec(score=scores.General()), STD, tensors={"score_weight": _t(4, 16, 16) / 8},
        extra={"weight": _t(4, 16, 16) / 8},
    ),
    Case("bshd", AttentionSpec(layout="bshd", mask=M.Causal()), STD, lambda b, h, i, p, j: j <= p),
    Case(
        "bshd square", AttentionSpec(layout="bshd", mask=M.Causal()), (2, 4, 2, 9, 9, 16, 16),
        lambda b, h, i, p, j: j <= p,
    ),
    Case("lse", AttentionSpec(return_lse=True, mask=M.Causal()), STD, lambda b, h, i, p, j: j <= p),
    Case(
        "lse, rows that attend nothing", AttentionSpec(return_lse=True, mask=M.Dense()), STD,
        lambda b, h, i, p, j: bool(HOLES[b, 0, i, j]), {"attn_mask": HOLES},
    ),
    Case(
        "lse, unlike head dims", AttentionSpec(return_lse=True, mask=M.Causal(), align="top_left"),
        (1, 4, 2, 9, 13, 24, 16), lambda b, h, i, p, j: j <= i, shift=[0],
    ),
    Case(
        "sinks", AttentionSpec(sinks=True, return_lse=True, mask=M.Dense()), STD,
        lambda b, h, i, p, j: bool(HOLES[b, 0, i, j]), {"sinks": _t(4), "attn_mask": HOLES}, extra={"sinks": _t(4)},
    ),
    Case("no keys", AttentionSpec(), (2, 4, 2, 3, 0, 8, 8), lambda b, h, i, p, j: True),
    Case("no keys, lse", AttentionSpec(return_lse=True), (2, 4, 2, 3, 0, 8, 8), lambda b, h, i, p, j: True),
    Case("no rows", AttentionSpec(mask=M.Causal()), (2, 4, 2, 0, 5, 8, 8), lambda b, h, i, p, j: True),
    Case("no batch", AttentionSpec(mask=M.SlidingWindow(2)), (0, 4, 2, 3, 5, 8, 8), lambda b, h, i, p, j: True),
]  # fmt: skip


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hkv, sq, skv, d, dv = case.sizes
    made = (_t(b, hq, sq, d, seed=1), _t(b, hkv, skv, d, seed=2), _t(b, hkv, skv, dv, seed=3))
    return tuple(x.to(dtype) for x in made)  # type: ignore[return-value]


def live_of(case: Case) -> Tensor | None:
    b, hq, _, sq, skv, _, _ = case.sizes
    if case.allowed is None:
        return None
    return table(case.allowed, b, hq, sq, skv, case.shift or [skv - sq] * b)


def lay(case: Case, x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous() if case.spec.layout == "bshd" else x


def configs(case: Case, *qkv: Tensor) -> list[dict[str, Any]]:
    problem = problem_of(case.spec, *qkv, **case.tensors)
    return list(SDPA.space(problem, CPU).points())


def run(case: Case, config: dict[str, Any], *qkv: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output [B, Hq, Sq, Dv] and lse of the backend."""
    problem = problem_of(case.spec, *qkv, **case.tensors)
    assert SDPA.supports(problem, CPU) == []
    got = SDPA.prepare(problem, config)(*qkv, **case.tensors)
    out, lse = got if case.spec.return_lse else (got, None)
    assert out.dtype == problem.out_dtype
    return (out.transpose(1, 2) if case.spec.layout == "bshd" else out), lse


def close(got: Tensor, want: Tensor, bound: float, what: str = "") -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=bound, rtol=bound, msg=lambda m: f"{what}: {m}")


BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_equals_the_definition(case: Case, dtype: torch.dtype) -> None:
    qkv = inputs(case, dtype)
    want, want_lse = reference(*qkv, live_of(case), **case.extra)
    for name in ("bias", "score_weight"):  # float64 calls take no float32 bias
        if dtype == torch.float64 and name in case.tensors:
            case = Case(**{**vars(case), "tensors": {**case.tensors, name: case.tensors[name].double()}})
    given = tuple(lay(case, x) for x in qkv)
    kept = [x.clone() for x in given]
    for config in configs(case, *given):
        out, lse = run(case, config, *given)
        close(out, want, BOUNDS[dtype], f"{config}")
        if lse is not None:
            assert lse.dtype == torch.float32
            torch.testing.assert_close(lse.double(), want_lse, atol=max(BOUNDS[dtype], 1e-6), rtol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), "an input was changed"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_equal_the_definitions(case: Case) -> None:
    """Of q, k, v, bias, ALiBi slopes, score_weight and sinks, with a gradient for lse as well."""
    leaves = {n: x.clone().requires_grad_() for n, x in zip("qkv", inputs(case), strict=True)}
    named = {
        n: case.tensors[n].clone().requires_grad_()
        for n in ("bias", "alibi_slopes", "score_weight", "sinks")
        if n in case.tensors
    }
    extra = {{"bias": "added", "score_weight": "weight"}.get(n, n): x for n, x in named.items()}
    if "alibi_slopes" in extra:
        b, hq, _, sq, skv, _, _ = case.sizes
        extra["added"] = _distances(b, hq, sq, skv, extra.pop("alibi_slopes"))
    want, want_lse = reference(*leaves.values(), live_of(case), **{**case.extra, **extra})
    grad_out, grad_lse = _t(*want.shape, seed=11), _t(*want_lse.shape, seed=12)

    def loss(out: Tensor, lse: Tensor | None) -> Tensor:
        total = (out * grad_out).sum()
        return total if lse is None else total + (torch.where(lse > -math.inf, lse, 0.0) * grad_lse).sum()

    wanted = torch.autograd.grad(
        loss(want, want_lse if case.spec.return_lse else None), [*leaves.values(), *named.values()], allow_unused=True
    )
    moved = Case(**{**vars(case), "tensors": {**case.tensors, **named}})
    given = tuple(lay(case, x) for x in leaves.values())
    for config in configs(moved, *given):
        got = torch.autograd.grad(
            loss(*run(moved, config, *given)), [*leaves.values(), *named.values()], allow_unused=True
        )
        for name, a, b in zip([*leaves, *named], got, wanted, strict=True):
            if a is None or b is None:
                assert all(x is None or not x.any() for x in (a, b)), f"{name} {config}"
            else:
                close(a, b, 2e-5, f"{name} {config}")


LARGEST = torch.finfo(torch.float32).max
EXTREME = [c for c in CASES if min(c.sizes) > 0 and c.allowed is not None and not live_of(c).all()]


@pytest.mark.parametrize(("value", "where"), list(itertools.product((LARGEST, -LARGEST), "kv")))
@pytest.mark.parametrize("case", EXTREME, ids=lambda case: case.name)
def test_masked_keys_leave_no_trace(case: Case, value: float, where: str) -> None:
    """Rows that attend a key see it; whatever it holds, the others' output and gradient are as if it were not there."""
    live = live_of(case)
    assert live is not None
    key = int(live.sum((0, 1, 2)).argmin())  # the key that fewest rows attend
    blind = ~live[..., key]  # rows [B, Hq, Sq] that do not attend it
    assert blind.any()
    q, k, v = inputs(case)
    k2, v2 = k.clone(), v.clone()
    (k2 if where == "k" else v2)[:, :, key] = value
    want, _ = reference(q, k, v, live, **case.extra)
    for config in configs(case, *(lay(case, x) for x in (q, k, v))):
        plain_out, _ = run(case, config, *(lay(case, x) for x in (q, k2, v2)))
        torch.testing.assert_close(
            torch.where(blind.unsqueeze(-1), plain_out, 0.0).double(), torch.where(blind.unsqueeze(-1), want, 0.0),
            atol=3e-6, rtol=3e-6,
        )  # fmt: skip
        grads = []
        for keys, values in ((k, v), (k2, v2)):
            xs = [x.clone().requires_grad_() for x in (q, keys, values)]
            out, _ = run(case, config, *(lay(case, x) for x in xs))
            (torch.where(blind.unsqueeze(-1), out, 0.0) * _t(*out.shape, seed=4)).sum().backward()
            grads.append([x.grad for x in xs])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", [c for c in CASES if min(c.sizes) > 0], ids=lambda case: case.name)
def test_strides_do_not_matter(case: Case) -> None:
    """Expanded (stride 0) keys, a batch that is a slice, and last dimensions that are not dense."""
    q, k, v = inputs(case)
    q = q.mT.contiguous().mT
    k = k[:1, :1].expand_as(k)
    v = torch.stack([v, v + 1])[:, ::1].permute(1, 2, 3, 4, 0)[..., 0]
    one = k[..., :1].expand_as(k)
    for keys in (k, one):
        want, _ = reference(q, keys, v, live_of(case), **case.extra)
        given = tuple(x.transpose(1, 2) if case.spec.layout == "bshd" else x for x in (q, keys, v))
        for config in configs(case, *given):
            out, _ = run(case, config, *given)
            close(out, want, 5e-6, f"{config}")


def test_a_prepared_call_serves_its_whole_bucket() -> None:
    """Prepared for one size, run at others of the same bucket: growing keys, and square ones that stay square."""
    spec = AttentionSpec(mask=M.Causal())
    q, k, v = _t(1, 4, 3, 16), _t(1, 2, 40, 16), _t(1, 2, 40, 16)
    call = SDPA.prepare(problem_of(spec, q, k, v), SDPA.space(problem_of(spec, q, k, v), CPU).default)
    for rows, keys in ((3, 40), (4, 33), (3, 64), (4, 64)):
        q, k, v = _t(1, 4, rows, 16), _t(1, 2, keys, 16, seed=2), _t(1, 2, keys, 16, seed=3)
        live = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        torch.testing.assert_close(call(q, k, v).double(), reference(q, k, v, live)[0], atol=3e-6, rtol=3e-6)


def test_precision_of_float8_and_stored_keys() -> None:
    """float8 and int8 tensors with descales equal the dequantised ones; float8 q gives bfloat16."""
    q, k, v = _t(2, 4, 5, 16), _t(2, 2, 12, 16, seed=2), _t(2, 2, 12, 16, seed=3)
    block = torch.rand(2, 2, 3) + 0.5
    head = torch.rand(2, 2) + 0.5
    for scaling, descale in (("tensor", torch.tensor([0.7])), ("head", head), ("block", block)):
        for kv in ("int8", "float8_e4m3fn"):
            spec = AttentionSpec(dtype=Precision(kv=kv, scaling=scaling))
            stored = [(x * 20).round().clamp(-100, 100).to(getattr(torch, kv)) for x in (k, v)]
            named = {"k_descale": descale, "v_descale": descale * 0.5}
            problem = problem_of(spec, q, *stored, **named)
            assert SDPA.supports(problem, CPU) == []
            wide = descale.reshape(1, 1, 1) if scaling == "tensor" else descale.reshape(2, 2, -1)
            full = wide.repeat_interleave(12 // wide.shape[2], 2).unsqueeze(-1)
            want, _ = reference(q, stored[0].double() * full, stored[1].double() * full * 0.5)
            for config in SDPA.space(problem, CPU).points():
                out = SDPA.prepare(problem, config)(q, *stored, **named)
                torch.testing.assert_close(out.double(), want, atol=5e-5, rtol=1e-5)
    eight = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    spec = AttentionSpec(dtype=Precision(scaling="head"))
    named = {"q_descale": head, "k_descale": head, "v_descale": head}
    problem = problem_of(spec, *eight, **named)
    out = SDPA.prepare(problem, SDPA.space(problem, CPU).default)(*eight, **named)
    assert out.dtype == torch.bfloat16
    per_head = head.repeat_interleave(2, 1)[..., None, None]
    want, _ = reference(eight[0].double() * per_head, *(x.double() * head[..., None, None] for x in eight[1:]))
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-2)
