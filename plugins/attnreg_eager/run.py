"""Run a call of any layout: to bhsd, over its frame, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec
from attnreg_eager.build import compute_dtype, computed, full_rank, keep_of, make_call, traced
from attnreg_eager.chunks import plan
from attnreg_eager.frame import padded_frame
from attnreg_eager.packed import all_at_once, one_by_one

__all__ = ["attend"]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def attend(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """The output in q's layout and dtype (bfloat16 where q is float8), or (out, lse) where the spec says so."""
    if torch.is_autocast_enabled(q.device.type):
        # Autocast would round the products of the reference to half precision.
        with torch.autocast(q.device.type, enabled=False):
            return attend(spec, q, k, v, tensors)
    tensors = computed(tensors, compute_dtype(q))
    if spec.layout == "thd":
        out, lse = (all_at_once if traced(q, k, v) else one_by_one)(spec, q, k, v, tensors)
    elif spec.layout == "bshd":
        if spec.page_size is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        out, lse = _bhsd(spec, q.transpose(1, 2), k, v, tensors)
        out = out.transpose(1, 2)
    else:
        out, lse = _bhsd(spec, q, k, v, tensors)
    out = out.to(torch.bfloat16 if q.dtype in FLOAT8 else q.dtype)
    return (out, lse.float()) if spec.return_lse else out


def _bhsd(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and lse of q in layout bhsd, k and v the same or in pages."""
    batch, q_heads, sq, _ = q.shape
    table = tensors.get("block_table")
    skv = k.shape[2] if table is None else table.shape[1] * k.shape[2]
    tracing = traced(q, k, v)
    call = make_call(
        padded_frame(
            spec, tensors, q.device, batch=batch, q_heads=q_heads, group=q_heads // k.shape[1], sq=sq, skv=skv
        ),
        q,
        k,
        v,
        bias=full_rank(tensors.get("bias")),
        longest=skv,
        keep=keep_of(spec, tensors, q.device, tracing),
        table=table,
    )
    return call.whole() if tracing else call.run(plan(call))
