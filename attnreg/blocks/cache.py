"""A bounded cache of block layouts, for the hot path of kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch

from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks.build import Lengths, block_layout
from attnreg.blocks.layout import BlockLayout

__all__ = ["cached_block_layout", "clear_cache"]

ENTRIES = 128
BYTES = 256 << 20

_kept: OrderedDict[Any, BlockLayout] = OrderedDict()
_lock = Lock()


def cached_block_layout(
    mask: m.Mask,
    sparsity: s.Sparsity | None,
    sq: int,
    skv: int,
    block_q: int,
    block_kv: int,
    *,
    heads: int = 1,
    batch: int = 1,
    offset: int | tuple[int, ...] | None = None,
    q_len: Lengths = None,
    kv_len: Lengths = None,
    tensors: Mapping[str, Any] | None = None,
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """`block_layout`, remembered where mask and sparsity are static.

    A pattern that reads call tensors, lengths given as a tensor, or Python code (`Custom`, whose closure may change)
    is built anew on each call. Keeps the latest 128 layouts and at most 256 MiB.
    """
    sizes = (sq, skv, block_q, block_kv)

    def build() -> BlockLayout:
        return block_layout(
            mask, sparsity, *sizes, heads=heads, batch=batch, offset=offset, q_len=q_len, kv_len=kv_len,
            tensors=tensors, packed=packed, device=device,
        )  # fmt: skip

    needs = mask.tensors() - ({"document_ids"} if packed else set())
    if needs or (sparsity is not None and sparsity.tensors()) or any(isinstance(x, m.Custom) for x in m.walk(mask)):
        return build()
    lengths = tuple(tuple(x) if isinstance(x, list) else x for x in (offset, q_len, kv_len))
    if any(isinstance(x, torch.Tensor) for x in lengths):
        return build()
    key = (mask, sparsity, sizes, heads, batch, lengths, packed, str(device))
    with _lock:
        layout = _kept.get(key)
        if layout is not None:
            _kept.move_to_end(key)
            return layout
    layout = build()
    with _lock:
        _kept[key] = layout
        total = sum(x.nbytes for x in _kept.values())
        while len(_kept) > ENTRIES or (total > BYTES and len(_kept) > 1):
            total -= _kept.popitem(last=False)[1].nbytes
    return layout


def clear_cache() -> None:
    """Forget every layout."""
    with _lock:
        _kept.clear()
