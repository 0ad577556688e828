"""From a call to what FlexAttention reads: positions, block tables, plain tensors in [B, H, S, D]."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attnreg import AttentionSpec, blocks, masks, sparsity
from attnreg_flex import mods
from attnreg_flex.compiled import Blocks, sized

__all__ = ["Tables", "heads_first", "paged", "shift"]

# Call tensors that mask_mod and score_mod read; lengths become int64.
LENGTHS = ("prefix_lengths", "kv_lengths", "seqused_k")
READ = ("attn_mask", "global_mask", "document_ids", "block_mask", "bias", "alibi_slopes")


def heads_first(spec: AttentionSpec, x: Tensor) -> Tensor:
    """[B, H, S, D] from either padded layout; a view, and its own inverse."""
    return x.transpose(1, 2) if spec.layout == "bshd" else x


def paged(cache: Tensor, block_table: Tensor) -> Tensor:
    """[B, Hkv, n * page_size, D] gathered from [pages, Hkv, page_size, D] by block_table [B, n]; unused is -1."""
    batch, count = block_table.shape
    pages, heads, size, dim = cache.shape
    if pages == 0:
        return cache.new_zeros(batch, heads, count * size, dim)
    rows = cache[block_table.long().clamp(min=0)]
    return rows.transpose(1, 2).reshape(batch, heads, count * size, dim)


def shift(spec: AttentionSpec, tensors: Mapping[str, Any], sq: int, skv: int, device: torch.device) -> Tensor:
    """Position of row 0 on the key time line, int64 [B], or [1] where it is the same in every batch."""
    if spec.align == "offset":
        return _long(tensors["query_offset"])
    if spec.align == "top_left":
        return torch.zeros(1, dtype=torch.int64, device=device)
    lengths = [_long(x) for x in (tensors.get("kv_lengths"), tensors.get("seqused_k")) if x is not None]
    return functools.reduce(torch.minimum, lengths, torch.tensor([skv], device=device)) - sq  # keys that all leave


def _long(x: Tensor) -> Tensor:
    return x.to(torch.int64)


def fixed(x: Tensor, *dims: int) -> Tensor:
    """x with those dimensions filled up with zeros to the next power of two: one size for a whole bucket.

    Sizes of what modifiers read must be constants of the generated code: torch 2.13 mixes up the names of size
    variables in CPU modifiers (it replaces "ks1" in "ks15" too). Nothing reads what is filled in.
    """
    grow = [0] * x.dim()
    for dim in dims:
        grow[dim] = _power(x.shape[dim]) - x.shape[dim]
    if not any(grow):
        return x
    return torch.nn.functional.pad(x, [n for extra in reversed(grow) for n in (0, extra)])


def _power(n: int) -> int:
    return n if n <= 1 else 1 << (n - 1).bit_length()


def _read(spec: AttentionSpec, name: str, x: Tensor) -> Tensor:
    """A call tensor as modifiers read it."""
    if name in ("attn_mask", "bias"):
        x = x.reshape(1) if x.dim() == 0 else x  # one value for all, which a modifier cannot index
        return fixed(x, *(dim for dim in range(x.dim()) if dim - x.dim() != -3))
    if name == "block_mask":
        return fixed(x, 0, 2, 3)
    if name == "alibi_slopes":
        return fixed(x, 0) if x.dim() == 2 else x
    if name == "document_ids" and spec.align != "bottom_right":
        # A query may stand past the last key, where it has no document; numbered from 1, none equals a filled-in 0.
        x = torch.unique(x, return_inverse=True)[1] + 1
    return fixed(x, 0, 1)


class Tables:
    """Block tables and named tensors of calls of one spec; kept for the last sizes where sizes alone decide."""

    KEPT = 16

    def __init__(self, spec: AttentionSpec, block: tuple[int, int], heads: int) -> None:
        self.spec = spec
        self.block = block
        self.heads = heads
        self.by_size = not (spec.mask.tensors() or spec.sparsity.tensors() or spec.align == "offset")
        self._sizes: OrderedDict[Any, tuple[Blocks | None, dict[str, Tensor]]] = OrderedDict()
        self._padded: WeakKeyDictionary[blocks.BlockLayout, Blocks] = WeakKeyDictionary()
        self._lock = Lock()

    def of(self, batch: int, sq: int, skv: int, device: torch.device, tensors: Mapping[str, Any]) -> Any:
        """(blocks or None, named tensors) of a call; None where every pair attends."""
        state = masks.state(self.spec.mask)
        if self.by_size and tensors.get("seqused_k") is None and state is not None:
            key = (batch, sq, skv, device, state)
            with self._lock:
                found = self._sizes.get(key)
            if found is None:
                found = self._made(batch, sq, skv, device, tensors)
                with self._lock:
                    self._sizes[key] = found
                    while len(self._sizes) > self.KEPT:
                        self._sizes.popitem(last=False)
            table, named = found
        else:
            table, named = self._made(batch, sq, skv, device, tensors)
        read = {name: _read(self.spec, name, tensors[name]) for name in READ if tensors.get(name) is not None}
        return table, {**named, **read}

    def _made(
        self, batch: int, sq: int, skv: int, device: torch.device, tensors: Mapping[str, Any]
    ) -> tuple[Blocks | None, dict[str, Tensor]]:
        spec = self.spec
        named = {name: fixed(_long(tensors[name]), 0) for name in LENGTHS if tensors.get(name) is not None}
        first = shift(spec, tensors, sq, skv, device)
        named["shift"] = fixed(first, 0)
        if not mods.restricts(spec, tensors):
            return None, named
        if isinstance(spec.sparsity, sparsity.BigBird):
            columns = -(-skv // spec.sparsity.block)
            named["columns"] = torch.tensor([columns], device=device)
            named["drawn"] = fixed(torch.from_numpy(spec.sparsity.random_columns(self.heads, columns)).to(device), 1)
        mask = spec.mask
        used = tensors.get("seqused_k")
        held = dict(tensors)
        if used is not None and "kv_lengths" not in mask.tensors():
            mask, held["kv_lengths"] = mask & masks.Padding(), used
        elif used is not None:
            counts = named["seqused_k"]
            mask = mask & masks.Custom(lambda b, h, p, j: (j < counts[b]) & (p == p) & (h == h))
        layout = blocks.cached_block_layout(
            mask, spec.sparsity, sq, skv, *self.block, heads=self.heads, batch=batch,
            offset=first if first.numel() > 1 else int(first),
            tensors=held, device=device,
        )  # fmt: skip
        return self._tables(layout), named

    def _tables(self, layout: blocks.BlockLayout) -> Blocks:
        found = self._padded.get(layout)
        if found is None:
            # torch checks that a table is as wide as all key blocks, though only live ones are read.
            partial, columns = layout.padded(partial=True, width=layout.n_kv)
            full, full_columns = layout.padded(partial=False, width=layout.n_kv)
            found = (
                sized(partial, 0, 1, 2),
                sized(columns, 0, 1, 2, 3),
                sized(full, 0, 1, 2),
                sized(full_columns, 0, 1, 2, 3),
            )
            self._padded[layout] = found
        return found
