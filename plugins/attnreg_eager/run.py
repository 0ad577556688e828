"""Run a call of any layout: to bhsd, over its frame, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec
from attnreg_eager.build import compute, keep_of, operands, traced
from attnreg_eager.chunks import Operands
from attnreg_eager.frame import padded_frame
from attnreg_eager.packed import all_at_once, one_by_one

__all__ = ["attend", "exact"]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def attend(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], recorded: bool | None = None
) -> Any:
    """The output in q's layout and dtype (bfloat16 where q is float8), or (out, lse) where the spec says so.

    recorded: may no value be read, and sizes be symbols? None, where nobody has said: as the tensors look.
    """
    tracing = traced(q, k, v) if recorded is None else recorded
    if torch.is_autocast_enabled(q.device.type):
        # Autocast would round the products of the reference to half precision.
        with torch.autocast(q.device.type, enabled=False):
            return attend(spec, q, k, v, tensors, tracing)
    out, lse = exact(spec, q, k, v, tensors, tracing)
    out = out.to(torch.bfloat16 if q.dtype in FLOAT8 else q.dtype)
    return (out, lse.float()) if spec.return_lse else out


def exact(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], tracing: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and lse in the dtype of the computation, before they are rounded to what the contract says."""
    x, rest = operands(q, k, v, tensors)
    if spec.layout == "thd":
        return (all_at_once if tracing else one_by_one)(spec, x, rest)
    if spec.layout == "bhsd":
        return _bhsd(spec, x, rest, tracing)
    x = x._replace(q=q.transpose(1, 2))
    if spec.page_size is None:
        x = x._replace(k=k.transpose(1, 2), v=v.transpose(1, 2))
    out, lse = _bhsd(spec, x, rest, tracing)
    return out.transpose(1, 2), lse


def _bhsd(spec: AttentionSpec, x: Operands, tensors: Mapping[str, Any], tracing: bool) -> tuple[Tensor, Tensor]:
    """Output and lse of q in layout bhsd, k and v the same or in pages."""
    batch, q_heads, sq, _ = x.q.shape
    table = tensors.get("block_table")
    skv = x.k.shape[2] if table is None else table.shape[1] * x.k.shape[2]
    frame = padded_frame(
        spec, tensors, x.q.device, batch=batch, q_heads=q_heads, group=q_heads // x.k.shape[1], sq=sq, skv=skv
    )
    keep = keep_of(spec, tensors, x.q.device, tracing)
    return compute(x, frame, longest=skv, keep=keep, table=table, tracing=tracing)
