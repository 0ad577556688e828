"""The block layout of one call: a spec's mask AND sparsity, placed as its `align`, layout and lengths say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg.blocks.cache import cached_block_layout
from attnreg.blocks.layout import BlockLayout
from attnreg.spec import AttentionSpec

__all__ = ["call_layout"]


def call_layout(
    spec: AttentionSpec,
    sq: int,
    skv: int,
    block_q: int,
    block_kv: int,
    *,
    batch: int,
    heads: int,
    tensors: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The (cached) layout that a kernel reads for a call that the core has validated.

    sq, skv: rows and keys of a sequence; under thd those of the longest, batch being the number of sequences; of a
    paged cache block_table's width times page_size. heads: query heads. tensors: the call's. Under thd, and where
    `seqused_k` is given, q_len and kv_len of the layout say which rows and keys of each sequence exist. Reads
    lengths on the host, so a CUDA call synchronises.
    """
    given = tensors or {}
    packed, used = spec.layout == "thd", given.get("seqused_k")
    q_len = given["cu_seqlens_q"].diff() if packed else None
    kv_len: Tensor | None = used
    pattern_keys: Tensor | None = None
    if packed and spec.page_size is None:
        kv_len = pattern_keys = given["cu_seqlens_k"].diff()
    offset: Tensor | int | None = 0
    if spec.align == "offset":
        offset = given["query_offset"]
    elif spec.align == "bottom_right":
        lengths = given.get("kv_lengths")
        offset = None  # kv_len - q_len
        if lengths is not None:
            there = lengths.to(torch.int64) if used is None else torch.minimum(lengths.to(torch.int64), used.long())
            offset = there - (sq if q_len is None else q_len)
    return cached_block_layout(
        spec.mask, spec.sparsity, sq, skv, block_q, block_kv, heads=heads, batch=batch, offset=offset, q_len=q_len,
        kv_len=kv_len, pattern_keys=pattern_keys, tensors=given, packed=packed, device=device,
    )  # fmt: skip
