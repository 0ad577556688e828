"""From the tensors of a call to plain q, k, v [B, H, S, D]: layout, pages, stored precision, score weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, block_of, scores

__all__ = ["dequantised", "heads_first", "paged", "weighted", "with_sink_key"]


def heads_first(spec: AttentionSpec, x: Tensor) -> Tensor:
    """[B, H, S, D] from either padded layout; a view, and its own inverse."""
    return x.transpose(1, 2) if spec.layout == "bshd" else x


def paged(cache: Tensor, block_table: Tensor) -> Tensor:
    """[B, Hkv, n * page_size, D] gathered from [pages, Hkv, page_size, D] by block_table [B, n]; unused is -1."""
    batch, count = block_table.shape
    pages, heads, size, dim = cache.shape
    if isinstance(pages, int) and pages == 0:
        return cache.new_zeros(batch, heads, count * size, dim)
    rows = cache[block_table.long().clamp(min=0)]
    return rows.transpose(1, 2).reshape(batch, heads, count * size, dim)


def dequantised(
    spec: AttentionSpec, x: Tensor, descale: Tensor | None, first: int, batch: int, bound: int, dtype: torch.dtype
) -> Tensor:
    """x [B, H, S, D] in `dtype` times its descale (see `attnreg.Precision`); q has Hq heads and its KV heads' scale.

    `first` and `batch` say which rows of a descale [B, ..] are meant; `bound` is the Skv that blocks are cut from.
    """
    x = x.to(dtype)
    if descale is None:
        return x
    scale = descale.to(dtype)
    if spec.dtype.scaling == "tensor":
        return x * scale.reshape(())
    if scale.shape[0] > 1:
        scale = scale[first : first + batch]
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
    if scale.dim() == 2:
        return x * scale[..., None, None]
    block = spec.page_size or block_of(bound, scale.shape[-1])
    at = torch.arange(x.shape[2], device=x.device) // block
    return x * scale[..., at].unsqueeze(-1)


def weighted(spec: AttentionSpec, q: Tensor, tensors: Mapping[str, Any]) -> Tensor:
    """q W for Luong's general score, so that a plain dot with k follows; q itself for the other scores."""
    if not isinstance(spec.score, scores.General):
        return q
    weight = tensors["score_weight"]
    wide = torch.promote_types(q.dtype, weight.dtype)
    out: Tensor = q.to(wide) @ weight.to(wide)
    return out.to(q.dtype)


def with_sink_key(k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and the additive mask with one more key: of zeros, so that its score is the sink and its value nothing.

    k, v [B, Hkv, Skv, ..], mask [B or 1, Hq or 1, Sq, Skv], sinks [Hq]; the mask comes back with all heads.
    """
    more_k, more_v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v))
    column = sinks.to(mask.dtype).view(1, -1, 1, 1).expand(mask.shape[0], -1, mask.shape[2], 1)
    return more_k, more_v, torch.cat([mask.expand(-1, column.shape[1], -1, -1), column], -1)
