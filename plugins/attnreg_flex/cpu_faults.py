"""What torch's compiled FlexAttention gets wrong on a CPU, and what keeps its results right all the same.

1. Head dimensions 8 and 16. In code for 256-bit vectors (AVX2) the product of queries and keys takes the last
   keys % 16 == 8 keys of a sequence for 16: it reads keys that are not there and writes behind the row of scores.
   The code came with torch 2.7 (pull request 147069) and stands in 2.13. Two more columns of zeros change no product,
   and with a head dimension that 8 does not divide that path is never taken: `widened`.
2. NaN. The largest score of a row is found by comparisons that a NaN always loses, so that a row of which no score is
   a number counts as one that attends nothing. Infinite scores are lost like that, too. Seen in 2.13. Such inputs are
   found before the call (`ordinary`) and computed by `exact`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["WRONG_DIMS", "exact", "ordinary", "widened"]

WRONG_DIMS = (8, 16)
"""Head dimensions of q and k whose generated product is wrong for some numbers of keys."""

LARGE = 1e30
"""Values below this, weighted and summed over all keys, stay finite in float32."""

PAIRS = 1 << 22
"""Scores that `exact` holds at a time."""

Score = Callable[..., Tensor]


def widened(x: Tensor) -> Tensor:
    """x [..., D] with two columns of zeros where its D is one of WRONG_DIMS."""
    return torch.nn.functional.pad(x, (0, 2)) if x.shape[-1] in WRONG_DIMS else x


def ordinary(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Are all values numbers, and none so large that a score or a sum of values might overflow float32?"""
    most_q, most_k, most_v = (_most(x) for x in (q, k, v))
    product = most_q * most_k * q.shape[-1] * max(abs(scale), 1.0)
    return product < LARGE and most_v < LARGE  # False for NaN, too


def _most(x: Tensor) -> float:
    low, high = torch.aminmax(x)
    most = max(abs(float(low)), abs(float(high)))
    return most if float(low) == float(low) else math.nan


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, score_mod: Score, mask_mod: Score | None) -> Tensor:
    """The attention of any values in float64, in chunks of rows; q [B, Hq, Sq, D], k and v [B, Hkv, Skv, ...].

    A NaN or an infinity that a row attends reaches the row. A key that no row of a chunk attends leaves no trace.
    """
    batch, heads, sq, _ = q.shape
    kv_heads, skv = k.shape[1], k.shape[2]
    keys, values = k.double(), v.double()
    b, h, j = (
        torch.arange(n, device=q.device).view(shape)
        for n, shape in ((batch, (-1, 1, 1, 1)), (heads, (1, -1, 1, 1)), (skv, (1, 1, 1, -1)))
    )
    outs = []
    step = max(1, PAIRS // max(1, batch * heads * skv))
    for first in range(0, sq, step):
        rows = q[:, :, first : first + step].double()
        i = torch.arange(first, first + rows.shape[2], device=q.device).view(1, 1, -1, 1)
        shape = (batch, heads, rows.shape[2], skv)
        allowed = torch.ones((), dtype=torch.bool, device=q.device) if mask_mod is None else mask_mod(b, h, i, j)
        allowed = allowed.expand(shape)
        seen = allowed.reshape(batch, kv_heads, -1, skv).any(2).unsqueeze(-1)
        some_keys, some_values = (torch.where(seen, x, 0.0) for x in (keys, values))
        packed = rows.reshape(batch, kv_heads, -1, rows.shape[3])
        scores = (packed @ some_keys.mT).reshape(shape) * scale
        scores = torch.where(allowed, score_mod(scores, b, h, i, j), -math.inf)
        top = scores.amax(-1, keepdim=True)
        weights = torch.where(allowed, torch.exp(scores - torch.where(top == -math.inf, 0.0, top)), 0.0)
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        outs.append((weights.reshape(batch, kv_heads, -1, skv) @ some_values).reshape(*shape[:3], -1))
    return torch.cat(outs, 2)
