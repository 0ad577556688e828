"""The grid of tiles: row blocks of queries against column blocks of keys, over the batches and heads that differ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnreg.blocks.intervals import Ints, KeySets, ragged, sweep

__all__ = ["Grid", "Tiles"]


@dataclass(frozen=True)
class Grid:
    """Sizes and positions. A line is one row block of one batch and head: ((b * heads) + h) * n_q + r.

    batch, heads: how many of each are told apart (1 where the pattern does not depend on them). offset, q_len,
    kv_len, pattern_keys: int64 [batch]; the position of row 0, the rows and keys that exist, and the keys that a
    sparsity pattern is laid over.
    """

    sq: int
    skv: int
    block_q: int
    block_kv: int
    batch: int
    heads: int
    offset: Ints
    q_len: Ints
    kv_len: Ints
    pattern_keys: Ints

    @property
    def n_q(self) -> int:
        return -(-self.sq // self.block_q)

    @property
    def n_kv(self) -> int:
        return -(-self.skv // self.block_kv)

    @property
    def stride(self) -> int:
        """The length of a line on the number line of keys."""
        return self.skv + 1

    @property
    def lines(self) -> int:
        return self.batch * self.heads * self.n_q

    @cached_property
    def b(self) -> Ints:
        return np.repeat(np.arange(self.batch), self.heads * self.n_q)

    @cached_property
    def h(self) -> Ints:
        return np.tile(np.repeat(np.arange(self.heads), self.n_q), self.batch)

    @cached_property
    def i0(self) -> Ints:
        """The first row of each line."""
        return np.tile(np.arange(self.n_q) * self.block_q, self.batch * self.heads)

    @cached_property
    def rows(self) -> Ints:
        """How many rows of each line exist."""
        rows: Ints = np.clip(self.q_len[self.b] - self.i0, 0, self.block_q)
        return rows

    @cached_property
    def p0(self) -> Ints:
        """The position of each line's first row."""
        return self.i0 + self.offset[self.b]

    @cached_property
    def p1(self) -> Ints:
        """The position of each line's last row that exists."""
        return self.p0 + np.maximum(self.rows, 1) - 1

    @cached_property
    def keys(self) -> Ints:
        """How many keys each line has; 0 where it has no rows."""
        return np.where(self.rows > 0, self.kv_len[self.b], 0)

    @cached_property
    def universe(self) -> KeySets:
        start = np.arange(self.lines) * self.stride
        return sweep(start, start + self.keys)

    def empty(self) -> KeySets:
        none = np.zeros(0, dtype=np.int64)
        return KeySets(none, none)

    def between(self, start: Ints, end: Ints) -> KeySets:
        """One interval a line, from key `start` up to and without `end`, cut to the keys that exist."""
        base = np.arange(self.lines) * self.stride
        return sweep(base + np.clip(start, 0, self.keys), base + np.clip(end, 0, self.keys))

    def scattered(self, line: Ints, start: Ints, end: Ints) -> KeySets:
        """Any number of intervals, each with its line, cut to the keys that exist."""
        keys, base = self.keys[line], line * self.stride
        return sweep(base + np.clip(start, 0, keys), base + np.clip(end, 0, keys))

    def where(self, sets: KeySets, chosen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> KeySets:
        """The sets of the chosen lines; the other lines' become empty."""
        kept = chosen[sets.lo // self.stride]
        return KeySets(sets.lo[kept], sets.hi[kept])

    def blocks(self, sets: KeySets, *, inner: bool) -> KeySets:
        """The column blocks that the sets fill (inner) or touch, as sets of blocks on lines of n_kv + 1."""
        line = sets.lo // self.stride
        start, end = sets.lo - line * self.stride, sets.hi - line * self.stride
        base = line * (self.n_kv + 1)
        if inner:
            last = np.where(end == self.keys[line], -(-end // self.block_kv), end // self.block_kv)
            return sweep(base - (-start // self.block_kv), base + last)
        return sweep(base + start // self.block_kv, base - (-end // self.block_kv))

    def groups(self, first: Ints, block: int) -> tuple[Ints, Ints, Ints]:
        """Lines cut into a pattern's own row blocks of `block`, where `first` is each line's first row or position.

        Returns (line, pattern row) of each piece, and the number of pieces of each line.
        """
        top = np.floor_divide(first, block)
        count = np.floor_divide(first + np.maximum(self.rows, 1) - 1, block) - top + 1
        line, row = ragged(top, count)
        return line, row, count


@dataclass(frozen=True)
class Tiles:
    """Some tiles of a grid: their lines and their column blocks."""

    grid: Grid
    line: Ints
    col: Ints

    @cached_property
    def b(self) -> Ints:
        return self.grid.b[self.line]

    @cached_property
    def h(self) -> Ints:
        return self.grid.h[self.line]

    @cached_property
    def p0(self) -> Ints:
        return self.grid.p0[self.line]

    @cached_property
    def j0(self) -> Ints:
        return self.col * self.grid.block_kv

    @cached_property
    def rows(self) -> Ints:
        """Rows of each tile that exist."""
        return self.grid.rows[self.line]

    @cached_property
    def keys(self) -> Ints:
        """Keys of each tile that exist."""
        keys: Ints = np.clip(self.grid.keys[self.line] - self.j0, 0, self.grid.block_kv)
        return keys

    def __getitem__(self, at: Ints | slice) -> Tiles:
        return Tiles(self.grid, self.line[at], self.col[at])
