"""A bounded cache of block layouts, for the hot path of kernels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks.build import Lengths, block_layout
from attnreg.blocks.layout import BlockLayout

__all__ = ["cached_block_layout", "clear_cache"]

ENTRIES = 128
BYTES = 256 << 20
READ = 64 << 20

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
    offset: Lengths = None,
    q_len: Lengths = None,
    kv_len: Lengths = None,
    pattern_keys: Lengths = None,
    tensors: Mapping[str, Any] | None = None,
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """`block_layout`, remembered. Call tensors count by what they hold, so a changed tensor is never missed.

    Python code whose author does not say what to watch (`Custom`) and tensors above 64 MiB are built anew on each call.
    Keeps the latest 128 layouts and at most 256 MiB.
    """
    sizes = (sq, skv, block_q, block_kv)

    def build() -> BlockLayout:
        return block_layout(
            mask, sparsity, *sizes, heads=heads, batch=batch, offset=offset, q_len=q_len, kv_len=kv_len,
            pattern_keys=pattern_keys, tensors=tensors, packed=packed, device=device,
        )  # fmt: skip

    names = set(mask.tensors()) | (sparsity.tensors() if sparsity is not None else set())
    read = {name: x for name, x in (tensors or {}).items() if name in names and isinstance(x, Tensor)}
    if any(x.numel() * x.element_size() > READ for x in read.values()):
        return build()
    state = m.state(mask)
    if state is None:
        return build()
    held = tuple(_held(x) for x in (offset, q_len, kv_len, pattern_keys, *(read[name] for name in sorted(read))))
    key = (mask, state, sparsity, sizes, heads, batch, held, tuple(sorted(read)), packed, str(device))
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


def _held(value: Lengths) -> Any:
    """Something hashable that is equal for equal content."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().numpy()
        return data.shape, data.dtype.str, hashlib.blake2b(data.tobytes(), digest_size=16).digest()
    return value if value is None or isinstance(value, int) else tuple(value)


def clear_cache() -> None:
    """Forget every layout."""
    with _lock:
        _kept.clear()
