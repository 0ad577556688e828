"""Analysis of masks that look pairs or positions up in a table: dense masks, global tokens and documents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attnreg import masks as m
from attnreg.blocks.analysis import Analysis, Columns, Context, decided, register
from attnreg.blocks.grid import Grid, Tiles
from attnreg.blocks.intervals import Ints, KeySets, ragged, union

__all__: list[str] = []

Flags = npt.NDArray[np.bool_]


def runs(flags: Flags) -> tuple[Ints, Ints, Ints]:
    """Stretches of True along the last dimension of [rows, n]: (row, start, end)."""
    edge = np.diff(flags.astype(np.int8), axis=-1, prepend=0, append=0)
    row, start = np.nonzero(edge == 1)
    return row, start, np.nonzero(edge == -1)[1]


def _numbered(flags: Flags) -> tuple[Ints, int]:
    """A number for each row of flags; equal rows have equal numbers."""
    unique, number = np.unique(np.packbits(flags, axis=1), axis=0, return_inverse=True)
    return number.reshape(-1).astype(np.int64), len(unique)


class _Spots:
    """The global positions of each batch: any number of positions, sorted, on lines of `size`."""

    def __init__(self, mask: m.Global, at: Context) -> None:
        grid = at.grid
        if mask.tokens is None:
            table = at.tensors["global_mask"][: grid.batch]
            batch, position = np.nonzero(table)
            self.size = table.shape[-1]
            self.shared = False
        else:
            position = np.asarray(mask.tokens, dtype=np.int64)
            batch = np.zeros_like(position)
            self.size = int(max(position.max(initial=-1) + 1, 1))
            self.shared = True
        self.codes: Ints = batch * self.size + position

    def count(self, b: Ints, first: Ints, last: Ints) -> Ints:
        """How many global positions of batch b lie in first .. last."""
        base = np.zeros_like(b) if self.shared else b * self.size
        low, high = np.clip(first, 0, self.size), np.clip(last + 1, 0, self.size)
        found: Ints = np.searchsorted(self.codes, base + high) - np.searchsorted(self.codes, base + low)
        return found

    def stretches(self, batch: int) -> tuple[Ints, Ints, Ints]:
        """Runs of neighbouring positions: (batch, start, end)."""
        owner, position = self.codes // self.size, self.codes % self.size
        fresh = np.ones(self.codes.size, dtype=bool)
        fresh[1:] = (np.diff(self.codes) != 1) | (np.diff(owner) != 0)
        start = np.flatnonzero(fresh)
        end = np.append(start[1:], self.codes.size)[: start.size] - 1
        out = owner[start], position[start], position[end] + 1
        if not self.shared:
            return out
        copies = np.repeat(np.arange(batch), start.size)
        return copies, np.tile(out[1], batch), np.tile(out[2], batch)

    def patterns(self, b: Ints, start: Ints, width: int) -> tuple[Ints, int]:
        """A number for the flags at positions start .. start + width of batch b; equal flags, equal numbers."""
        where, inverse = np.unique(np.stack([b, start]), axis=1, return_inverse=True)
        position = where[1][:, None] + np.arange(width)
        held = self.count(np.repeat(where[0], width), position.ravel(), position.ravel()) > 0
        number, span = _numbered(held.reshape(-1, width))
        return number[inverse.reshape(-1)], span


def _global(mask: m.Global, at: Context) -> Analysis:
    grid, spots = at.grid, _Spots(mask, at)
    found = spots.count(grid.b, grid.p0, grid.p1)
    batch, start, end = spots.stretches(grid.batch)
    may = union(_shared(grid, batch, *_outward(grid, batch, start, end)), grid.where(grid.universe, found > 0))
    must = union(_shared(grid, batch, *_inward(grid, batch, start, end)), grid.where(grid.universe, found == grid.rows))

    def sign(tiles: Tiles) -> Columns:
        return [
            spots.patterns(tiles.b, tiles.p0, grid.block_q),
            spots.patterns(tiles.b, tiles.j0, grid.block_kv),
        ]

    return Analysis(may, must, sign)


def _crowded(grid: Grid, batch: Ints, start: Ints) -> bool:
    """More stretches than column blocks that they start in: then whole blocks are the cheaper sets."""
    return bool(np.unique(batch * grid.n_kv + np.minimum(start, grid.skv) // grid.block_kv).size * 2 < start.size)


def _outward(grid: Grid, batch: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints]:
    if not _crowded(grid, batch, start):
        return start, end
    return start // grid.block_kv * grid.block_kv, -(-end // grid.block_kv) * grid.block_kv


def _inward(grid: Grid, batch: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints]:
    if not _crowded(grid, batch, start):
        return start, end
    last = np.where(end >= grid.kv_len[batch], end, end // grid.block_kv * grid.block_kv)
    return -(-start // grid.block_kv) * grid.block_kv, last


def _shared(grid: Grid, batch: Ints, start: Ints, end: Ints) -> KeySets:
    """Sets that every line of a batch shares: `batch` is sorted."""
    kept = start < end
    batch, start, end = batch[kept], start[kept], end[kept]
    first = np.searchsorted(batch, np.arange(grid.batch))
    count = np.searchsorted(batch, np.arange(grid.batch), side="right") - first
    line, item = ragged(first[grid.b], count[grid.b])
    return grid.scattered(line, start[item], end[item])


def _document(mask: m.Document, at: Context) -> Analysis:
    grid = at.grid
    if at.packed:
        return Analysis(grid.universe, grid.universe, lambda tiles: [])
    table = at.tensors["document_ids"]
    size = table.shape[-1]
    some, every = [grid.empty()], [grid.empty()]
    for b in range(grid.batch):
        lines = np.flatnonzero((grid.b == b) & (grid.p1 >= 0) & (grid.p0 < size) & (grid.rows > 0))
        found = _documents(table[b], grid, lines)
        if found is None:
            return decided(grid.universe, grid.empty())
        some.append(found[0])
        every.append(found[1])
    may, must = union(*some), union(*every)
    return Analysis(may, must, lambda tiles: _same_document(tiles, table, decided(may, must).sign(tiles)))


def _same_document(tiles: Tiles, table: Ints, state: Columns) -> Columns:
    """Numbers for tiles at document borders: one side lies in one document, so the other side's flags say it all."""
    grid, size = tiles.grid, table.shape[-1]
    number, span = state[0]
    number = number.copy()
    row, key = np.arange(grid.block_q), np.arange(grid.block_kv)
    for start in range(0, number.size, 1 << 16):
        at = start + np.flatnonzero(number[start : start + (1 << 16)] > 1)
        part = tiles[at]
        p = part.p0[:, None] + np.minimum(row, np.maximum(part.rows, 1)[:, None] - 1)
        j = part.j0[:, None] + np.minimum(key, np.maximum(part.keys, 1)[:, None] - 1)
        rows, keys = table[part.b[:, None], np.clip(p, 0, size - 1)], table[part.b[:, None], j]
        inside = (p >= 0) & (p < size)
        by_key = (rows == rows[:, :1]).all(1) & inside.all(1)
        by_row = (keys == keys[:, :1]).all(1) & ~by_key
        for chosen, flags in ((by_key, keys == rows[:, :1]), (by_row, (rows == keys[:, :1]) & inside)):
            if chosen.any():
                alike, many = _numbered(flags[chosen])
                number[at[chosen]] = span + alike
                span += many
    return [(number, span)]


def _documents(ids: Ints, grid: Grid, lines: Ints) -> tuple[KeySets, KeySets] | None:
    """may and must of some lines of one batch; None where the ids are too scattered for intervals to help."""
    start = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])) if ids.size else np.zeros(0, dtype=np.int64)
    end = np.append(start[1:], ids.size)
    _, name = np.unique(ids[start], return_inverse=True)
    by_name = np.argsort(name, kind="stable")
    held = np.bincount(name, minlength=1)
    first_of = np.cumsum(held) - held
    low = np.searchsorted(start, np.maximum(grid.p0[lines], 0), side="right") - 1
    high = np.searchsorted(start, np.minimum(grid.p1[lines], ids.size - 1), side="right") - 1
    at, run = ragged(low, high - low + 1)
    pairs = np.unique(at * max(held.size, 1) + name[run]) if at.size else at
    at, group = pairs // max(held.size, 1), pairs % max(held.size, 1)
    if held[group].sum() > 4 * lines.size * (grid.n_kv + 4):
        return None
    owner, item = ragged(first_of[group], held[group])
    line, run = lines[at[owner]], by_name[item]
    may = grid.scattered(line, start[run], end[run])
    inside = (grid.p0 >= 0) & (grid.p1 < ids.size)
    alone = np.zeros(grid.lines, dtype=bool)
    alone[lines] = np.bincount(at, minlength=lines.size) == 1
    return may, grid.where(may, alone & inside)


def _dense(mask: m.Dense, at: Context) -> Analysis:
    """Whole tiles that are all False or all True; the others are read again, tile by tile."""
    grid, table = at.grid, at.tensors["attn_mask"]
    table = table.reshape((1,) * (4 - table.ndim) + table.shape)
    n_b, n_h = table.shape[:2]
    lead = [_tiles_of(table[b, h], grid) for b in range(min(n_b, grid.batch)) for h in range(min(n_h, grid.heads))]
    row = grid.i0 // grid.block_q
    own = (grid.b if n_b > 1 else 0) * n_h + (grid.h if n_h > 1 else 0)
    sets = []
    for n in range(2):
        line, start, end = runs(np.stack([pair[n] for pair in lead])[own, row])
        sets.append(grid.scattered(line, start * grid.block_kv, end * grid.block_kv))
    return decided(sets[0], sets[1])


def _tiles_of(table: Flags, grid: Grid) -> tuple[Flags, Flags]:
    """(any, all) of each tile [n_q, n_kv] of a mask [sq or 1, skv or 1]."""
    wide = table.shape[1] > 1
    keys = np.arange(0, table.shape[1], grid.block_kv)
    some = np.logical_or.reduceat(table, keys, axis=1) if wide else table
    every = np.logical_and.reduceat(table, keys, axis=1) if wide else table
    if table.shape[0] > 1:
        rows = np.arange(0, table.shape[0], grid.block_q)
        some, every = np.logical_or.reduceat(some, rows, axis=0), np.logical_and.reduceat(every, rows, axis=0)
    shape = (grid.n_q, grid.n_kv)
    return np.broadcast_to(some, shape), np.broadcast_to(every, shape)


register(m.Dense, _dense)
register(m.Global, _global)
register(m.Document, _document)
