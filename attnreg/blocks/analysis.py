"""Three-valued analysis of a mask expression: for every row block, the keys that some and that all of its rows see.

`may` holds every key that some row of the block may attend, `must` only keys that every row may attend. Leaves give
both in closed form; `&`, `|` and `~` combine them soundly: a block inside `must` is full, one outside `may` empty, and
whatever lies between is evaluated exactly, tile by tile (attnreg.blocks.tiles).

A `sign` numbers tiles so that two tiles with equal numbers hold equal bits: a long sliding window has millions of
tiles on its edges and a handful of different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attnreg import masks as m
from attnreg.blocks.grid import Grid, Tiles
from attnreg.blocks.intervals import Ints, KeySets, complement, intersection, ragged, union

__all__ = ["Analysis", "Columns", "Context", "analyse", "cut", "decided", "meet"]

Columns = list[tuple[Ints, int]]
"""Numbers >= 0, one a tile, each with the span below which they lie."""

FAR = 2**61  # beyond every position, and far enough from the int64 limit to add to


@dataclass(frozen=True)
class Context:
    """What a leaf may look at: the grid, the call tensors as numpy arrays, and whether sequences are packed."""

    grid: Grid
    tensors: Mapping[str, npt.NDArray[Any]]
    packed: bool = False


@dataclass(frozen=True)
class Analysis:
    """`may`, `must` and the tile numbering of one expression."""

    may: KeySets
    must: KeySets
    sign: Callable[[Tiles], Columns]


def meet(*parts: Analysis) -> Analysis:
    """All of the parts allow it."""
    return Analysis(intersection(*(p.may for p in parts)), intersection(*(p.must for p in parts)), _signs(parts))


def analyse(mask: m.Mask, at: Context) -> Analysis:
    """The analysis of a mask expression; code, and what reads a tensor that is not there, may allow anything."""
    if isinstance(mask, m.Not):
        of = analyse(mask.of, at)
        universe = at.grid.universe
        return Analysis(complement(of.must, universe), complement(of.may, universe), of.sign)
    if isinstance(mask, (m.And, m.Or)):
        parts = [analyse(part, at) for part in mask.of]
        if isinstance(mask, m.And):
            return meet(*parts)
        return Analysis(union(*(p.may for p in parts)), union(*(p.must for p in parts)), _signs(parts))
    known = _LEAVES.get(type(mask), _opaque)
    needs = mask.tensors() - ({"document_ids"} if at.packed else set())
    return known(mask, at) if needs <= at.tensors.keys() else _opaque(mask, at)


def _signs(parts: list[Analysis] | tuple[Analysis, ...]) -> Callable[[Tiles], Columns]:
    return lambda tiles: [column for part in parts for column in part.sign(tiles)]


def decided(may: KeySets, must: KeySets) -> Analysis:
    """A leaf without a cheap numbering: its full tiles are alike, its empty ones too, and each other is its own."""

    def sign(tiles: Tiles) -> Columns:
        start = tiles.line * tiles.grid.stride + tiles.j0
        end = start + tiles.keys
        own = np.arange(2, tiles.line.size + 2)
        return [(np.where(must.covers(start, end), 1, np.where(may.touches(start, end), own, 0)), own.size + 2)]

    return Analysis(may, must, sign)


def _opaque(mask: m.Mask, at: Context) -> Analysis:
    return decided(at.grid.universe, at.grid.empty())


def _clipped(value: Ints, low: int, high: int) -> tuple[Ints, int]:
    return np.clip(value, low, high) - low, high - low + 1


def _edge(tiles: Tiles, shift: int) -> tuple[Ints, int]:
    """Where the diagonal p + shift enters the tile; all offsets that miss it on one side count as one."""
    grid = tiles.grid
    return _clipped(tiles.p0 + shift - tiles.j0, -grid.block_q, grid.block_kv)


def _full(mask: m.Full, at: Context) -> Analysis:
    return Analysis(at.grid.universe, at.grid.universe, lambda tiles: [])


def _causal(mask: m.Causal, at: Context) -> Analysis:
    grid = at.grid
    zero = np.zeros_like(grid.p0)
    return Analysis(grid.between(zero, grid.p1 + 1), grid.between(zero, grid.p0 + 1), lambda tiles: [_edge(tiles, 0)])


def _window(mask: m.SlidingWindow, at: Context) -> Analysis:
    grid = at.grid
    left, right = min(mask.left, FAR), min(mask.right, FAR)
    return Analysis(
        grid.between(grid.p0 - left, grid.p1 + right + 1),
        grid.between(grid.p1 - left, grid.p0 + right + 1),
        lambda tiles: [_edge(tiles, -left), _edge(tiles, right)],
    )


def _prefix(mask: m.PrefixLM, at: Context) -> Analysis:
    grid = at.grid
    table = np.full(grid.batch, mask.length) if mask.length is not None else at.tensors["prefix_lengths"]
    prefix = table[grid.b]
    zero = np.zeros_like(grid.p0)
    return Analysis(
        grid.between(zero, np.maximum(prefix, grid.p1 + 1)),
        grid.between(zero, np.maximum(prefix, grid.p0 + 1)),
        lambda tiles: [_edge(tiles, 0), _clipped(table[tiles.b] - tiles.j0, 0, grid.block_kv)],
    )


def _padding(mask: m.Padding, at: Context) -> Analysis:
    grid, table = at.grid, at.tensors["kv_lengths"]
    seen = grid.between(np.zeros_like(grid.p0), table[grid.b])
    return Analysis(seen, seen, lambda tiles: [_clipped(table[tiles.b] - tiles.j0, 0, grid.block_kv)])


def _chunked(mask: m.Chunked, at: Context) -> Analysis:
    grid, size = at.grid, mask.size
    first, last = grid.p0 // size, grid.p1 // size
    may = grid.between(first * size, (last + 1) * size)

    def sign(tiles: Tiles) -> Columns:
        reach = grid.block_q // size + grid.block_kv // size + 2
        return [
            cut(tiles.p0, size, grid.block_q),
            cut(tiles.j0, size, grid.block_kv),
            _clipped(tiles.p0 // size - tiles.j0 // size, -reach, reach),
        ]

    return Analysis(may, grid.where(may, first == last), sign)


def cut(start: Ints, size: int, block: int) -> tuple[Ints, int]:
    """Where the first chunk boundary cuts a block; 0 where none does."""
    into = start % size
    return np.where(into + block <= size, 0, size - into), min(size, block) + 1


def _dilated(mask: m.Dilated, at: Context) -> Analysis:
    grid, half, step = at.grid, mask.window // 2, mask.dilation
    reach = min(half * step, FAR)
    # Rows as many as the dilation leave no gaps; fewer see one short interval for each n.
    solid = grid.rows >= step
    first = np.maximum(-half, -(grid.p1 // step))
    last = np.where(solid, first - 1, np.minimum(half, (grid.skv - 1 - grid.p0) // step))
    line, n = ragged(first, np.maximum(last - first + 1, 0))
    spots = grid.scattered(line, grid.p0[line] + n * step, grid.p1[line] + n * step + 1)
    may = union(grid.where(grid.between(grid.p0 - reach, grid.p1 + reach + 1), solid), spots)
    # With a step of 2 or more, two neighbouring rows have no key in common.
    alone = grid.where(may, grid.rows == 1)
    must = grid.between(grid.p1 - reach, grid.p0 + reach + 1) if step == 1 else alone

    def sign(tiles: Tiles) -> Columns:
        return [_edge(tiles, -reach), _edge(tiles, reach), ((tiles.p0 - tiles.j0) % step, step)]

    return Analysis(may, must, sign)


_LEAVES: dict[type[m.Mask], Callable[[Any, Context], Analysis]] = {
    m.Full: _full,
    m.Causal: _causal,
    m.SlidingWindow: _window,
    m.PrefixLM: _prefix,
    m.Padding: _padding,
    m.Chunked: _chunked,
    m.Dilated: _dilated,
}


def register(kind: type[m.Mask], leaf: Callable[[Any, Context], Analysis]) -> None:
    """Give a mask type its closed form."""
    _LEAVES[kind] = leaf
