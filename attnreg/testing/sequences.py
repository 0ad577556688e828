"""Take any layout apart into single sequences of plain [heads, rows, dim] tensors, and put results together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg.spec import AttentionSpec

__all__ = ["Shape", "as_rows", "from_rows", "key_rows", "pick_rows", "put_together", "shapes", "take_apart"]


@dataclass(frozen=True)
class Shape:
    """One sequence of a call. q_start, k_start: its first packed row (0 where nothing is packed).

    sq, skv: its queries and keys. used: keys j < used exist; the rest of a page is stale. offset: position of
    query row i is i + offset. longest: the keys of the call's longest sequence, from which block scales count.
    """

    b: int
    sq: int
    skv: int
    used: int
    offset: int
    q_start: int = 0
    k_start: int = 0
    longest: int = 0


def shapes(spec: AttentionSpec, q: Tensor, k: Tensor, tensors: Mapping[str, Any]) -> list[Shape]:
    """Every sequence of the call, in order."""
    packed = spec.layout == "thd"
    cu_q = tensors["cu_seqlens_q"].tolist() if packed else None
    cu_k = tensors["cu_seqlens_k"].tolist() if packed and spec.page_size is None else None
    rows, keys = (2, 2) if spec.layout == "bhsd" else (1, 1)
    batch = len(cu_q) - 1 if cu_q is not None else q.shape[0]
    out = []
    for b in range(batch):
        sq = cu_q[b + 1] - cu_q[b] if cu_q is not None else q.shape[rows]
        if spec.page_size is not None:
            skv = tensors["block_table"].shape[1] * spec.page_size
        else:
            skv = cu_k[b + 1] - cu_k[b] if cu_k is not None else k.shape[keys]
        used = skv
        if tensors.get("seqused_k") is not None:
            used = min(used, int(tensors["seqused_k"][b]))
        length = used
        if tensors.get("kv_lengths") is not None:
            length = min(length, int(tensors["kv_lengths"][b]))
        offset = {"bottom_right": length - sq, "top_left": 0}.get(spec.align)
        if offset is None:
            offset = int(tensors["query_offset"][b])
        starts = (cu_q[b] if cu_q is not None else 0, cu_k[b] if cu_k is not None else 0)
        out.append(Shape(b, sq, skv, used, offset, *starts))
    longest = tensors.get("max_seqlen_k") if cu_k is not None else None
    if longest is None:
        longest = max((one.skv for one in out), default=0)
    return [replace(one, longest=longest) for one in out]


def take_apart(
    spec: AttentionSpec, one: Shape, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence's q [Hq, sq, Dq], k [Hkv, skv, Dk] and v [Hkv, skv, Dv], as views or gathers of the call's."""
    q_one = _rows(spec.layout, q, one.b, one.q_start, one.sq)
    if spec.page_size is None:
        pair = (_rows(spec.layout, x, one.b, one.k_start, one.skv) for x in (k, v))
    else:
        pages = tensors["block_table"][one.b].long().clamp(0, max(k.shape[0] - 1, 0))
        pair = (x[pages].transpose(0, 1).flatten(1, 2) for x in (k, v))
    k_one, v_one = pair
    return q_one, k_one, v_one


def _rows(layout: str, x: Tensor, b: int, start: int, count: int) -> Tensor:
    if layout == "bhsd":
        return x[b]
    if layout == "bshd":
        return x[b].transpose(0, 1)
    return x[start : start + count].transpose(0, 1)


def key_rows(spec: AttentionSpec, one: Shape, k: Tensor, tensors: Mapping[str, Any]) -> Tensor:
    """Where the sequence's keys lie: int64 [skv], the row of each in `as_rows(spec, k)`."""
    j = torch.arange(one.skv, device=k.device)
    if spec.page_size is not None:
        table = tensors["block_table"][one.b].long().clamp_min(0)
        rows: Tensor = table[j // spec.page_size] * spec.page_size + j % spec.page_size
        return rows
    if spec.layout == "thd":
        return one.k_start + j
    return one.b * one.skv + j


def as_rows(spec: AttentionSpec, x: Tensor) -> Tensor:
    """k or v of a call as [every stored row, Hkv, D]: a copy where the layout asks for one."""
    if spec.page_size is not None or spec.layout == "bhsd":
        return x.transpose(1, 2).flatten(0, 1)
    return x if spec.layout == "thd" else x.flatten(0, 1)


def from_rows(spec: AttentionSpec, rows: Tensor, x: Tensor) -> Tensor:
    """The inverse of `as_rows`, in the shape of x."""
    if spec.page_size is not None or spec.layout == "bhsd":
        first, _, count = x.shape[:3]
        return rows.reshape(first, count, *rows.shape[1:]).transpose(1, 2).reshape(x.shape)
    return rows.reshape(x.shape)


def pick_rows(layout: str, out: Tensor, one: Shape, rows: Tensor) -> Tensor:
    """Some rows of one sequence of an output (or its gradient): [Hq, n, Dv]."""
    return _rows(layout, out, one.b, one.q_start, one.sq)[:, rows]


def put_together(
    layout: str, q: Tensor, parts: Sequence[tuple[Tensor, Tensor]], head_dim_v: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the sequences, each [Hq, sq, Dv] and [Hq, sq], in the call's layout.

    Packed rows behind the last sequence have no meaning and hold 0 and -inf.
    """
    if layout == "thd":
        total, heads = q.shape[0], q.shape[1]
        done = sum(lse.shape[1] for _, lse in parts)
        dtype, device = (parts[0][0].dtype, parts[0][0].device) if parts else (torch.float64, q.device)
        rest = torch.zeros(heads, total - done, head_dim_v, dtype=dtype, device=device)
        none = torch.full((heads, total - done), -torch.inf, dtype=dtype, device=device)
        out = torch.cat([*(out for out, _ in parts), rest], 1)
        return out.transpose(0, 1).contiguous(), torch.cat([*(lse for _, lse in parts), none], 1)
    if not parts:
        shape = (0, *q.shape[1:-1], head_dim_v)
        rows = (0, q.shape[1], q.shape[2]) if layout == "bhsd" else (0, q.shape[2], q.shape[1])
        return torch.zeros(shape, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    out, lse = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
    return (out if layout == "bhsd" else out.transpose(1, 2).contiguous()), lse
