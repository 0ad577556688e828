"""Exact evaluation of undecided tiles, in bounded memory, to de-duplicated bit tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attnreg.blocks.analysis import Columns
from attnreg.blocks.grid import Tiles
from attnreg.blocks.intervals import Ints
from attnreg.masks import Coords

__all__ = ["EMPTY", "FULL", "BitTiles", "distinct"]

FULL, EMPTY = -1, -2
PAIRS = 1 << 20  # evaluated at once: some megabytes, which caches hold


def distinct(columns: Columns, size: int) -> tuple[Ints, Ints]:
    """(index of a representative of each class, class of each of `size` tiles) by the tiles' numbers."""
    code, span = np.zeros(size, dtype=np.int64), 1
    for value, width in columns:
        if span * width >= 2**62:
            _, code = np.unique(code, return_inverse=True)
            span = size
        code, span = code * width + value, span * width
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first.astype(np.int64), inverse.reshape(-1).astype(np.int64)


class BitTiles:
    """Evaluates tiles with `allows` and keeps each different bit tile once.

    Bit n of word w of a tile's row says whether key w * 32 + n of the tile may be attended. Rows and keys that do
    not exist hold 0.
    """

    def __init__(self, allows: Callable[[Coords], Tensor], tensors: Mapping[str, Any], packed: bool, device: Any):
        self._allows, self._tensors, self._packed, self._device = allows, tensors, packed, device
        self._index: dict[bytes, int] = {}
        self._counts: list[int] = []

    def evaluate(self, tiles: Tiles) -> Ints:
        """FULL, EMPTY, or the index of the bit tile, for each tile."""
        grid = tiles.grid
        out = np.empty(tiles.line.size, dtype=np.int64)
        step = max(1, PAIRS // (grid.block_q * grid.block_kv))
        for start in range(0, out.size, step):
            out[start : start + step] = self._batch(tiles[slice(start, start + step)])
        return out

    def _batch(self, tiles: Tiles) -> Ints:
        held = self._pairs(tiles)
        count = np.count_nonzero(held, axis=(1, 2))
        out = np.where(count == tiles.rows * tiles.keys, FULL, EMPTY)
        out[count == 0] = EMPTY
        mixed = np.flatnonzero((count > 0) & (out == EMPTY))
        if mixed.size:
            out[mixed] = self._store(held[mixed], count[mixed])
        return out

    def _pairs(self, tiles: Tiles) -> npt.NDArray[np.bool_]:
        """Bool [tiles, block_q, block_kv]: which pairs attend."""
        grid = tiles.grid
        row, key = np.arange(grid.block_q), np.arange(grid.block_kv)
        # Rows and keys past the end are read at the last one that exists, then cut.
        i = grid.i0[tiles.line][:, None] + np.minimum(row, np.maximum(tiles.rows, 1)[:, None] - 1)
        j = tiles.j0[:, None] + np.minimum(key, np.maximum(tiles.keys, 1)[:, None] - 1)
        p = i + grid.offset[tiles.b][:, None]
        there = [torch.from_numpy(np.ascontiguousarray(x)).to(self._device) for x in (tiles.b, tiles.h, i, p, j)]
        b, h, i_, p_, j_ = there
        c = Coords(
            b[:, None, None],
            h[:, None, None],
            i_[:, :, None],
            p_[:, :, None],
            j_[:, None, :],
            self._tensors,
            self._packed,
        )
        shape = (tiles.line.size, grid.block_q, grid.block_kv)
        held: npt.NDArray[np.bool_] = self._allows(c).expand(shape).cpu().numpy()
        if (tiles.rows < grid.block_q).any() or (tiles.keys < grid.block_kv).any():
            held = held & (row < tiles.rows[:, None])[:, :, None] & (key < tiles.keys[:, None])[:, None, :]
        return held

    def _store(self, held: npt.NDArray[np.bool_], count: Ints) -> Ints:
        words = pack(held)
        flat = words.reshape(words.shape[0], -1)
        rows = np.ascontiguousarray(flat).view(np.dtype((np.void, flat.shape[1] * 4))).reshape(-1)
        _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
        number = np.empty(first.size, dtype=np.int64)
        for n, at in enumerate(first):
            key = rows[at].tobytes()
            number[n] = self._index.setdefault(key, len(self._index))
            if number[n] == len(self._counts):
                self._counts.append(int(count[at]))
        return number[inverse.reshape(-1)]

    @property
    def counts(self) -> Ints:
        """Pairs that attend in each bit tile."""
        return np.asarray(self._counts, dtype=np.int64)

    def bits(self, block_q: int, block_kv: int) -> npt.NDArray[np.int32]:
        """int32 [tiles, block_q, ceil(block_kv / 32)]."""
        data = np.frombuffer(b"".join(self._index), dtype="<i4").astype(np.int32)
        return data.reshape(len(self._index), block_q, -(-block_kv // 32))


def pack(held: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Bool [..., n] to int32 [..., ceil(n / 32)], lowest bit first."""
    spare = -held.shape[-1] % 32
    if spare:
        held = np.concatenate([held, np.zeros((*held.shape[:-1], spare), dtype=bool)], axis=-1)
    return np.ascontiguousarray(np.packbits(held, axis=-1, bitorder="little")).view("<i4").astype(np.int32)


def unpack(words: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.bool_]:
    """The inverse of `pack`."""
    data = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    return np.unpackbits(data, axis=-1, count=n, bitorder="little").astype(bool)
