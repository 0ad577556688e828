"""Packed sequences (layout thd): one after another, or all at once where lengths cannot be read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks
from attnreg_eager.build import compute, compute_dtype, keep_of
from attnreg_eager.chunks import Operands
from attnreg_eager.frame import packed_frame, padded_frame

__all__ = ["all_at_once", "one_by_one"]

SEEDS = 1 << 32
"""Room for the tiles of one sequence in the numbering of dropout seeds."""


def one_by_one(spec: AttentionSpec, x: Operands, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, Dv] and lse [Hq, T], at the cost of each sequence's own length; reads cu_seqlens."""
    table = tensors.get("block_table")
    if torch.is_grad_enabled():
        # Many sequences may add to these gradients: not in half precision.
        x = x._replace(**{n: y.to(compute_dtype(x.q)) for n in ("k", "v", "bias") if _needs_grad(y := getattr(x, n))})
    qs = _pieces(x.q, tensors["cu_seqlens_q"])
    if table is None:
        ks, vs = (_pieces(y, tensors["cu_seqlens_k"])[1:-1] for y in (x.k, x.v))
        longest = tensors.get("max_seqlen_k") or max((y.shape[0] for y in ks), default=0)
    else:
        longest = table.shape[1] * x.k.shape[2]
    keep = keep_of(spec, tensors, x.q.device, tracing=False)
    parts = [_nothing(qs[0], x.v.shape[-1])]
    for b, rows in enumerate(qs[1:-1]):
        sq, q_heads, _ = rows.shape
        if not sq:
            continue
        k, v = (x.k, x.v) if table is not None else (_bhsd(ks[b]), _bhsd(vs[b]))
        skv = longest if table is not None else k.shape[2]
        frame = padded_frame(
            spec, tensors, rows.device, batch=1, q_heads=q_heads, group=q_heads // x.k.shape[1], sq=sq, skv=skv, first=b
        )
        out, lse = compute(
            x._replace(q=_bhsd(rows), k=k, v=v, bias=_bias_of(x.bias, b, sq, skv)),
            frame,
            longest=longest,
            keep=None if keep is None else lambda n, b=b: keep(b * SEEDS + n),  # type: ignore[misc]  # a default in a lambda
            table=None if table is None else table[b : b + 1],
            tracing=False,
        )
        parts.append((out[0].transpose(0, 1), lse[0]))
    parts.append(_nothing(qs[-1], x.v.shape[-1]))
    out, lse = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)
    if len(parts) > 2 or not torch.is_grad_enabled():
        return out, lse
    # No sequence has a row, so nothing was read: still functions of every operand, whose gradients are 0.
    held = torch.zeros((), dtype=out.dtype, device=out.device)
    for y in x:
        if y is not None and y.requires_grad:
            held = held + y[:0].sum()
    return out + held, lse + held


def all_at_once(spec: AttentionSpec, x: Operands, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The same without reading a length, at the cost of T x T pairs: for graph captures."""
    table = tensors.get("block_table")
    total_q, q_heads, _ = x.q.shape
    k, v, group = x.k, x.v, q_heads // x.k.shape[1]
    if table is None:
        k, v = _bhsd(k), _bhsd(v)
        total_k = skv = k.shape[2]
        longest = tensors.get("max_seqlen_k") or total_k
    else:
        longest = skv = table.shape[1] * k.shape[2]
        total_k = table.shape[0] * skv
        table = table.reshape(1, -1)
    frame = packed_frame(
        spec, tensors, x.q.device, q_heads=q_heads, group=group, total_q=total_q, total_k=total_k, skv=skv
    )
    bias = None if x.bias is None else masks.take(x.bias, frame.bq, frame.h, frame.i, frame.j)
    keep = keep_of(spec, tensors, x.q.device, tracing=True)
    out, lse = compute(
        x._replace(q=_bhsd(x.q), k=k, v=v, bias=bias), frame, longest=longest, keep=keep, table=table, tracing=True
    )
    return out[0].transpose(0, 1), lse[0]


def _pieces(x: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
    """Rows before the first sequence (none, as a rule), those of each sequence, and those after the last."""
    edges = [0, *cu.tolist(), x.shape[0]]
    return torch.split(x, [stop - start for start, stop in itertools.pairwise(edges)])


def _needs_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _bhsd(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _bias_of(bias: Tensor | None, b: int, sq: int, skv: int) -> Tensor | None:
    """One sequence's part of a bias [1 or B, 1 or Hq, 1 or Sq, 1 or Skv] by place within the sequence."""
    if bias is None:
        return None
    own = bias[b : b + 1] if bias.shape[0] != 1 else bias
    return own[:, :, : sq if bias.shape[2] != 1 else 1, : skv if bias.shape[3] != 1 else 1]


def _nothing(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """What rows of no sequence give: 0 and -inf; still a function of q, so that a backward finds its way."""
    rows, q_heads, _ = q.shape
    dtype = compute_dtype(q)
    zero = torch.where(torch.ones((), dtype=torch.bool, device=q.device), 0.0, q[..., :1].to(dtype))
    lse = torch.full((q_heads, rows), -torch.inf, dtype=dtype, device=q.device)
    return zero.expand(rows, q_heads, head_dim_v), lse
