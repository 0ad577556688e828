"""Which key may a query attend: the spec's words evaluated once more, on purpose without `masks.allows`.

The oracle must not share code with what it judges, so every mask and pattern is written here a second time, from
its definition and in the plainest form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg import masks, sparsity
from attnreg.spec import AttentionSpec

__all__ = ["Place", "allowed"]


@dataclass(frozen=True)
class Place:
    """Where a set of queries of one sequence stands.

    b: the sequence. rows: int64 [n], their rows in q. positions: int64 [n], on the key time line. heads: query
    heads. skv: keys of the sequence. packed: layout thd.
    """

    b: int
    rows: Tensor
    positions: Tensor
    heads: int
    skv: int
    packed: bool


def allowed(spec: AttentionSpec, at: Place, tensors: Mapping[str, Any]) -> Tensor:
    """Bool [1 or Hq, n, Skv]: mask AND sparsity."""
    return _mask(spec.mask, at, tensors) & _sparsity(spec.sparsity, at, tensors)


def _mask(mask: masks.Mask, at: Place, tensors: Mapping[str, Any]) -> Tensor:
    device = at.positions.device
    p = at.positions[None, :, None]
    j = torch.arange(at.skv, device=device)[None, None, :]
    nothing = torch.zeros(1, len(at.positions), at.skv, dtype=torch.bool, device=device)
    match mask:
        case masks.And(of=of):
            return torch.stack([_mask(m, at, tensors).expand(at.heads, -1, -1) for m in of]).all(0)
        case masks.Or(of=of):
            return torch.stack([_mask(m, at, tensors).expand(at.heads, -1, -1) for m in of]).any(0)
        case masks.Not(of=inner):
            return _mask(inner, at, tensors).logical_not()
        case masks.Full():
            return ~nothing
        case masks.Causal():
            return ~(j > p)
        case masks.SlidingWindow(left=left, right=right):
            behind = p - j
            return ((behind <= left) & (behind >= -right)) | nothing
        case masks.PrefixLM(length=length):
            first = int(tensors["prefix_lengths"][at.b]) if length is None else length
            out = ~(j > p)
            out[:, :, :first] = True
            return out
        case masks.Chunked(size=size):
            return torch.floor_divide(p, size).eq(torch.floor_divide(j, size))
        case masks.Dilated(window=window, dilation=dilation):
            reach = min(window // 2, at.skv + int(at.positions.abs().max()) + 1) if len(at.positions) else 0
            steps = torch.arange(-reach, reach + 1, device=device) * dilation
            return torch.isin(j - p, steps)
        case masks.Global(tokens=tokens):
            if tokens is not None:
                listed = torch.tensor(tokens, dtype=torch.int64, device=device)
                return torch.isin(p, listed) | torch.isin(j, listed)
            flags: Tensor = tensors["global_mask"][at.b]
            return _lookup(flags, at.positions, False)[None, :, None] | flags[None, None, : at.skv]
        case masks.Document():
            if at.packed:
                return ~nothing
            ids: Tensor = tensors["document_ids"][at.b]
            inside = (at.positions >= 0) & (at.positions < len(ids))
            mine = _lookup(ids, at.positions, 0)
            return inside[None, :, None] & (mine[None, :, None] == ids[None, None, : at.skv])
        case masks.Padding():
            return (j < int(tensors["kv_lengths"][at.b])) | nothing
        case masks.Dense():
            return _pairs(tensors["attn_mask"], at) | nothing
        case masks.Custom(mask_mod=mask_mod):
            b = torch.full((1, 1, 1), at.b, device=device)
            h = torch.arange(at.heads, device=device)[:, None, None]
            return mask_mod(b, h, p, j) | nothing
    raise TypeError(f"oracle: no meaning written down for {mask!r}")


def _lookup(table: Tensor, index: Tensor, outside: int) -> Tensor:
    """table[index], `outside` where the index is none of the table's."""
    out = torch.full(index.shape, outside, dtype=table.dtype, device=table.device)
    inside = (index >= 0) & (index < len(table))
    out[inside] = table[index[inside]]
    return out


def _pairs(table: Tensor, at: Place) -> Tensor:
    """The sequence's part of something that broadcasts to [B, Hq, Sq, Skv]: [1 or Hq, 1 or n, 1 or Skv]."""
    table = table.reshape((1,) * (4 - table.dim()) + tuple(table.shape))
    table = table[at.b if table.shape[0] > 1 else 0]
    if table.shape[1] > 1:
        table = table[:, at.rows]
    return table[:, :, : at.skv] if table.shape[2] > 1 else table


def _sparsity(pattern: sparsity.Sparsity, at: Place, tensors: Mapping[str, Any]) -> Tensor:
    device = at.positions.device
    j = torch.arange(at.skv, device=device)
    match pattern:
        case sparsity.Dense():
            return torch.ones(1, 1, 1, dtype=torch.bool, device=device)
        case sparsity.Blocks(block_q=block_q, block_kv=block_kv):
            table: Tensor = tensors["block_mask"]
            table = table[at.b if table.shape[0] > 1 else 0]
            by_row = table.index_select(1, at.rows // block_q)
            return by_row.index_select(2, j // block_kv)
        case sparsity.Strided(block=block, local=local, stride=stride):
            row, column = torch.floor_divide(at.positions, block)[:, None], (j // block)[None, :]
            near = torch.isin(row - column, torch.arange(local, device=device))
            return (near | (column % stride == 0))[None]
        case sparsity.BigBird():
            return _bigbird(pattern, at)
    raise TypeError(f"oracle: no meaning written down for {pattern!r}")


def _bigbird(pattern: sparsity.BigBird, at: Place) -> Tensor:
    """Block row by block row: the set of live block columns of each head, from the paper's three parts."""
    device = at.positions.device
    columns = -(-at.skv // pattern.block)
    drawn = pattern.random_columns(at.heads, columns) if columns else None
    column_of_key = torch.arange(at.skv, device=device) // pattern.block
    row_of_query = torch.floor_divide(at.positions, pattern.block)
    out = torch.zeros(at.heads, len(at.positions), at.skv, dtype=torch.bool, device=device)
    edge = {*range(pattern.global_blocks), *range(columns - pattern.global_blocks, columns)}
    for row in sorted(set(row_of_query.tolist())):
        half = pattern.window // 2
        live = set(range(row - half, row + half + 1)) | edge
        if 0 <= row < columns and row in edge:
            live |= set(range(columns))
        for h in range(at.heads):
            mine = live | ({int(c) for c in drawn[h, row]} if drawn is not None and 0 <= row < columns else set())
            keys = torch.isin(column_of_key, torch.tensor(sorted(mine), device=device))
            out[h, row_of_query == row] = keys
    return out
