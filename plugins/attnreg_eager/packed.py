"""Packed sequences (layout thd): one after another, or all at once where lengths cannot be read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks
from attnreg_eager.build import compute_dtype, full_rank, keep_of, make_call
from attnreg_eager.chunks import plan
from attnreg_eager.frame import packed_frame, padded_frame

__all__ = ["all_at_once", "one_by_one"]

SEEDS = 1 << 32
"""Room for the tiles of one sequence in the numbering of dropout seeds."""


def one_by_one(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, Dv] and lse [Hq, T], at the cost of each sequence's own length; reads cu_seqlens."""
    starts = tensors["cu_seqlens_q"].tolist()
    table = tensors.get("block_table")
    qs = _pieces(q, starts)
    if table is None:
        starts_k = tensors["cu_seqlens_k"].tolist()
        ks, vs = _pieces(k, starts_k)[1:-1], _pieces(v, starts_k)[1:-1]
        longest = tensors.get("max_seqlen_k") or max((x.shape[0] for x in ks), default=0)
    else:
        ks = vs = ()
        longest = table.shape[1] * k.shape[2]
    bias = full_rank(tensors.get("bias"))
    keep = keep_of(spec, tensors, q.device, tracing=False)
    parts = [_nothing(qs[0], v.shape[-1])]
    for b, rows in enumerate(qs[1:-1]):
        if not rows.shape[0]:
            continue
        sequence_k = k if table is not None else _bhsd(ks[b])
        sequence_v = v if table is not None else _bhsd(vs[b])
        skv = longest if table is not None else sequence_k.shape[2]
        sq, q_heads, _ = rows.shape
        frame = padded_frame(
            spec, tensors, q.device, batch=1, q_heads=q_heads, group=q_heads // k.shape[1], sq=sq, skv=skv, first=b
        )
        call = make_call(
            frame,
            _bhsd(rows),
            sequence_k,
            sequence_v,
            bias=None if bias is None else _bias_of(bias, b, sq, skv),
            longest=longest,
            keep=None if keep is None else lambda n, b=b: keep(b * SEEDS + n),  # type: ignore[misc]  # as in keys
            table=None if table is None else table[b : b + 1],
        )
        out, lse = call.run(plan(call))
        parts.append((out[0].transpose(0, 1), lse[0]))
    parts.append(_nothing(qs[-1], v.shape[-1]))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def all_at_once(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The same without reading a length, at the cost of T x T pairs: for graph captures."""
    table = tensors.get("block_table")
    total_q, q_heads, _ = q.shape
    if table is None:
        k, v = _bhsd(k), _bhsd(v)
        total_k = skv = k.shape[2]
        longest = tensors.get("max_seqlen_k") or total_k
    else:
        longest = skv = table.shape[1] * k.shape[2]
        total_k = table.shape[0] * skv
        table = table.reshape(1, -1)
    frame = packed_frame(
        spec, tensors, q.device, q_heads=q_heads, group=q_heads // k.shape[1], total_q=total_q, total_k=total_k, skv=skv
    )
    bias = full_rank(tensors.get("bias"))
    if bias is not None:
        bias = masks.take(bias, frame.bq, frame.h, frame.i, frame.j)
    keep = keep_of(spec, tensors, q.device, tracing=True)
    out, lse = make_call(frame, _bhsd(q), k, v, bias=bias, longest=longest, keep=keep, table=table).whole()
    return out[0].transpose(0, 1), lse[0]


def _pieces(x: Tensor, starts: list[int]) -> tuple[Tensor, ...]:
    """Rows before the first sequence (none, as a rule), those of each sequence, and those after the last."""
    edges = [0, *starts, x.shape[0]]
    return torch.split(x, [stop - start for start, stop in itertools.pairwise(edges)])


def _bhsd(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _bias_of(bias: Tensor, b: int, sq: int, skv: int) -> Tensor:
    """One sequence's part of a bias [1 or B, 1 or Hq, 1 or Sq, 1 or Skv] by place within the sequence."""
    own = bias[b : b + 1] if bias.shape[0] != 1 else bias
    return own[:, :, : sq if bias.shape[2] != 1 else 1, : skv if bias.shape[3] != 1 else 1]


def _nothing(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """What rows of no sequence give: 0 and -inf; still a function of q, so that a backward finds its way."""
    rows, q_heads, _ = q.shape
    dtype = compute_dtype(q)
    zero = torch.where(torch.ones((), dtype=torch.bool, device=q.device), 0.0, q[..., :1].to(dtype))
    lse = torch.full((q_heads, rows), -torch.inf, dtype=dtype, device=q.device)
    return zero.expand(rows, q_heads, head_dim_v), lse
