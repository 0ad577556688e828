"""Block sparsity patterns: which blocks of query-key pairs exist at all; what attends is `mask AND sparsity`.

A pattern is defined over blocks. Blocks of positions (BigBird, Strided): block row r = p // block, block column
c = j // block. Blocks of rows (Blocks): r = i // block_q. The last block of either side may be cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attnreg._node import Node, check_int
from attnreg.errors import MissingTensorError
from attnreg.masks import Coords, take

__all__ = ["BigBird", "Blocks", "Dense", "Sparsity", "Strided"]

LIMIT = 2**31
"""Of a block's size and of a count of blocks: their product still fits positions, which are int64."""


class Sparsity(Node):
    """Base of every block sparsity pattern."""

    family: ClassVar[str] = "sparsity"

    def allows(self, c: Coords, skv: int | Tensor) -> Tensor:
        """Bool tensor that broadcasts over the coordinates: True where the block exists.

        skv: keys of a sequence; [B] int64 where the coordinates span sequences of different lengths.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it allows")

    def show(self, sq: int, skv: int, *, width: int = 64, offset: int | None = None, **tensors: Tensor) -> str:
        """A picture of the pattern in text, as `Mask.show` draws it, for batch 0 and head 0."""
        from attnreg._picture import text

        for name in sorted(self.tensors() - tensors.keys()):
            raise MissingTensorError(name, f"{self!r} needs it to be drawn; pass {name}=")
        return text(
            lambda c: self.allows(c, skv), sq, skv, width=width, offset=offset, tensors=tensors, title=repr(self)
        )


@dataclass(frozen=True)
class Dense(Sparsity):
    """Every block exists."""

    kind: ClassVar[str] = "dense"

    def allows(self, c: Coords, skv: int | Tensor) -> Tensor:
        return (c.p == c.p) & (c.j == c.j)


@dataclass(frozen=True)
class Blocks(Sparsity):
    """`block_mask` [B or 1, Hq or 1, nQ, nKV] bool, given at the call, over blocks of rows and of keys.

    nQ = ceil(Sq / block_q), nKV = ceil(Skv / block_kv).
    """

    block_q: int
    block_kv: int
    kind: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        check_int(self, "block_q", 1, LIMIT)
        check_int(self, "block_kv", 1, LIMIT)

    def tensors(self) -> frozenset[str]:
        return frozenset({"block_mask"})

    def allows(self, c: Coords, skv: int | Tensor) -> Tensor:
        return take(c.tensors["block_mask"], c.b, c.h, c.i // self.block_q, c.j // self.block_kv)


@dataclass(frozen=True)
class BigBird(Sparsity):
    """Window, global and random blocks (Zaheer et al. 2020, arXiv:2007.14062).

    `window` blocks centred on the diagonal (window // 2 to each side), the first and last `global_blocks` rows
    and columns of blocks, and in each row `random_blocks` others, drawn once per query head from `seed`. The
    draw depends on the seed, the head, the row and the number of block columns, and on nothing else.
    """

    block: int
    window: int = 3
    global_blocks: int = 1
    random_blocks: int = 3
    seed: int = 0
    kind: ClassVar[str] = "bigbird"

    def __post_init__(self) -> None:
        check_int(self, "block", 1, LIMIT)
        check_int(self, "window", 1, LIMIT)
        check_int(self, "global_blocks", 0, LIMIT)
        check_int(self, "random_blocks", 0, 2**16)  # a table has room for as many a row, drawn or not
        check_int(self, "seed", 0)

    def structural(self, r: Tensor, c: Tensor, columns: int | Tensor) -> Tensor:
        """Window and global blocks: True at block row r, block column c of `columns`."""
        g = self.global_blocks
        near = (r - c).abs() <= self.window // 2
        outer = (c < g) | (c >= columns - g) | ((r >= 0) & (r < g)) | ((r >= columns - g) & (r < columns))
        return near | outer

    def random_columns(self, heads: int, columns: int) -> npt.NDArray[np.int64]:
        """The random block columns [heads, columns (as rows), random_blocks], -1 where a row has too few others."""
        return _draw(self, heads, columns)

    def allows(self, c: Coords, skv: int | Tensor) -> Tensor:
        every = (skv + self.block - 1) // self.block
        columns = every[c.b] if isinstance(every, Tensor) else every
        r = torch.div(c.p, self.block, rounding_mode="floor")
        col = c.j // self.block
        out = self.structural(r, col, columns)
        if not self.random_blocks or not c.j.numel():
            return out
        heads = c.heads or (int(c.h.max()) + 1 if c.h.numel() else 1)
        if isinstance(every, Tensor):
            bound, b = (c.j.numel() + self.block - 1) // self.block, c.b
        else:
            bound, every, b = every, c.j.new_full((1,), every), torch.zeros_like(c.b)
        parameters = [self.block, self.window, self.global_blocks, self.random_blocks, self.seed]
        drawn = _draw_op()(every, bound, heads, parameters)
        inside = (r >= 0) & (r < columns)
        picks = drawn[b, c.h, r.clamp(0, bound - 1)]
        return out | (inside & (picks == col.unsqueeze(-1)).any(-1))


@dataclass(frozen=True)
class Strided(Sparsity):
    """The `local` blocks up to the diagonal (0 <= r - c < local) and every `stride`-th block column (c % stride == 0).

    After Child et al. 2019, arXiv:1904.10509, at block level.
    """

    block: int
    local: int
    stride: int
    kind: ClassVar[str] = "strided"

    def __post_init__(self) -> None:
        for name in ("block", "local", "stride"):
            check_int(self, name, 1, LIMIT)

    def allows(self, c: Coords, skv: int | Tensor) -> Tensor:
        r = torch.div(c.p, self.block, rounding_mode="floor")
        col = c.j // self.block
        return ((r - col >= 0) & (r - col < self.local)) | (col % self.stride == 0)


@functools.cache
def _draw_op() -> Callable[[Tensor, int, int, list[int]], Tensor]:
    """The draw as an operator, so that a trace keeps it: [N] column counts -> [N, heads, bound, random_blocks].

    Column counts may then be symbols, or differ by sequence. `bound` is at least the largest of them.
    """

    @torch.library.custom_op("attnreg::bigbird_columns", mutates_args=())
    def columns_of(counts: Tensor, bound: int, heads: int, parameters: list[int]) -> Tensor:
        pattern = BigBird(*parameters)
        out = np.full((counts.shape[0], heads, bound, pattern.random_blocks), -1, dtype=np.int64)
        for n, count in enumerate(counts.tolist()):
            out[n, :, :count] = pattern.random_columns(heads, count)
        return torch.from_numpy(out).to(counts.device)

    @columns_of.register_fake
    def _(counts: Tensor, bound: int, heads: int, parameters: list[int]) -> Tensor:
        return counts.new_empty((counts.shape[0], heads, bound, BigBird(*parameters).random_blocks))

    return columns_of


def _draw(pattern: BigBird, heads: int, columns: int) -> npt.NDArray[np.int64]:
    """Distinct columns outside window and global blocks, by rejection from a counter-based hash: O(rows)."""
    want, g, half = pattern.random_blocks, pattern.global_blocks, pattern.window // 2
    head = np.arange(heads, dtype=np.uint64)[:, None]
    row = np.arange(columns, dtype=np.int64)[None, :]
    picks = np.full((heads, columns, want), -1, dtype=np.int64)
    first, last = min(g, columns), max(columns - g, min(g, columns))
    low, high = np.maximum(row - half, first), np.minimum(row + half, last - 1)
    others = np.maximum(last - first, 0) - np.maximum(high - low + 1, 0)
    others = np.where((row < g) | (row >= columns - g), 0, others)
    filled = np.zeros((heads, columns), dtype=np.int64)
    goal = np.broadcast_to(np.minimum(others, want), (heads, columns))
    turn = 0
    while (filled < goal).any():
        # The n-th other column is found by stepping over the window, so a draw is always eligible.
        mixed = _mix(_mix(_mix(np.uint64(pattern.seed), head), row.astype(np.uint64)), np.uint64(turn))
        nth = (mixed % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
        column = first + nth
        column = np.where((high >= low) & (column >= low), column + (high - low + 1), column)
        fresh = (filled < goal) & ~(picks == column[..., None]).any(-1)
        at_head, at_row = np.nonzero(fresh)
        picks[at_head, at_row, filled[at_head, at_row]] = column[at_head, at_row]
        filled[at_head, at_row] += 1
        turn += 1
    return picks


def _mix(
    state: npt.NDArray[np.uint64] | np.uint64, value: npt.NDArray[np.uint64] | np.uint64
) -> npt.NDArray[np.uint64]:
    """One round of splitmix64 (Steele, Lea, Flood 2014) over state and value; wraps modulo 2**64 on purpose."""
    with np.errstate(over="ignore"):
        z = np.asarray(state, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(value) + np.uint64(1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return out
