"""Law: a bias or dense mask of any shape that broadcasts, one value for all included, means the same everywhere."""

from __future__ import annotations

import pytest
import torch
from faults.reference import attend, close

import attnreg
from attnreg import AttentionSpec, masks

SHAPES = ((), (1,), (9,), (9, 9), (4, 1, 1), (2, 1, 9, 1))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu", pytest.param("flex", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], backend: str) -> None:
    check(shape, backend)


def test_one_value_for_all_on_flex() -> None:
    """The shape that was an error deep inside torch's compiler; the others are slow to compile."""
    check((), "flex")


def check(shape: tuple[int, ...], backend: str) -> None:
    draw = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, heads, 9, 24, generator=draw) for heads in (4, 2, 2))
    bias = torch.randn(shape, generator=draw)
    keep = torch.rand(shape, generator=draw) > 0.3
    with attnreg.use_backend(backend):
        out = attnreg.attention(AttentionSpec(bias=True), q, k, v, bias=bias)
        masked = attnreg.attention(AttentionSpec(mask=masks.Dense()), q, k, v, attn_mask=keep)
    close(out, attend(q, k, v, bias=bias)[0])
    close(masked, attend(q, k, v, keep)[0])
