"""Walk a call tile by tile so that memory stays linear in the sequence, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnreg_eager.dropout import Keep
from attnreg_eager.frame import Frame
from attnreg_eager.keys import gather
from attnreg_eager.plan import Sizes
from attnreg_eager.tile import Part, Tile, finish, merge

__all__ = ["ALL", "Call", "Operands", "Rows", "Slab", "has_tangent"]

ALL = slice(None)


class Operands(NamedTuple):
    """What may need a gradient.

    q [B, Hq, Sq, D]; k, v [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D]; bias [1 or B, 1 or Hq, 1 or Sq,
    1 or Skv]; weight [1 or Hq, ...]; sinks [1, Hq, 1]; slopes, of ALiBi, [1 or B, Hq], never cut.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    weight: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None


class Rows(NamedTuple):
    """One step of the walk: rows `at` of a slab, as the `n`-th of the call."""

    at: slice
    n: int


@dataclass(frozen=True)
class Slab:
    """The part of a call that lies in some sequences and heads; `kv` are KV heads."""

    batch: slice
    heads: slice
    kv: slice
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class Call:
    """A call (or one sequence of it) in layout bhsd, without its operands.

    table: [B, P] where the cache is paged. keep: the dropout masks of the n-th tile. skv: keys of a row's time
    line, which is what j of the frame counts.
    """

    tile: Tile
    frame: Frame
    table: Tensor | None = None
    keep: Callable[[int], Keep] | None = None

    def whole(self, x: Operands) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Sq, Dv] and lse [B, Hq, Sq] in one tile: for graphs, whose sizes may be symbols."""
        k, v = (y if self.table is None else gather(y, self.table) for y in (x.k, x.v))
        return self.rows(x._replace(k=k, v=v), self.frame, self.frame.j.shape[-1], 0)

    def walk(self, x: Operands, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """The same in tiles of the given sizes."""
        shape, dtype = x.q.shape[:3], self.tile.dtype
        out, lse = x.q.new_empty((*shape, x.v.shape[3]), dtype=dtype), x.q.new_empty(shape, dtype=dtype)
        for slab in self.slabs(x, sizes):
            part = self.cut(x, slab)
            frame = self.frame.cut(slab.batch, slab.heads, ALL, ALL)
            for rows in slab.rows:
                at = (slab.batch, slab.heads, rows.at)
                step = part._replace(q=part.q[:, :, rows.at], bias=bias_rows(part.bias, rows.at))
                out[at], lse[at] = self.rows(step, frame.cut(ALL, ALL, rows.at, ALL), sizes.keys, rows.n)
        return out, lse

    def slabs(self, x: Operands, sizes: Sizes) -> Iterator[Slab]:
        """The walk's order, which numbers the tiles: forward and backward agree on it."""
        batch, q_heads, sq, _ = x.q.shape
        group = self.frame.group
        tiles, n = max(-(-self.frame.j.shape[-1] // sizes.keys), 1), 0
        for b in range(0, batch, sizes.batch):
            for h in range(0, q_heads // group, sizes.kv_heads):
                kv = slice(h, min(h + sizes.kv_heads, q_heads // group))
                rows = []
                for i in range(0, sq, sizes.rows):
                    rows.append(Rows(slice(i, min(i + sizes.rows, sq)), n))
                    n += tiles
                heads = slice(kv.start * group, kv.stop * group)
                yield Slab(slice(b, min(b + sizes.batch, batch)), heads, kv, tuple(rows))

    def cut(self, x: Operands, slab: Slab) -> Operands:
        """The slab's part of each operand, with pages gathered."""
        if self.table is None:
            k, v = x.k[slab.batch, slab.kv], x.v[slab.batch, slab.kv]
        else:
            k, v = (gather(y[:, slab.kv], self.table[slab.batch]) for y in (x.k, x.v))
        bias = x.bias
        if bias is not None:
            bias = bias[slab.batch if bias.shape[0] != 1 else ALL, slab.heads if bias.shape[1] != 1 else ALL]
        weight = x.weight if x.weight is None or x.weight.shape[0] == 1 else x.weight[slab.heads]
        sinks = None if x.sinks is None else x.sinks[:, slab.heads]
        return Operands(x.q[slab.batch, slab.heads], k, v, bias, weight, sinks, x.slopes)

    def rows(self, x: Operands, frame: Frame, size: int, n: int) -> tuple[Tensor, Tensor]:
        """Output and lse of some rows over all their keys, `size` keys at a time; n numbers the first tile."""
        skv = frame.j.shape[-1]
        q, total = x.q.to(self.tile.dtype), None
        lean = torch.is_grad_enabled() and size < skv and not has_tangent(*x)
        for start in range(0, skv, size) if size < skv else (0,):
            keys = slice(start, start + size) if size < skv else ALL
            bias = x.bias if x.bias is None or x.bias.shape[3] == 1 else x.bias[..., keys]
            tile = replace(self.tile, dropout=self.keep and self.keep(n))
            operands = (frame.cut(ALL, ALL, ALL, keys), q, x.k[:, :, keys], x.v[:, :, keys], bias, x.weight, x.slopes)
            # Additive scores have a hidden layer a tile: with many tiles a row, each is made again when needed.
            new: Part = _recomputed(tile.part, *operands) if lean else tile.part(*operands)
            total = new if total is None else merge(total, new)
            n += 1
        if total is None:
            raise AssertionError("there is one tile at least")
        return finish(total, x.sinks)


def has_tangent(*xs: Tensor | None) -> bool:
    """Does one of them carry a tangent of forward mode?"""
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in xs)  # type: ignore[no-untyped-call]


def bias_rows(bias: Tensor | None, rows: slice) -> Tensor | None:
    """The part of a bias that belongs to some rows."""
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]


def _recomputed(function: Callable[..., Any], *xs: Any) -> Any:
    # The dropout of a tile comes from a seed of its own, so the global generators need no saving.
    return checkpoint(function, *xs, use_reentrant=False, preserve_rng_state=False)
