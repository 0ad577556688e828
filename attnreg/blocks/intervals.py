"""Sets of keys as sorted half-open intervals, one set a line, all lines laid out on one number line.

Line n with `stride` starts at n * stride, and stride exceeds every set's extent by at least 1, so that intervals of
neighbouring lines never touch. Union, intersection and complement of all lines at once are one sorted sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Ints", "KeySets", "complement", "expand", "intersection", "ragged", "sweep", "union"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KeySets:
    """Disjoint, non-touching, non-empty intervals [lo, hi), sorted; int64 positions on the number line."""

    lo: Ints
    hi: Ints

    def covers(self, start: Ints, end: Ints) -> npt.NDArray[np.bool_]:
        """Does one of the intervals contain [start, end) (not empty)?"""
        if not self.lo.size:
            return np.zeros(start.shape, dtype=bool)
        at = np.searchsorted(self.lo, start, side="right") - 1
        return (at >= 0) & (self.hi[np.maximum(at, 0)] >= end)

    def touches(self, start: Ints, end: Ints) -> npt.NDArray[np.bool_]:
        """Does any of the intervals meet [start, end)?"""
        if not self.lo.size:
            return np.zeros(start.shape, dtype=bool)
        at = np.searchsorted(self.hi, start, side="right")
        return (at < self.lo.size) & (self.lo[np.minimum(at, self.lo.size - 1)] < end)


def sweep(lo: Ints, hi: Ints, need: int | Ints = 1, stride: int = 1) -> KeySets:
    """The points that lie in at least `need` of the intervals [lo, hi), in any order; empty ones are ignored.

    need: one number, or one for each line of `stride`.
    """
    kept = lo < hi
    if not kept.all():
        lo, hi = lo[kept], hi[kept]
    if isinstance(need, int) and need == 1 and bool((lo[1:] > hi[:-1]).all()):
        return KeySets(lo, hi)
    return _sweep(lo, hi, need, stride)


def _sweep(up: Ints, down: Ints, need: int | Ints, stride: int) -> KeySets:
    points = np.concatenate([up, down])
    order = np.argsort(points, kind="stable")
    points = points[order]
    depth = np.cumsum(np.where(order < up.size, 1, -1))
    last = np.ones(points.size, dtype=bool)
    last[:-1] = points[1:] != points[:-1]
    points, depth = points[last], depth[last]
    inside = depth >= (need if isinstance(need, int) else need[points // stride])
    turns = points[np.diff(inside, prepend=False)]
    return KeySets(turns[0::2], turns[1::2])


def union(*sets: KeySets) -> KeySets:
    """What lies in any of the sets."""
    if len(sets) == 1:
        return sets[0]
    return sweep(np.concatenate([s.lo for s in sets]), np.concatenate([s.hi for s in sets]))


def intersection(*sets: KeySets) -> KeySets:
    """What lies in all of the sets."""
    if len(sets) == 1:
        return sets[0]
    return sweep(np.concatenate([s.lo for s in sets]), np.concatenate([s.hi for s in sets]), need=len(sets))


def complement(of: KeySets, universe: KeySets) -> KeySets:
    """What lies in `universe` and not in `of`, which is a part of it."""
    return _sweep(np.concatenate([universe.lo, of.hi]), np.concatenate([universe.hi, of.lo]), 1, 1)


def ragged(first: Ints, count: Ints) -> tuple[Ints, Ints]:
    """For each n the numbers first[n] .. first[n] + count[n] - 1: (which n, the number), flat."""
    owner = np.repeat(np.arange(count.size), count)
    before = np.cumsum(count) - count
    return owner, np.arange(owner.size) - before[owner] + first[owner]


def expand(sets: KeySets, stride: int) -> tuple[Ints, Ints]:
    """Every point of the sets: (line, position within the line)."""
    _, points = ragged(sets.lo, sets.hi - sets.lo)
    return points // stride, points % stride
