"""Law: what a call computes depends on its tensors alone: not on torch's defaults, on strides, or on later writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, errors, masks
from attnreg_cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with attnreg.use_backend("cpu"):
        yield


def _draw(sq: int = 100, skv: int = 100, heads: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, n, 16, generator=g) for n in (sq, skv, skv)]


def _results(spec: AttentionSpec, inputs: list[Tensor], **named: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    bias = named.get("bias")
    if bias is not None:
        named["bias"] = bias = bias.detach().clone().requires_grad_()
        leaves.append(bias)
    out, lse = attnreg.attention(spec, *leaves[:3], **named)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    spec = AttentionSpec(mask=masks.Causal(), bias=True, return_lse=True)
    bias = torch.randn(1, 1, 100, 100)
    want = _results(spec, _draw(), bias=bias)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = _results(spec, _draw_as(torch.float32), bias=bias)
    finally:
        torch.set_default_dtype(before)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def _draw_as(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 100, 16, generator=g, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("sq", [1, 4, 100])
def test_the_default_device_changes_nothing(sq: int) -> None:
    spec, inputs = AttentionSpec(mask=masks.Causal(), return_lse=True), _draw(sq)
    want = attnreg.attention(spec, *inputs)
    with torch.device("meta"):
        got = attnreg.attention(spec, *inputs)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_gradients_under_a_default_device() -> None:
    spec, bias = AttentionSpec(bias=True, return_lse=True), torch.randn(1, 1, 100, 100)
    want = _results(spec, _draw(), bias=bias)
    inputs = _draw()
    with torch.device("meta"):
        got = _results(spec, inputs, bias=bias)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("sq", [2, 33])
def test_rows_of_q_that_overlap(sq: int) -> None:
    q = torch.randn(1, 2, 8 * (sq + 1) + 8).unfold(2, 16, 1)[:, :, ::8][:, :, :sq]
    close = torch.randn(1, 2, sq + 20).unfold(2, 16, 1)[:, :, :sq]
    _, k, v = _draw(2, 50)
    for x in (q, close):
        want = attnreg.attention(AttentionSpec(), x.contiguous(), k, v)
        torch.testing.assert_close(attnreg.attention(AttentionSpec(), x, k, v), want)


CHANGED: dict[str, tuple[AttentionSpec, Tensor, Tensor]] = {
    "attn_mask": (AttentionSpec(mask=masks.Dense()), torch.ones(100, 100).tril().bool(), torch.ones(100, 100).bool()),
    "kv_lengths": (AttentionSpec(mask=masks.Padding(), align="top_left"), torch.tensor([50]), torch.tensor([90])),
    "alibi_slopes": (AttentionSpec(alibi=True), torch.tensor([0.1, 0.2]), torch.tensor([0.5, 1.0])),
    "document_ids": (AttentionSpec(mask=masks.Document()), torch.arange(100)[None] // 50, torch.zeros(1, 100).long()),
    "query_offset": (AttentionSpec(mask=masks.Causal(), align="offset"), torch.tensor([0]), torch.tensor([40])),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_tensor_that_is_overwritten_before_the_backward_pass_is_an_error(name: str) -> None:
    spec, given, other = CHANGED[name]
    q, k, v = (x.requires_grad_() for x in _draw())
    out = attnreg.attention(spec, q, k, v, **{name: given})
    kept = given.clone()
    given.copy_(other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    given.copy_(kept)


@pytest.mark.parametrize("traced", [False, True])
def test_a_second_derivative_is_refused(traced: bool) -> None:
    q, k, v = _draw()

    def loss(x: Tensor) -> Tensor:
        return attnreg.attention(AttentionSpec(), x, k, v).square().sum()

    def twice(x: Tensor) -> Tensor:
        if traced:
            return torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
        x.requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(errors.BackendError, match="no second derivative"):
        twice(q)


BOUNDS = {"max_seqlen_q": 90, "max_seqlen_k": 100}
ENDS = {"cu_seqlens_q": torch.tensor([0, 70, 100]), "cu_seqlens_k": torch.tensor([0, 80, 120])}


@pytest.mark.parametrize("shape", [(1, 4, 90, 100), (2, 1, 90, 100), (1, 1, 1, 100)], ids=str)
def test_a_packed_bias_is_as_large_as_the_given_bounds(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 4, 16, generator=g).requires_grad_() for n in (100, 120, 120))
    bias = torch.randn(shape, generator=g).requires_grad_()
    spec = AttentionSpec(bias=True, layout="thd")
    found = []
    for backend in ("cpu", "eager"):
        with attnreg.use_backend(backend):
            out = attnreg.attention(spec, q, k, v, bias=bias, **ENDS, **BOUNDS)
            found.append(torch.autograd.grad(out.square().sum(), (q, k, v, bias)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_packed_masks_are_as_large_as_the_given_bounds() -> None:
    q, k, v = (torch.randn(n, 2, 16) for n in (100, 120, 120))
    spec = AttentionSpec(mask=masks.Causal() & masks.Dense() | masks.Global((0,)), layout="thd")
    mask = torch.rand(2, 1, 90, 100) < 0.5
    got = attnreg.attention(spec, q, k, v, attn_mask=mask, **ENDS, **BOUNDS)
    with attnreg.use_backend("eager"):
        torch.testing.assert_close(got, attnreg.attention(spec, q, k, v, attn_mask=mask, **ENDS, **BOUNDS))


PREFIX_GONE = [
    masks.Causal() & masks.PrefixLM(),
    masks.PrefixLM() & masks.Causal(),
    masks.PrefixLM(0) & masks.PrefixLM(),
]


@pytest.mark.parametrize("mask", PREFIX_GONE, ids=str)
@pytest.mark.parametrize("sq", [1, 40])
def test_a_prefix_that_another_part_forbids_is_none(mask: masks.Mask, sq: int) -> None:
    q, k, v = _draw(sq, 40)
    want = attnreg.attention(AttentionSpec(mask=masks.Causal(), align="top_left"), q, k, v)
    lengths = torch.tensor([30])
    got = attnreg.attention(AttentionSpec(mask=mask, align="top_left"), q, k, v, prefix_lengths=lengths)
    assert torch.equal(got, want)


NARROW = [(masks.Causal() & masks.SlidingWindow(left), {}) for left in (3, 4, 5, 6, 13, 14)] + [
    (masks.Causal() & masks.Chunked(7), {}),
    (masks.Causal() & masks.Document(), {"document_ids": (torch.arange(256) >= 101)[None].long()}),
]


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize(("mask", "named"), NARROW, ids=str)
@pytest.mark.parametrize("heads", [(8, 1), (16, 1), (21, 3), (2, 2)], ids=str)
def test_narrow_bounds_hold_for_every_tile(
    mask: masks.Mask, named: dict[str, Tensor], heads: tuple[int, int], vectors: int
) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 256, 16, generator=g) for h in (heads[0], heads[1], heads[1]))
    with attnreg.use_backend("cpu", {"vectors": vectors}):
        got = attnreg.attention(AttentionSpec(mask=mask), q, k, v, **named)
    with attnreg.use_backend("eager"):
        torch.testing.assert_close(got, attnreg.attention(AttentionSpec(mask=mask), q, k, v, **named))
