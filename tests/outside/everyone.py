"""What attnreg says, by the oracle and by every backend that runs the call, for comparison with someone else's code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import attnreg
from attnreg import AttentionSpec
from attnreg.errors import UnsupportedError
from attnreg.testing import oracle

SINGLE = ("sdpa", "cpu")
"""Backends without float64; they are asked in float32. FlexAttention and Triton have their own tests."""


def lowered(x: Any) -> Any:
    return x.detach().float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x


def answers(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Iterator[tuple[str, Any, float]]:
    """(who, output or (output, lse), tolerance): the oracle and eager in float64, the others in float32."""
    exact = oracle(spec, q, k, v, **{n: x for n, x in tensors.items() if n != "generator"})
    yield "oracle", exact if spec.return_lse else exact[0], 1e-9
    with attnreg.use_backend("eager"):
        yield "eager", attnreg.attention(spec, q, k, v, **tensors), 1e-9 if q.dtype == torch.float64 else 2e-5
    single = {name: lowered(x) for name, x in tensors.items()}
    for name in SINGLE:
        try:
            with attnreg.use_backend(name):
                yield name, attnreg.attention(spec, lowered(q), lowered(k), lowered(v), **single), 2e-5
        except UnsupportedError:
            continue
    yield "chosen", attnreg.attention(spec, lowered(q), lowered(k), lowered(v), **single), 2e-5


def agree(wanted: Tensor, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, at_least: int = 3, tol: float = 0.0,
          lse: Tensor | None = None, **tensors: Any) -> None:  # fmt: skip
    """Everyone's output is `wanted`, and everyone's lse is `lse` where it is given. tol: of the outside code."""
    asked = 0
    for who, result, own in answers(spec, q, k, v, **tensors):
        out = result[0] if isinstance(result, tuple) else result
        bound = max(own, tol)
        near(out, wanted, bound, who)
        if lse is not None:
            near(result[1], lse, max(bound, 2e-5), f"{who}: lse")
        asked += 1
    assert asked >= at_least, f"only {asked} answered"


def near(mine: Tensor, wanted: Tensor, bound: float, who: str) -> None:
    """Equal within `bound`, absolutely and relatively; infinities in the same places."""
    torch.testing.assert_close(mine.detach().double(), wanted.detach().double(), atol=bound, rtol=bound,
                               msg=lambda text: f"{who}: {text}")  # fmt: skip


def qkv(
    seed: int, batch: int = 2, q_heads: int = 4, kv_heads: int = 4, sq: int = 19, skv: int = 19, dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Random q, k, v in layout bhsd."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (batch, q_heads, sq, dim), (batch, kv_heads, skv, dim), (batch, kv_heads, skv, dim)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v
