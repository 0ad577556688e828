"""Law: over a stored fp8 or int8 cache decoding equals the attention of the numbers that the cache stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decode import error, prepare
from torch import Tensor

from attnreg import AttentionSpec, Precision, Problem, attention, masks, use_backend
from attnreg.testing.oracle import oracle
from attnreg.validate import check
from attnreg_cpu import build
from attnreg_cpu.decode import decode_supports

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

STORED = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(name: str, g: torch.Generator, *shape: int) -> Tensor:
    """A stored tensor that uses the type's whole range, subnormals and zeros of both signs with it."""
    if name == "int8":
        return torch.randint(-128, 128, shape, generator=g).to(torch.int8)
    return (torch.randn(*shape, generator=g) * 2.0 ** torch.randint(-10, 4, shape, generator=g)).to(STORED[name])


def scales(scaling: str, g: torch.Generator, batch: int, kv_heads: int, blocks: int) -> Tensor:
    shape = {"tensor": (1,), "head": (batch, kv_heads), "block": (batch, kv_heads, blocks)}[scaling]
    return torch.rand(*shape, generator=g) * 0.04 + 0.01


def spec_of(name: str, scaling: str, **fields: Any) -> AttentionSpec:
    precision = Precision(kv=name, scaling=scaling)  # type: ignore[arg-type]  # parameters of the test
    return AttentionSpec(dtype=precision, return_lse=True, **fields)


def compare(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any], **config: Any) -> None:
    out, lse = prepare(spec, q, k, v, named, **config)(q, k, v, **named)
    exact_out, exact_lse = oracle(spec, q, k, v, **named)
    size = float(exact_out.abs().max())
    rounded = error(exact_out.to(out.dtype), exact_out)
    assert out.dtype == q.dtype
    assert error(out, exact_out) <= 2 * rounded + 4e-6 * max(size, 1.0)
    assert error(lse, exact_lse) <= 1e-5 * max(1.0, float(exact_lse.abs().nan_to_num(posinf=0.0).max()))


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("scaling", ["tensor", "head", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "dims"),
    [((4, 4), (64, 64)), ((4, 1), (72, 40)), ((40, 2), (128, 128)), ((64, 2), (128, 128))],
    ids=str,
)
def test_quantised_cache(
    name: str, scaling: str, dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    g = torch.Generator().manual_seed(0)
    (hq, hkv), (dim, dim_v), skv = heads, dims, 500
    q = torch.randn(2, hq, 1, dim, generator=g).to(dtype)
    k, v = draw(name, g, 2, hkv, skv, dim), draw(name, g, 2, hkv, skv, dim_v)
    named = {"k_descale": scales(scaling, g, 2, hkv, 8), "v_descale": scales(scaling, g, 2, hkv, 8)}  # blocks of 64
    for config in ({}, {"widen_rows": 1, "kv_splits": 4}):
        compare(spec_of(name, scaling), q, k, v, named, **config)


@pytest.mark.parametrize("name", STORED)
def test_quantised_pages(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 3, 64, generator=g)
    k, v = draw(name, g, 9, 2, 16, 64), draw(name, g, 9, 2, 16, 64)
    named: dict[str, Any] = {
        "block_table": torch.tensor([[3, 1, 8, 0], [2, 5, -1, -1]]),
        "seqused_k": torch.tensor([60, 17]),
        "k_descale": scales("block", g, 2, 2, 4),
        "v_descale": scales("block", g, 2, 2, 4),
    }
    compare(spec_of(name, "block", page_size=16, mask=masks.Causal()), q, k, v, named)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_quantised_layouts(name: str, layout: str) -> None:
    g = torch.Generator().manual_seed(2)
    named: dict[str, Any] = {}
    if layout == "thd":
        named = {"cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 130, 180])}
        q, k, v = torch.randn(3, 4, 32, generator=g), draw(name, g, 180, 2, 32), draw(name, g, 180, 2, 32)
    else:
        q, k, v = torch.randn(2, 1, 4, 32, generator=g), draw(name, g, 2, 90, 2, 32), draw(name, g, 2, 90, 2, 32)
    named |= {"k_descale": scales("head", g, 2, 2, 1), "v_descale": scales("head", g, 2, 2, 1)}
    compare(spec_of(name, "head", layout=layout, mask=masks.Causal()), q, k, v, named)


@pytest.mark.parametrize("name", STORED)
def test_prefill_over_a_quantised_cache(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(1, 4, 150, 64, generator=g), draw(name, g, 1, 2, 200, 64), draw(name, g, 1, 2, 200, 64)
    named = {"k_descale": torch.tensor(0.02), "v_descale": torch.tensor([[0.03]])}
    compare(spec_of(name, "tensor", mask=masks.Causal() & masks.SlidingWindow(90)), q, k, v, named)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_queries_give_bfloat16(name: str) -> None:
    g = torch.Generator().manual_seed(4)
    q, k, v = draw(name, g, 2, 4, 1, 64), draw(name, g, 2, 2, 300, 64), draw(name, g, 2, 2, 300, 64)
    named = {f"{x}_descale": scales("head", g, 2, 2, 1) for x in "qkv"}
    spec = AttentionSpec(dtype=Precision(scaling="head"), return_lse=True)
    problem = Problem.of(spec, check(spec, q, k, v, named), q, k, v, named)
    assert decode_supports(problem) == []
    out, lse = prepare(spec, q, k, v, named)(q, k, v, **named)
    exact_out, exact_lse = oracle(spec, q, k, v, **named)
    assert out.dtype == torch.bfloat16
    assert error(out, exact_out) <= 2 * error(exact_out.bfloat16(), exact_out) + 4e-6
    assert error(lse, exact_lse) <= 1e-5


@pytest.mark.parametrize("name", STORED)
def test_every_code_is_read_right(name: str) -> None:
    """Softmax over one key returns its value: all 256 codes through keys of one row each, NaN codes as NaN."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(STORED[name])
    k = codes.view(1, 1, 1, 256).expand(1, 1, 1, 256).contiguous()
    one = {"k_descale": torch.ones(1), "v_descale": torch.ones(1)}
    zero = torch.zeros(1, 1, 1, 256)
    finite = codes.float().isfinite()
    keys = torch.where(finite, k.float(), 0.0).to(STORED[name]) if name != "int8" else k
    spec = spec_of(name, "tensor")
    out, _ = prepare(spec, zero, keys, k, one)(zero, keys, k, **one)
    assert torch.equal(out.view(256)[finite], codes.float()[finite])
    assert torch.equal(out.view(256).isnan(), codes.float().isnan())
    # As keys: the score of code c against the unit vector c is the value of c, and so is lse over that one key.
    rows = torch.eye(256).view(1, 1, 256, 256)
    _, lse = prepare(spec, rows, keys, keys, one)(rows, keys, keys, **one)
    want = torch.where(finite, codes.float(), 0.0) / 16
    assert error(lse.view(256), want.double()) <= 2e-6 * float(want.abs().max())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16, 48])
@pytest.mark.parametrize("keys", [1, 7, 8, 9, 40], ids=str)
def test_a_nan_is_not_passed_over_as_the_peak(keys: int, rows: int) -> None:
    """Wherever among the keys it stands, and whether or not any other score is finite."""
    for at in range(keys):
        for others in (1.0, -torch.inf):
            q = torch.ones(1, rows, 1, 16)
            k, v = torch.full((1, 1, keys, 16), others), torch.ones(1, 1, keys, 16)
            k[0, 0, at] = torch.nan
            for config in ({}, {"kv_splits": 2, "block_kv": 32}):
                out, lse = prepare(AttentionSpec(return_lse=True), q, k, v, {}, **config)(q, k, v)
                assert out.isnan().all()
                assert lse.isnan().all()


@pytest.mark.parametrize("name", STORED)
def test_subnormals_are_read_where_torch_flushes_them(name: str) -> None:
    """torch.set_flush_denormal is about float32; a cache's small codes are none."""
    g = torch.Generator().manual_seed(6)
    codes = torch.randint(-7, 8, (2, 2, 40, 64), generator=g, dtype=torch.int8)
    k = v = (
        torch.where(codes < 0, -codes | -128, codes).view(torch.uint8).view(STORED[name]) if name != "int8" else codes
    )
    q = torch.randn(2, 4, 1, 64, generator=g) * 100
    named = {"k_descale": torch.tensor(3.0), "v_descale": torch.tensor(3.0)}
    attend = prepare(spec_of(name, "tensor"), q, k, v, named)
    kept, kept_lse = attend(q, k, v, **named)
    assert torch.set_flush_denormal(True)
    try:
        out, lse = attend(q, k, v, **named)
    finally:
        torch.set_flush_denormal(False)
    assert kept.abs().max() > 0
    assert torch.equal(out, kept)
    assert torch.equal(lse, kept_lse)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1), (40, 2), (64, 2)], ids=str)
@pytest.mark.parametrize("dims", [(128, 128), (72, 40), (24, 8)], ids=str)
def test_a_nan_reaches_what_it_belongs_to(name: str, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    """A NaN of a key every channel of its KV head's rows, one of a value its own channel, and nothing else."""
    g = torch.Generator().manual_seed(5)
    (hq, hkv), (dim, dim_v), skv = heads, dims, 301
    q = torch.randn(3, hq, 1, dim, generator=g)
    k, v = draw(name, g, 3, hkv, skv, dim), draw(name, g, 3, hkv, skv, dim_v)
    nan = torch.tensor(0xFF, dtype=torch.uint8)
    k.view(torch.uint8)[0, -1, skv - 1, dim - 1] = nan
    v.view(torch.uint8)[1, 0, 17, 0] = nan
    v.view(torch.uint8)[1, 0, skv - 2, dim_v - 1] = nan
    named = {"k_descale": torch.tensor(0.02), "v_descale": torch.tensor(0.03)}
    lost = torch.zeros(3, hkv, hq // hkv, dim_v, dtype=torch.bool)
    lost[0, -1], lost[1, 0, :, 0], lost[1, 0, :, -1] = True, True, True
    clean_k = k.view(torch.uint8).where(k.view(torch.uint8) != nan, torch.zeros_like(nan)).view(k.dtype)
    clean_v = v.view(torch.uint8).where(v.view(torch.uint8) != nan, torch.zeros_like(nan)).view(v.dtype)
    for config in ({}, {"widen_rows": 1, "block_kv": 128}, {"kv_splits": 3}):
        attend = prepare(spec_of(name, "tensor"), q, k, v, named, **config)
        out, _ = attend(q, k, v, **named)
        clean, _ = attend(q, clean_k, clean_v, **named)
        assert torch.equal(out.isnan(), lost.view(3, hq, 1, dim_v))
        assert torch.equal(out[2], clean[2])


def test_block_scales_of_no_sequence() -> None:
    spec = AttentionSpec(layout="thd", dtype=Precision(kv="float8_e4m3fn", scaling="block"))
    q, kv, scale, none = (
        torch.zeros(0, 2, 16),
        torch.zeros(0, 2, 16).to(torch.float8_e4m3fn),
        torch.ones(0, 2, 0),
        torch.zeros(1),
    )
    with use_backend("cpu"):
        out = attention(
            spec, q, kv, kv, cu_seqlens_q=none.int(), cu_seqlens_k=none.int(), k_descale=scale, v_descale=scale
        )
    assert out.shape == q.shape
