"""A call's named tensors as the kernels take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks

from .documents import spans

Tensors = dict[str, Tensor | None]


def call_tensors(spec: AttentionSpec, band: masks.Band, q: Tensor, tensors: Mapping[str, Any]) -> Tensors:
    """The call's named tensors as the kernels take them: documents as spans, one key length, a seed."""
    names = ("bias", "alibi_slopes", "sinks", "query_offset", "cu_seqlens_q", "cu_seqlens_k", "block_table")
    out: Tensors = {name: tensors.get(name) for name in names}
    if band.prefix_tensor:
        out["prefix_lengths"] = tensors["prefix_lengths"]
    document_ids = tensors.get("document_ids")
    if document_ids is not None and spec.layout != "thd":
        out["document_first"], out["document_last"] = spans(document_ids)
    lengths = [tensors[name] for name in ("kv_lengths", "seqused_k") if tensors.get(name) is not None]
    if lengths:
        out["kv_lengths"] = lengths[0] if len(lengths) == 1 else torch.minimum(*lengths)
    if spec.dropout_p > 0:
        out["seed"] = drawn(q, tensors)
    return out


def drawn(q: Tensor, tensors: Mapping[str, Any]) -> Tensor:
    """The seed of dropout: that which attnreg drew for both passes, or a new one.

    Drawn on the device, so a CUDA graph replays with fresh numbers and nothing waits.
    """
    seed: Tensor | None = tensors.get("seed")
    if seed is not None:
        return seed
    return torch.randint(2**62, (1,), dtype=torch.int64, device=q.device, generator=tensors.get("generator"))
