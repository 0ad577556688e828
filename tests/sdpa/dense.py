"""Attention straight from its definition, in float64 and dense, for tests to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, Problem
from attnreg.validate import check

Allowed = Callable[[int, int, int, int, int], bool]
"""allowed(b, h, i, p, j): may the query of row i at position p attend key j?"""


def table(allowed: Allowed, batch: int, heads: int, sq: int, skv: int, shift: list[int]) -> Tensor:
    """Bool [B, H, Sq, Skv], pair by pair; the query at row i of batch b stands at i + shift[b]."""
    rows = [
        [[[allowed(b, h, i, i + shift[b], j) for j in range(skv)] for i in range(sq)] for h in range(heads)]
        for b in range(batch)
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(batch, heads, sq, skv)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    added: Tensor | None = None,
    weight: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse in float64 for q [B, Hq, Sq, D]; live bool and added (bias) broadcast to [B, Hq, Sq, Skv]."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if weight is not None:
        q = q @ weight.double()
        scale = 1.0
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added.double()
    if live is not None:
        scores = scores.masked_fill(~live, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    any_key = (scores > -math.inf).any(-1, keepdim=True)
    p = torch.where(any_key, scores, 0.0).softmax(-1)
    p = torch.where(scores > -math.inf, p, 0.0)
    if sinks is not None:
        p = p[..., :-1]
    lse = torch.where(any_key.squeeze(-1), torch.where(any_key, scores, 0.0).logsumexp(-1), -math.inf)
    return p @ v, lse


def problem_of(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, traced: bool = False, **tensors: Any) -> Problem:
    """The checked problem of a call."""
    return Problem.of(spec, check(spec, q, k, v, tensors), q, k, v, tensors, traced=traced)
