"""Read keys and values from a paged cache, and look up the scales of quantised ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, block_of, masks
from attnreg_eager.frame import Frame

__all__ = ["Scales", "gather", "scatter"]


def gather(pages: Tensor, table: Tensor) -> Tensor:
    """Keys or values [B, Hkv, P * page_size, D] of the pages [pages, Hkv, page_size, D] that table [B, P] names.

    Entries below 0 are unused and read page 0: such keys are masked.
    """
    _, kv_heads, size, head_dim = pages.shape
    batch, count = table.shape
    at = table.to(torch.int64).clamp(min=0)
    # Bytes are moved as bytes: float8 lacks index kernels on some devices, and has no gradient to lose.
    narrow = pages.dtype.itemsize == 1
    raw = pages.view(torch.uint8) if narrow else pages
    # Where there is no page the sum is 0, and what carries a gradient of 0 back to the pages.
    rows = (
        raw.index_select(0, at.flatten()).view(*at.shape, *raw.shape[1:])
        if raw.shape[0]
        else raw.sum().to(raw.dtype).expand((batch, count, *raw.shape[1:]))
    )
    out = rows.transpose(1, 2).reshape(batch, kv_heads, count * size, head_dim)
    return out.view(pages.dtype) if narrow else out


def scatter(pages: Tensor, kv: slice, table: Tensor, x: Tensor) -> None:
    """Add x [B, n, P * page_size, D] to heads `kv` of the pages, in place: what `gather` does, backwards."""
    if not pages.shape[0]:
        return
    batch, count = table.shape
    rows = x.reshape(batch, x.shape[1], count, pages.shape[2], x.shape[3]).transpose(1, 2).flatten(0, 1)
    pages[:, kv].index_add_(0, table.to(torch.int64).clamp(min=0).flatten(), rows)


@dataclass(frozen=True)
class Scales:
    """Descales of quantised q, k and v, looked up for the rows and keys of a tile.

    kv_block: keys a scale of k and v under scaling="block".
    """

    tensors: Mapping[str, Any]
    scaling: str
    kv_block: int = 1

    @staticmethod
    def of(spec: AttentionSpec, tensors: Mapping[str, Any], skv: int) -> Scales:
        """`skv`: keys of the longest sequence, which the blocks of scaling="block" cut."""
        scale = tensors.get("k_descale")
        block = 1
        if scale is not None and spec.dtype.scaling == "block":
            block = spec.page_size or block_of(skv, scale.shape[-1])
        return Scales(tensors, spec.dtype.scaling, block)

    def rows(self, at: Frame, dtype: torch.dtype) -> Tensor | None:
        """Factors of q that broadcast to [B, Hq, Sq, 1]; None where q is not quantised."""
        scale: Tensor | None = self.tensors.get("q_descale")
        if scale is None:
            return None
        if self.scaling == "tensor":
            return scale.to(dtype).reshape(1, 1, 1, 1)
        return masks.take(scale.to(dtype), at.bq, at.kv_head)

    def keys(self, name: str, at: Frame, dtype: torch.dtype) -> Tensor | None:
        """Factors of k or v ("k_descale", "v_descale") that broadcast to [B, Hq, 1, Skv]; None where there are none."""
        scale: Tensor | None = self.tensors.get(name)
        if scale is None:
            return None
        if self.scaling == "tensor":
            return scale.to(dtype).reshape(1, 1, 1, 1)
        if self.scaling == "head":
            return masks.take(scale.to(dtype), at.bk, at.kv_head)
        return masks.take(scale.to(dtype), at.bk, at.kv_head, at.j // self.kv_block)
