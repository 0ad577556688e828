"""What quantised numbers mean: descales of stored tensors, and the plain rounding that sets the fp8 bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.spec import AttentionSpec
from attnreg.testing.sequences import Shape
from attnreg.validate import FLOAT8

__all__ = ["Rounding", "block_size", "descaled", "grouped", "largest", "stored"]


def largest(dtype: torch.dtype) -> float:
    """The largest finite value of a stored dtype."""
    return float(torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max)


def descaled(
    spec: AttentionSpec, one: Shape, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's [heads, rows, dim] tensors as the numbers that they stand for, in `dtype`."""
    group = q.shape[0] // k.shape[0]
    q_scale = _scale(spec, one, "q_descale", tensors, k.shape[0], 1)
    if q_scale is not None:
        q_scale = q_scale.repeat_interleave(group, 0)
    out = []
    pairs = ((q, q_scale), *((x, _scale(spec, one, n, tensors, k.shape[0], one.skv))
             for x, n in ((k, "k_descale"), (v, "v_descale"))))  # fmt: skip
    for x, scale in pairs:
        if scale is None:
            out.append(x.to(dtype))
        else:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            out.append((x.to(wide) * scale.to(wide)).to(dtype))
    return out[0], out[1], out[2]


def _scale(
    spec: AttentionSpec, one: Shape, name: str, tensors: Mapping[str, Any], kv_heads: int, rows: int
) -> Tensor | None:
    """Descale [Hkv, 1 or rows, 1] of one sequence; None where the call has none."""
    value: Tensor | None = tensors.get(name)
    if value is None:
        return None
    if value.numel() == 1:
        return value.reshape(1, 1, 1).expand(kv_heads, 1, 1)
    value = value[one.b if value.shape[0] > 1 else 0]
    value = value.expand(kv_heads, *value.shape[1:])
    if value.dim() == 1:
        return value[:, None, None]
    count = value.shape[-1]
    block = spec.page_size or block_size(one.longest, count)
    return value[:, torch.arange(rows, device=value.device) // block, None]


def block_size(skv: int, count: int) -> int:
    """The smallest power of two that covers `skv` keys with `count` blocks."""
    block = 1
    while block * count < skv:
        block *= 2
    return block


@dataclass(frozen=True)
class Rounding:
    """The plain per-tensor quantised computation: q, k, v and the weights are each rounded with one scale.

    dtype: what they are rounded to. Gradients pass straight through.
    """

    dtype: torch.dtype

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors, rounded and scaled back."""
        return self._round(q), self._round(k), self._round(v)

    def product(self, weights: Tensor, v: Tensor, group: int) -> Tensor:
        """Weights, rounded at a scale of one over the largest, times v. weights: [Hq, n, Skv]; v: [Hkv, Skv, Dv]."""
        rounded = grouped(self._round(weights).to(v.dtype), group)
        return (rounded @ v[:, None]).flatten(0, 1)

    def _round(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        value = x.detach().float()
        scale = (value.abs().amax() / largest(self.dtype)).clamp_min(1e-30)
        scaled = value / scale
        scaled = scaled.round().clamp(-127, 127) if self.dtype == torch.int8 else scaled
        back = (scaled.to(self.dtype).float() * scale).to(x.dtype)
        return x + (back - x.detach())


def grouped(x: Tensor, group: int) -> Tensor:
    """[Hq, ...] as [Hkv, group, ...]."""
    return x.reshape(-1, group, *x.shape[1:]) if x.numel() else x.reshape(x.shape[0] // group, group, *x.shape[1:])


def stored(dtype: torch.dtype) -> bool:
    """Is this a dtype that needs a descale?"""
    return dtype in (*FLOAT8, torch.int8)
