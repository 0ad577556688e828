"""Law: scores of any finite size give what eager gives: no NaN, no row of zeros, no weight above 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, masks
from attnreg.testing import oracle
from attnreg_cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

LOWEST = torch.finfo(torch.float32).min


def _exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scores as float32 rounds them, everything after in float64."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5 + bias).double()
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def _draw(sq: int, skv: int, size: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=g) for n in (sq, skv, skv))
    return [q * size, k * size, v]


@pytest.mark.parametrize("value", [-1e4, -1e9, -1e20, LOWEST, 1e9, 1e20])
@pytest.mark.parametrize("sq", [1, 3, 64])
def test_a_row_whose_bias_is_far(sq: int, value: float) -> None:
    q, k, v = _draw(sq, 64)
    bias = torch.zeros(1, 2, sq, 64)
    bias[:, :, sq // 2] = value
    spec = AttentionSpec(bias=True, return_lse=True)
    want, want_lse = _exact(q, k, v, bias)
    with attnreg.use_backend("cpu"):
        out, lse = attnreg.attention(spec, q, k, v, bias=bias)
    torch.testing.assert_close(out, want.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-1e9, -1e20, LOWEST])
def test_gradients_of_a_row_whose_bias_is_far(value: float) -> None:
    """lse alone holds no more than the bias there; its second word is what makes the weights sum to 1."""
    bias = torch.zeros(1, 2, 64, 64)
    bias[:, :, 2] = value
    leaves = [x.requires_grad_() for x in _draw(64, 64)]
    spec = AttentionSpec(bias=True)
    with attnreg.use_backend("cpu"):
        found = torch.autograd.grad(attnreg.attention(spec, *leaves, bias=bias).sum(), leaves)
    wanted = torch.autograd.grad(_exact(*leaves, bias)[0].sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [3e2, 3e4])
def test_far_products(size: float, vectors: int) -> None:
    """One key outweighs all others in nearly each row, so gradients of v are sums of whole rows."""
    q, k, v = _draw(128, 128, size)
    v.requires_grad_()
    want, want_lse = _exact(q, k, v, 0.0)
    with attnreg.use_backend("cpu", {"vectors": vectors}):
        out, lse = attnreg.attention(AttentionSpec(return_lse=True), q, k, v)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-6, atol=0)
    assert (out.double() - want).abs().amax(-1).median() < 1e-5
    assert out.isfinite().all()
    assert (out != 0).any(-1).all()
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(grad.sum(), torch.tensor(float(out.numel())), rtol=2e-2, atol=0)


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=str)
@pytest.mark.parametrize("sq", [1, 4, 20, 100])
def test_a_sink_that_is_nan_is_not_dropped(sq: int, mask: masks.Mask) -> None:
    q, k, v = _draw(sq, 100)
    spec = AttentionSpec(mask=mask, sinks=True, return_lse=True)
    with attnreg.use_backend("cpu"):
        out, lse = attnreg.attention(spec, q, k, v, sinks=torch.tensor([float("nan"), 0.0]))
    assert out[:, 0].isnan().all()
    assert lse[:, 0].isnan().all()
    assert out[:, 1].isfinite().all()
    assert lse[:, 1].isfinite().all()


@pytest.mark.parametrize("offset", [2**31 - 100, 2**31, 2**32 + 100, -(2**31), -(2**32) + 5, 2**44])
@pytest.mark.parametrize("sq", [2, 40])
def test_alibi_of_positions_beyond_32_bits(sq: int, offset: int) -> None:
    q, k, v = _draw(sq, 70)
    spec = AttentionSpec(alibi=True, align="offset", return_lse=True)
    named = {"query_offset": torch.tensor([offset]), "alibi_slopes": torch.full((2,), 2.0**-8)}
    with attnreg.use_backend("cpu"):
        out, lse = attnreg.attention(spec, q, k, v, **named)
    _, want_lse = oracle(spec, q, k, v, **named)
    assert (lse / want_lse - 1).abs().max() < 1e-5
    # Weights are those of scores as far apart as float32 holds them there: an average of the values at least.
    assert out.abs().max() <= v.abs().max()
