"""How many pairs attend, without building a layout: what cost estimates at a first call need, in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks.analysis import Context, analyse, meet
from attnreg.blocks.grid import Grid
from attnreg.blocks.intervals import Ints, KeySets, sweep
from attnreg.blocks.patterns import analyse_pattern

__all__ = ["LivePairs", "live_pairs"]

ROWS = 4096  # read one by one; a longer problem is sampled
INTERVALS = 1 << 16  # at once
CHUNKS = 1 << 16


@dataclass(frozen=True)
class LivePairs:
    """count: pairs of one head that attend. keys: at least as many as the keys that some query attends.

    kind: "exact"; "bound" where a tensor or code that is not known decides, and every pair that it could allow is
    counted; "estimate" where rows were sampled (with such pairs counted too, and keys from the first to the last).
    """

    count: int
    keys: int
    kind: Literal["exact", "bound", "estimate"]


@lru_cache(maxsize=512)
def live_pairs(
    mask: m.Mask,
    sparsity: s.Sparsity | None,
    sq: int,
    skv: int,
    *,
    offset: int | None = None,
    packed: bool = False,
) -> LivePairs:
    """Live pairs of one head (head 0) and batch of `mask` AND `sparsity`, without the call's tensors.

    offset: position of row 0; None is bottom-right, skv - sq. Exact and O(1) in the sizes for conjunctions of Full,
    Causal, SlidingWindow, PrefixLM(n) and Chunked; exact row by row for other static expressions up to 4096
    queries; sampled beyond. A tensor decides in Padding, Document, Dense and their like, code in Custom: there the
    count is an upper bound.
    """
    if not sq or not skv:
        return LivePairs(0, 0, "exact")
    first = skv - sq if offset is None else offset
    if sparsity is None or isinstance(sparsity, (s.Dense, s.Blocks)):
        mine = [part for part in _parts(mask) if not (packed and isinstance(part, m.Document))]
        known = [part for part in mine if not _unknown(part)]
        found = _by_breaks(tuple(known), sq, skv, first)
        if found is not None:
            bound = len(known) < len(mine) or isinstance(sparsity, s.Blocks)
            return replace(found, kind="bound") if bound else found
    return _by_rows(mask, s.Dense() if sparsity is None else sparsity, sq, skv, first, packed)


def _parts(mask: m.Mask) -> tuple[m.Mask, ...]:
    return mask.of if isinstance(mask, m.And) else (mask,)


def _unknown(part: m.Mask) -> bool:
    """Does a tensor or code decide what this leaf allows?"""
    return not part.parts() and bool(part.tensors() or isinstance(part, m.Custom))


def _by_breaks(parts: tuple[m.Mask, ...], sq: int, skv: int, first: int) -> LivePairs | None:
    """Exactly, where each row attends one interval whose ends are piecewise linear in the position.

    Between breaks, where an end passes a constant, the count is linear: an arithmetic series.
    """
    shifts, constants = {0, 1}, {0, skv}
    chunks: list[int] = []
    for part in parts:
        if isinstance(part, m.SlidingWindow):
            shifts |= {-part.left, part.right + 1}
        elif isinstance(part, m.PrefixLM) and part.length is not None:
            constants.add(part.length)
        elif isinstance(part, m.Chunked):
            chunks.append(part.size)
        elif not isinstance(part, (m.Full, m.Causal)):
            return None
    last = first + sq - 1
    largest = max(abs(n) for n in (*shifts, *constants, first, last))
    if sum(sq // size + 2 for size in chunks) > CHUNKS or largest > 2**60:
        return None
    fixed = np.asarray(sorted(constants), dtype=np.int64)
    for size in chunks:
        ends = np.arange(first // size, last // size + 2, dtype=np.int64) * size
        fixed = np.union1d(fixed, ends)
    breaks = np.unique(fixed[:, None] - np.asarray(sorted(shifts), dtype=np.int64))
    start = np.concatenate([[first], breaks[(breaks > first) & (breaks <= last)]])
    end = np.append(start[1:] - 1, last)
    low, high = _ends(parts, start, skv)
    low_, high_ = _ends(parts, end, skv)
    one, two = np.maximum(high - low, 0), np.maximum(high_ - low_, 0)
    terms = zip((end - start + 1).tolist(), (one + two).tolist(), strict=True)
    count = sum(n * both // 2 for n, both in terms)
    seen = sweep(np.concatenate([low, low_]), np.concatenate([high, high_]))
    return LivePairs(count, _hull(seen), "exact")


def _ends(parts: tuple[m.Mask, ...], p: Ints, skv: int) -> tuple[Ints, Ints]:
    """First key and end of what the row at each position attends."""
    low, high = np.zeros_like(p), np.full_like(p, skv)
    for part in parts:
        if isinstance(part, m.Causal):
            high = np.minimum(high, p + 1)
        elif isinstance(part, m.SlidingWindow):
            low, high = np.maximum(low, p - part.left), np.minimum(high, p + part.right + 1)
        elif isinstance(part, m.PrefixLM):
            high = np.minimum(high, np.maximum(p + 1, part.length or 0))
        elif isinstance(part, m.Chunked):
            chunk = p // part.size * part.size
            low, high = np.maximum(low, chunk), np.minimum(high, chunk + part.size)
    return low, high


@dataclass(frozen=True)
class _Rows(Grid):
    """One row out of each stretch of rows, at a place that differs from stretch to stretch."""

    edges: Ints

    @property
    def n_q(self) -> int:
        return self.edges.size - 1

    @cached_property
    def i0(self) -> Ints:
        # Steps of the golden ratio meet every phase of a periodic mask equally often.
        part = np.arange(self.n_q) * 0.6180339887498949 % 1.0
        places: Ints = self.edges[:-1] + (part * np.diff(self.edges)).astype(np.int64)
        return places

    @cached_property
    def rows(self) -> Ints:
        return np.ones(self.n_q, dtype=np.int64)


def _by_rows(mask: m.Mask, sparsity: s.Sparsity, sq: int, skv: int, first: int, packed: bool) -> LivePairs:
    many = min(sq, ROWS, max(16, INTERVALS // _intervals(mask, sparsity, skv)))
    edges = np.asarray([n * sq // many for n in range(many + 1)], dtype=np.int64)
    if many < sq:
        turns = np.asarray(_turns(mask, sparsity, skv), dtype=np.int64) - first
        edges = np.union1d(edges, turns[(turns > 0) & (turns < sq)])
    offset, q_len, kv_len = (np.asarray([n], dtype=np.int64) for n in (first, sq, skv))
    grid = _Rows(sq, skv, 1, 1, 1, 1, offset, q_len, kv_len, kv_len, edges)
    none: Mapping[str, npt.NDArray[Any]] = {}
    at = Context(grid, none, packed)
    whole, pattern = analyse(mask, at), analyse_pattern(sparsity, at)
    if pattern is not None:
        whole = meet(whole, pattern)
    line = whole.may.lo // grid.stride
    a_row = np.bincount(line, _sizes(whole.may), grid.n_q)
    # Python's integers: the sum may pass 2**63.
    count = sum(int(weight) * int(n) for weight, n in zip(np.diff(edges), a_row, strict=True))
    base = line * grid.stride
    seen = sweep(whole.may.lo - base, whole.may.hi - base)
    if grid.n_q < sq:
        return LivePairs(count, _hull(seen), "estimate")
    return LivePairs(
        count, int(_sizes(seen).sum()), "exact" if _sizes(whole.must).sum() == _sizes(whole.may).sum() else "bound"
    )


def _turns(mask: m.Mask, sparsity: s.Sparsity, skv: int) -> list[int]:
    """Positions where rows become of another kind: a stretch must not reach across."""
    turns = [0, skv]
    for part in m.walk(mask):
        if isinstance(part, m.Global) and part.tokens and len(part.tokens) <= ROWS:
            turns += [t for token in part.tokens for t in (token, token + 1)]
    if isinstance(sparsity, s.BigBird):
        columns, g = -(-skv // sparsity.block), sparsity.global_blocks
        turns += [n * sparsity.block for n in (g, columns - g, columns)]
    return turns


def _hull(sets: KeySets) -> int:
    return int(sets.hi.max() - sets.lo.min()) if sets.lo.size else 0


def _sizes(sets: KeySets) -> Ints:
    return sets.hi - sets.lo


def _intervals(mask: m.Mask, sparsity: s.Sparsity, skv: int) -> int:
    """Roughly how many intervals a row has."""
    count = 4
    for part in m.walk(mask):
        if isinstance(part, m.Dilated):
            count += min(part.window, skv // part.dilation) + 1
        elif isinstance(part, m.Global):
            count += len(part.tokens or ())
    if isinstance(sparsity, s.Strided):
        count += skv // (sparsity.block * sparsity.stride)
    elif isinstance(sparsity, s.BigBird):
        count += sparsity.random_blocks + 3
    return count
