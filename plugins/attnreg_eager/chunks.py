"""Walk a call tile by tile so that memory stays linear in the sequence, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnreg import scores
from attnreg_eager.frame import Frame
from attnreg_eager.keys import Load, contiguous_chunks, paged_chunks, split
from attnreg_eager.tile import Part, Tile, any_grad, finish, merge

__all__ = ["Call", "Sizes", "plan"]

BUDGET = 1 << 22
"""Scores of a tile (16 MiB in float32); some five tensors of this size live at a time."""

UPCAST = 1 << 23
"""Elements of k and v together that a tile converts to the dtype of the computation."""


@dataclass(frozen=True)
class Sizes:
    """How much one tile covers: sequences, KV heads, rows and keys."""

    batch: int
    kv_heads: int
    rows: int
    keys: int


@dataclass(frozen=True)
class Call:
    """The tensors of a call (or of one sequence of it) in layout bhsd, over its frame.

    q [B, Hq, Sq, D]; k, v [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with table [B, P]; bias
    [1 or B, 1 or Hq, 1 or Sq, 1 or Skv]; weight [Hq or 1, ...]; sinks [1, Hq, 1].
    """

    tile: Tile
    frame: Frame
    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None
    sinks: Tensor | None = None
    keep: Callable[[int], Callable[[tuple[int, ...]], Tensor]] | None = None

    def whole(self) -> tuple[Tensor, Tensor]:
        """Output and lse in one tile: what a graph capture needs, whose sizes may be symbols."""
        skv = self.frame.j.shape[-1]
        load = self._loads(self.k, self.v, self.table, skv)[0]
        tile = replace(self.tile, weight=_heads(self.weight, 0, self.q.shape[1]), dropout=self.keep and self.keep(0))
        return finish(tile.part(self.frame, self.q, *load(), self.bias), self.sinks)

    def run(self, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Sq, Dv] and lse [B, Hq, Sq], in tiles of the given sizes."""
        group = self.frame.group
        counter = iter(range(1 << 62))
        by_batch = []
        for b0, batch in _parts(self, sizes.batch, 0):
            by_head = []
            for h0, slab in _parts(batch, sizes.kv_heads * group, 1):
                heads = slice(h0, h0 + slab.q.shape[1])
                slab = replace(
                    slab,
                    frame=self.frame.cut(slice(b0, b0 + slab.q.shape[0]), heads, slice(None), slice(None)),
                    weight=_heads(self.weight, heads.start, heads.stop),
                    sinks=None if self.sinks is None else self.sinks[:, heads],
                )
                by_head.append(slab._rows(sizes, counter))
            by_batch.append(_cat(by_head, 1))
        return _cat(by_batch, 0)

    def _loads(self, k: Tensor, v: Tensor, table: Tensor | None, size: int) -> list[Load]:
        return contiguous_chunks(k, v, size) if table is None else paged_chunks(k, v, table, size)

    def _rows(self, sizes: Sizes, counter: Iterator[int]) -> tuple[Tensor, Tensor]:
        """All rows of the slab, a chunk after another; each is recomputed in the backward."""
        loads = self._loads(self.k, self.v, self.table, sizes.keys)
        starts = range(0, len(loads) * sizes.keys, sizes.keys)
        rows = split(self.q, sizes.rows, 2)
        biases = (self.bias,) * len(rows)
        if self.bias is not None and self.bias.shape[2] != 1:
            biases = split(self.bias, sizes.rows, 2)
        lean = any_grad(self.q, self.k, self.v, self.bias, self.weight, self.sinks) and len(rows) * len(loads) > 1
        out, first = [], 0
        for q, bias in zip(rows, biases, strict=True):
            at = slice(first, first + q.shape[2])
            first = at.stop
            draws = [None if self.keep is None else self.keep(next(counter)) for _ in loads]

            def chunk(q: Tensor, bias: Tensor | None, at: slice = at, draws: list[Any] = draws) -> tuple[Tensor, ...]:
                q = q.to(self.tile.dtype)
                total: Part | None = None
                for load, j0, draw in zip(loads, starts, draws, strict=True):
                    keys = slice(j0, j0 + sizes.keys)
                    frame = self.frame.cut(slice(None), slice(None), at, keys)
                    tile = replace(self.tile, weight=self.weight, dropout=draw)
                    part_bias = bias if bias is None or bias.shape[3] == 1 else bias[..., keys]

                    def part(
                        q: Tensor, bias: Tensor | None, tile: Tile = tile, frame: Frame = frame, load: Load = load
                    ) -> Part:
                        return tile.part(frame, q, *load(), bias)

                    new = _recomputed(part, lean and len(loads) > 1, q, part_bias)
                    total = new if total is None else merge(total, new)
                if total is None:
                    raise AssertionError("a split has at least one part")
                return finish(total, self.sinks)

            out.append(_recomputed(chunk, lean, q, bias))
        return _cat(out, 2)


def _recomputed(function: Callable[..., Any], lean: bool, *xs: Any) -> Any:
    if not lean:
        return function(*xs)
    # The dropout of a tile comes from a seed of its own, so the global generators need no saving.
    return checkpoint(function, *xs, use_reentrant=False, preserve_rng_state=False)


def _heads(weight: Tensor | None, start: int, stop: int) -> Tensor | None:
    return weight if weight is None or weight.shape[0] == 1 else weight[start:stop]


def _cat(parts: list[Any], dim: int) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        out: tuple[Tensor, Tensor] = parts[0]
        return out
    return torch.cat([out for out, _ in parts], dim), torch.cat([lse for _, lse in parts], dim)


def _parts(call: Call, size: int, dim: int) -> Iterator[tuple[int, Call]]:
    """The call in slabs along batch (0) or heads (1; `size` counts query heads), each with its first index."""
    qs = split(call.q, size, dim)
    if len(qs) == 1:
        yield 0, call
        return
    kv_size = size if dim == 0 else size // call.frame.group
    paged = call.table is not None and dim == 0
    ks = (call.k,) * len(qs) if paged else split(call.k, kv_size, dim)
    vs = (call.v,) * len(qs) if paged else split(call.v, kv_size, dim)
    tables: Any = split(call.table, size, 0) if call.table is not None and paged else (call.table,) * len(qs)
    own = call.bias is not None and call.bias.shape[dim] != 1
    biases: Any = split(call.bias, size, dim) if call.bias is not None and own else (call.bias,) * len(qs)
    for n, (q, k, v, table, bias) in enumerate(zip(qs, ks, vs, tables, biases, strict=True)):
        yield n * size, replace(call, q=q, k=k, v=v, table=table, bias=bias)


def plan(call: Call, budget: int | None = None) -> Sizes:
    """Tile sizes that keep the scores of a tile (additive: its hidden layer) within `budget` elements (BUDGET)."""
    budget = BUDGET if budget is None else budget
    group, skv = call.frame.group, max(call.frame.j.shape[-1], 1)
    batch, q_heads, sq, head_dim = call.q.shape
    kv_heads = q_heads // group
    additive = isinstance(call.tile.spec.score, scores.Additive)
    page = call.k.shape[2] if call.table is not None else 1
    wide = call.k.shape[-1] + call.v.shape[-1]
    # Rows first: a tile of few rows converts and reads k and v for little work.
    rows = min(max(sq, 1), 64 if additive else 128)
    keys = min(skv, UPCAST // wide)
    if additive:
        keys = min(keys, budget // (rows * group * head_dim))
    keys = min(max(keys // page, 1) * page, -(-skv // page) * page)
    pairs = keys * head_dim if additive else skv
    slabs = max(1, min(budget // (rows * group * pairs), UPCAST // (keys * wide)))
    heads = min(slabs, kv_heads)
    batches = min(max(1, slabs // heads), max(batch, 1)) if heads == kv_heads else 1
    fit = budget // (max(batches * heads, 1) * group * pairs)
    return Sizes(batches, heads, min(max(fit, 1), max(sq, 1)), max(keys, 1))
