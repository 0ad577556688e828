"""Masks and patterns that are no intervals: the block layout of a call, as params of the kernels."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, blocks, masks, sparsity
from attnreg_cpu.arguments import longest
from attnreg_cpu.conjunction import read_conjunction

KEPT = 16


def needs_layout(problem: Problem) -> bool:
    """Is the mask or the pattern more than a conjunction of intervals?"""
    return read_conjunction(problem.spec.mask) is None or not isinstance(problem.spec.sparsity, sparsity.Dense)


class Layouts:
    """Block layouts of one prepared problem. The latest that no call tensor can change are kept by their sizes."""

    def __init__(self, problem: Problem, block_q: int, block_kv: int) -> None:
        self._spec = problem.spec
        self._heads = problem.q_heads
        self._blocks = (block_q, block_kv)
        self._kept: collections.OrderedDict[Any, blocks.BlockLayout] = collections.OrderedDict()

    def params(
        self, q: Tensor, batch: int, skv: int, tensors: Mapping[str, Any]
    ) -> tuple[dict[str, int], blocks.BlockLayout]:
        """Params fields of the call's layout, and the layout, which must outlive the call."""
        layout = self._layout(q, batch, skv, tensors)
        fields = {
            "layout_row_ptr": layout.row_ptr.data_ptr(),
            "layout_row_split": layout.row_split.data_ptr(),
            "layout_columns": layout.col_idx.data_ptr(),
            "layout_tiles": layout.tile_idx.data_ptr(),
            "layout_bits": layout.bits.data_ptr(),
            "layout_batches": layout.n_batch,
            "layout_heads": layout.n_heads,
            "layout_lines": layout.n_q,
            "layout_block_q": layout.block_q,
            "layout_block_kv": layout.block_kv,
        }
        return fields, layout

    def _layout(self, q: Tensor, batch: int, skv: int, tensors: Mapping[str, Any]) -> blocks.BlockLayout:
        spec = self._spec
        packed = spec.layout == "thd"
        sq = 0 if packed else (q.shape[2] if spec.layout == "bhsd" else q.shape[1])
        state = masks.state(spec.mask)
        if not tensors and state is not None:
            key = (batch, sq, skv, state)
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = self._build(sq, skv, batch, tensors, {})
                while len(self._kept) > KEPT:  # a growing cache has a layout a step
                    with contextlib.suppress(KeyError):  # another thread was there first
                        self._kept.popitem(last=False)
            return kept
        sizes: dict[str, Any] = {}
        used: Tensor | int = skv
        rows: Tensor | int = sq
        if packed:
            lengths: Tensor = tensors["cu_seqlens_q"].diff().long()
            rows, sq = lengths, longest(tensors, "q")
            sizes["q_len"] = rows
            if spec.page_size is None:
                lengths = tensors["cu_seqlens_k"].diff().long()
                used, skv = lengths, longest(tensors, "k")
                # A pattern of blocks counts the columns of its own sequence, not of the longest.
                sizes["pattern_keys"] = lengths
        if tensors.get("seqused_k") is not None:
            used = torch.clamp(tensors["seqused_k"].long(), 0, skv)
        if isinstance(used, Tensor):
            sizes["kv_len"] = used
        if spec.align == "offset":
            sizes["offset"] = tensors["query_offset"]
        elif spec.align == "bottom_right" and tensors.get("kv_lengths") is not None:
            # Bottom right counts from the keys that padding leaves.
            sizes["offset"] = torch.clamp(tensors["kv_lengths"].long(), min=0).clamp(max=used) - rows
        return self._build(sq, skv, batch, tensors, sizes)

    def _build(
        self, sq: int, skv: int, batch: int, tensors: Mapping[str, Any], sizes: Mapping[str, Any]
    ) -> blocks.BlockLayout:
        spec = self._spec
        if spec.align == "top_left":
            sizes = {**sizes, "offset": 0}
        return blocks.cached_block_layout(
            spec.mask,
            spec.sparsity,
            sq,
            skv,
            *self._blocks,
            heads=self._heads,
            batch=batch,
            tensors=tensors,
            packed=spec.layout == "thd",
            **sizes,
        )
