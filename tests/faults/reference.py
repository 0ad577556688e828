"""Attention in float64 by torch's own operations, from a dense boolean table: what the tests of faults compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attend", "close"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of q [B, Hq, Sq, D] on k, v [B, Hkv, Skv, D]; keep, bias: broadcast to [B, Hq, Sq, Skv]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if bias is None else s + bias.double()
    if keep is not None:
        s = s.masked_fill(~keep, -math.inf)
    lse = torch.logsumexp(s, -1)
    weights = torch.where(lse.isneginf().unsqueeze(-1), 0.0, torch.softmax(s, -1))
    return torch.nan_to_num(weights) @ v, lse


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to rounding in float32; NaN never passes."""
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)
