"""Analysis of block sparsity patterns, whose blocks need not be the layout's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from attnreg import sparsity as s
from attnreg.blocks.analysis import Analysis, Columns, Context, cut, decided
from attnreg.blocks.grid import Grid, Tiles
from attnreg.blocks.intervals import Ints, KeySets, ragged, sweep
from attnreg.blocks.tables import runs
from attnreg.masks import Coords

__all__ = ["analyse_pattern", "pattern_allows"]


def analyse_pattern(pattern: s.Sparsity, at: Context) -> Analysis | None:
    """The analysis of a block pattern; None where it allows everything."""
    if isinstance(pattern, s.Dense):
        return None
    if isinstance(pattern, s.Blocks) and "block_mask" in at.tensors:
        return _grouped(at.grid, at.grid.i0, pattern.block_q, pattern.block_kv, _listed(pattern, at))
    if isinstance(pattern, s.BigBird):
        return _grouped(at.grid, at.grid.p0, pattern.block, pattern.block, _bigbird(pattern, at.grid))
    if isinstance(pattern, s.Strided):
        return _grouped(at.grid, at.grid.p0, pattern.block, pattern.block, _strided(pattern, at.grid))
    return decided(at.grid.universe, at.grid.empty())


CELLS = 36  # blocks of the pattern that a tile may meet for its numbering to be worth its time

Pieces = tuple[Ints, Ints, Ints]
"""(which piece, first key, end) of the intervals of pieces: a piece is one pattern row of one line."""


def _grouped(grid: Grid, first: Ints, block: int, block_kv: int, keys_of: Callable[[Ints, Ints], Pieces]) -> Analysis:
    """may: in any pattern row that the line meets; must: in all of them. first: each line's first row or position."""
    line, row, count = grid.groups(first, block)
    piece, start, end = keys_of(line, row)
    keys = grid.keys[line[piece]]
    base = piece * grid.stride
    sets = sweep(base + np.clip(start, 0, keys), base + np.clip(end, 0, keys))
    piece = sets.lo // grid.stride
    shift = (line[piece] - piece) * grid.stride
    lo, hi = sets.lo + shift, sets.hi + shift
    may = sweep(lo, hi)
    must = may if line.size == grid.lines else sweep(lo, hi, need=count, stride=grid.stride)
    cells = ((grid.block_q - 1) // block + 2) * ((grid.block_kv - 1) // block_kv + 2)
    if cells > CELLS:
        return decided(may, must)

    def sign(tiles: Tiles) -> Columns:
        return [
            cut(first[tiles.line], block, grid.block_q),
            cut(tiles.j0, block_kv, grid.block_kv),
            *_cells(tiles, sets, count, (grid.block_q - 1) // block + 2, block_kv),
        ]

    return Analysis(may, must, sign)


def _cells(tiles: Tiles, sets: KeySets, count: Ints, rows: int, block_kv: int) -> Columns:
    """Which of the pattern's blocks that a tile meets are live, one column for each."""
    grid = tiles.grid
    piece = (np.cumsum(count) - count)[tiles.line]
    out = []
    for a in range(rows):
        base = (piece + a) * grid.stride
        for c in range((grid.block_kv - 1) // block_kv + 2):
            start = (tiles.j0 // block_kv + c) * block_kv
            keys = grid.keys[tiles.line]
            live = sets.touches(base + np.minimum(start, keys), base + np.minimum(start + block_kv, keys))
            out.append(((live & (a < count[tiles.line])).astype(np.int64), 2))
    return out


def _joined(*some: Pieces) -> Pieces:
    piece, start, end = (np.concatenate([one[n] for one in some]) for n in range(3))
    return piece, start, end


def _listed(pattern: s.Blocks, at: Context) -> Callable[[Ints, Ints], Pieces]:
    grid, table = at.grid, at.tensors["block_mask"]
    n_b, n_h, n_q, n_kv = table.shape
    owner, start, end = runs(table.reshape(n_b * n_h * n_q, n_kv))
    first = np.searchsorted(owner, np.arange(n_b * n_h * n_q))
    held = np.searchsorted(owner, np.arange(n_b * n_h * n_q), side="right") - first

    def keys_of(line: Ints, row: Ints) -> Pieces:
        b = grid.b[line] if n_b > 1 else np.zeros_like(line)
        h = grid.h[line] if n_h > 1 else np.zeros_like(line)
        at_row = (b * n_h + h) * n_q + row
        piece, item = ragged(first[at_row], held[at_row])
        return piece, start[item] * pattern.block_kv, end[item] * pattern.block_kv

    return keys_of


def _bigbird(pattern: s.BigBird, grid: Grid) -> Callable[[Ints, Ints], Pieces]:
    size, half, g = pattern.block, pattern.window // 2, pattern.global_blocks
    many = -(-grid.pattern_keys // size)

    def keys_of(line: Ints, row: Ints) -> Pieces:
        columns = many[grid.b[line]]
        piece = np.arange(line.size)
        zero, end = np.zeros_like(piece), np.full_like(piece, grid.skv)
        whole = ((row >= 0) & (row < g)) | ((row >= columns - g) & (row < columns))
        some = [
            (piece, (row - half) * size, (row + half + 1) * size),
            (piece, zero, zero + g * size),
            (piece, np.maximum((columns - g) * size, 0), end),
            (piece[whole], zero[whole], end[whole]),
        ]
        for n in np.unique(columns) if pattern.random_blocks else ():
            inside = np.flatnonzero((columns == n) & (row >= 0) & (row < n))
            picks = pattern.random_columns(grid.heads, int(n))[grid.h[line[inside]], row[inside]]
            at, _ = np.nonzero(picks >= 0)
            column = picks[picks >= 0]
            some.append((inside[at], column * size, (column + 1) * size))
        return _joined(*some)

    return keys_of


def _strided(pattern: s.Strided, grid: Grid) -> Callable[[Ints, Ints], Pieces]:
    size = pattern.block
    marks = np.arange(0, -(-grid.skv // size), pattern.stride)

    def keys_of(line: Ints, row: Ints) -> Pieces:
        piece = np.arange(line.size)
        every, column = np.repeat(piece, marks.size), np.tile(marks, line.size)
        near = (piece, (row - pattern.local + 1) * size, (row + 1) * size)
        return _joined(near, (every, column * size, (column + 1) * size))

    return keys_of


def pattern_allows(pattern: s.Sparsity, grid: Grid) -> Callable[[Coords], Tensor]:
    """`pattern.allows` for many small calls on a grid: BigBird's draws are made once, for each length that occurs."""
    if not isinstance(pattern, s.BigBird):
        return lambda c: pattern.allows(c, grid.skv)
    many = -(-grid.pattern_keys // pattern.block)
    sizes, which = np.unique(many, return_inverse=True)
    longest = max(int(sizes.max(initial=0)), 1)
    drawn = np.full((sizes.size, grid.heads, longest, pattern.random_blocks), -1, dtype=np.int64)
    for n, size in enumerate(sizes if pattern.random_blocks else ()):
        drawn[n, :, :size] = pattern.random_columns(grid.heads, int(size))
    of_batch = torch.from_numpy(which.reshape(-1).astype(np.int64))
    columns_of, table = torch.from_numpy(many), torch.from_numpy(drawn)

    def allows(c: Coords) -> Tensor:
        columns = columns_of.to(c.b.device)[c.b]
        row = torch.div(c.p, pattern.block, rounding_mode="floor")
        col = c.j // pattern.block
        inside = (row >= 0) & (row < columns)
        out = pattern.structural(row, col, columns)
        picks = table.to(c.b.device)[of_batch.to(c.b.device)[c.b], c.h, row.clamp(0, longest - 1)]
        for n in range(pattern.random_blocks):
            out = out | (inside & (picks[..., n] == col))
        return out

    return allows
