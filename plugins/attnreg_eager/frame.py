"""Where the rows and keys of a call stand: batch, row, position and key indices for every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks, sparsity

__all__ = ["Frame", "packed_frame", "padded_frame"]

Owners = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Frame:
    """Broadcastable int64 indices of the rows and keys of a whole call, or of the part that a tile covers.

    bq: batch (thd: sequence) index of a row, [B, 1, 1, 1] or [1, 1, Sq, 1]. h: query head, [1, Hq, 1, 1].
    i: row within its sequence, [1, 1, Sq, 1]. p: its position, [B or 1, 1, Sq, 1]. bk: batch index of a key,
    [B, 1, 1, 1] or [1, 1, 1, Skv]. j: key within its sequence, [1, 1, 1, Skv]. skv: keys of a sequence, which
    block patterns count from; [B] where sequences share a dimension. group: query heads a KV head. heads: query
    heads of the call. packed: layout thd. owners: where several sequences
    lie in one dimension, the sequence of each row and key (-1 and -2 for rows and keys of none): only pairs of
    one sequence count.
    """

    spec: AttentionSpec
    tensors: Mapping[str, Any]
    bq: Tensor
    h: Tensor
    i: Tensor
    p: Tensor
    bk: Tensor
    j: Tensor
    skv: int | Tensor
    group: int
    heads: int
    packed: bool = False
    owners: Owners | None = None

    def cut(self, batch: slice, heads: slice, rows: slice, keys: slice) -> Frame:
        """The part of the frame that a tile covers; `heads` are query heads."""
        cuts = (batch, heads, rows, keys)

        def part(x: Tensor) -> Tensor:
            # A dimension of size 1 is shared by all, whatever the tile.
            return x[tuple(slice(None) if n == 1 else c for n, c in zip(x.shape, cuts, strict=True))]

        owners = None if self.owners is None else (part(self.owners[0]), part(self.owners[1]))
        named: dict[str, Any] = {name: part(getattr(self, name)) for name in ("bq", "h", "i", "p", "bk", "j")}
        return replace(self, owners=owners, **named)

    @property
    def kv_head(self) -> Tensor:
        """The KV head that each query head reads, [1, Hq, 1, 1]."""
        return self.h // self.group

    def live(self) -> Tensor | None:
        """True where the row may attend the key: mask AND sparsity AND the keys in use; None for everywhere."""
        spec = self.spec
        coords = masks.Coords(
            b=self.bq,
            h=self.h,
            i=self.i,
            p=self.p,
            j=self.j,
            tensors=self.tensors,
            packed=self.packed,
            heads=self.heads,
        )
        out: list[Tensor] = []
        if not isinstance(spec.mask, masks.Full):
            out.append(spec.mask.allows(coords))
        if not isinstance(spec.sparsity, sparsity.Dense):
            out.append(spec.sparsity.allows(coords, self.skv))
        used = self.tensors.get("seqused_k")
        if used is not None:
            out.append(self.j < used.to(torch.int64)[self.bk])
        if self.owners is not None:
            out.append(self.owners[0] == self.owners[1])
        if not out:
            return None
        both = out[0]
        for more in out[1:]:
            both = both & more
        return both


def padded_frame(
    spec: AttentionSpec,
    tensors: Mapping[str, Any],
    device: torch.device,
    *,
    batch: int,
    q_heads: int,
    group: int,
    sq: int,
    skv: int,
    first: int = 0,
) -> Frame:
    """The frame of `batch` sequences of one size; `first` is the batch index of the first of them."""
    b = torch.arange(first, first + batch, device=device).view(-1, 1, 1, 1)
    i = torch.arange(sq, device=device).view(1, 1, -1, 1)
    return Frame(
        spec,
        tensors,
        bq=b,
        h=torch.arange(q_heads, device=device).view(1, -1, 1, 1),
        i=i,
        p=_positions(spec, tensors, b, i, sq, skv),
        bk=b,
        j=torch.arange(skv, device=device).view(1, 1, 1, -1),
        skv=skv,
        group=group,
        heads=q_heads,
        packed=spec.layout == "thd",
    )


def packed_frame(
    spec: AttentionSpec,
    tensors: Mapping[str, Any],
    device: torch.device,
    *,
    q_heads: int,
    group: int,
    total_q: int,
    total_k: int,
    skv: int,
) -> Frame:
    """The frame of all packed sequences at once, made without reading a length on the host.

    Where the cache is paged, total_k counts `skv` keys a sequence, one sequence after the other.
    """
    cu_q = tensors["cu_seqlens_q"].to(torch.int64)
    bq, i, owner_q = _places(cu_q, torch.arange(total_q, device=device), -1)
    keys = torch.arange(total_k, device=device)
    kv_len: Any = skv
    own: int | Tensor = skv
    if spec.page_size is None:
        cu_k = tensors["cu_seqlens_k"].to(torch.int64)
        bk, j, owner_k = _places(cu_k, keys, -2)
        lengths = cu_k.diff()
        own, kv_len = lengths, lengths[bq]
    else:
        bk, j = keys // skv, keys % skv
        owner_k = bk
    return Frame(
        spec,
        tensors,
        bq=bq.view(1, 1, -1, 1),
        h=torch.arange(q_heads, device=device).view(1, -1, 1, 1),
        i=i.view(1, 1, -1, 1),
        p=_positions(spec, tensors, bq, i, cu_q.diff()[bq], kv_len).view(1, 1, -1, 1),
        bk=bk.view(1, 1, 1, -1),
        j=j.view(1, 1, 1, -1),
        skv=own,
        group=group,
        heads=q_heads,
        packed=True,
        owners=(owner_q.view(1, 1, -1, 1), owner_k.view(1, 1, 1, -1)),
    )


def _positions(
    spec: AttentionSpec, tensors: Mapping[str, Any], b: Tensor, i: Tensor, q_len: Any, kv_len: Any
) -> Tensor:
    """Positions of the rows i of the sequences b; q_len and kv_len are numbers or broadcast with b."""
    if spec.align == "top_left":
        return i + torch.zeros_like(b)
    if spec.align == "offset":
        kv_len, q_len = tensors["query_offset"].to(torch.int64)[b], 0
    else:
        for name in ("kv_lengths", "seqused_k"):  # keys that both leave
            if name in tensors:
                kv_len = tensors[name].to(torch.int64)[b].clamp(max=kv_len)
    shift: Tensor | int = kv_len - q_len
    return i + torch.zeros_like(b) + shift


def _places(cu: Tensor, index: Tensor, nobody: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence of each packed row, its place within, and its owner: the sequence, or `nobody` past the last one."""
    count = cu.shape[0] - 1
    b = torch.searchsorted(cu, index, right=True) - 1
    inside = (b >= 0) & (b < count)
    b = b.clamp(0, count - 1)
    return b, torch.where(inside, index - cu[b], 0), torch.where(inside, b, nobody)
