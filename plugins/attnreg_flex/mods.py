"""FlexAttention's mask_mod and score_mod, derived from the spec: the same `allows` that every backend reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks, sparsity

__all__ = ["Named", "changes_scores", "coords", "mask_mod", "restricts", "score_mod"]

Named = Mapping[str, Tensor]
"""Call tensors by name, and "shift" [B or 1]: the position of row 0 of each batch. A BigBird pattern adds "drawn"
[Hq, columns, random_blocks], its random block columns or -1, and "columns" [1], how many block columns there are."""


def restricts(spec: AttentionSpec, named: Mapping[str, Any]) -> bool:
    """Is there a pair that may not attend?"""
    open_mask = isinstance(spec.mask, masks.Full) and isinstance(spec.sparsity, sparsity.Dense)
    return not open_mask or named.get("seqused_k") is not None


def changes_scores(spec: AttentionSpec) -> bool:
    """Does anything happen to a score before the softmax?"""
    return bool(spec.softcap or spec.bias or spec.alibi)


def coords(named: Named, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> masks.Coords:
    """The pair that FlexAttention asks about, with the position of its query."""
    shift = named["shift"]
    return masks.Coords(b=b, h=h, i=i, p=i + (shift[b] if shift.shape[0] > 1 else shift[0]), j=j, tensors=named)


def mask_mod(spec: AttentionSpec, named: Named, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """True where query row i may attend key j: mask AND sparsity AND the keys in use."""
    at = coords(named, b, h, i, j)
    out = spec.mask.allows(at)
    if isinstance(spec.sparsity, sparsity.BigBird):
        out = out & _drawn_blocks(spec.sparsity, named, at)
    elif not isinstance(spec.sparsity, sparsity.Dense):
        out = out & spec.sparsity.allows(at, 0)  # the other patterns do not depend on the number of keys
    if "seqused_k" in named:
        out = out & (j < named["seqused_k"][b])
    return out


def _drawn_blocks(pattern: sparsity.BigBird, named: Named, at: masks.Coords) -> Tensor:
    """BigBird's `allows` with its random blocks read from a table: a kernel cannot draw them."""
    columns, drawn = named["columns"][0], named["drawn"]
    r = torch.div(at.p, pattern.block, rounding_mode="floor")
    c = torch.div(at.j, pattern.block, rounding_mode="floor")
    inside = (r >= 0) & (r < columns)
    row = torch.where(inside, r, 0)
    out = pattern.structural(r, c, columns)
    for n in range(pattern.random_blocks):
        out = out | (inside & (drawn[at.h, row, n] == c))
    return out


def score_mod(spec: AttentionSpec, named: Named, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The scaled score after softcap, bias and ALiBi, in this order."""
    if spec.softcap:
        score = torch.tanh(score / spec.softcap) * spec.softcap
    if spec.bias:
        bias = _at(named["bias"], b, h, i, j).to(score.dtype)
        # Not a plain sum: where a product overflowed, inf - inf would be a NaN.
        score = torch.where(bias == -torch.inf, bias, score + bias)
    if spec.alibi:
        slopes = named["alibi_slopes"]
        slope = slopes[h] if slopes.dim() == 1 else slopes[b if slopes.shape[0] > 1 else 0, h]
        at = coords(named, b, h, i, j)
        score = score - slope * (at.p - at.j).abs()
    return score


def _at(table: Tensor, *index: Tensor) -> Tensor:
    """table[b, h, i, j] of a tensor that broadcasts to those four dimensions."""
    where = [0 if size == 1 else at for size, at in zip(table.shape, index[4 - table.dim() :], strict=True)]
    return table[tuple(where)]
