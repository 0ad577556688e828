"""Pictures of masks in text, and the coarse survey that they are drawn from.

Small masks are drawn exactly. Above 2**24 pairs a cell is judged by its middle row and column, read in full, and a
grid of points: whatever runs through its middle is seen, however thin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attnreg._coords import Coords
from attnreg.errors import InputError

__all__ = ["ALL", "NONE", "SOME", "TALLEST", "Survey", "draw", "edges_of", "kinds_of", "survey", "text"]

Allows = Callable[[Coords], Tensor]
Flags = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
At = Callable[[Ints, Ints], Flags]

NONE, SOME, ALL = 0, 1, 2
MARKS = "·▒█"
EXACT = 1 << 24
AT_ONCE = 1 << 22
TALLEST = 32
POINTS = 8


@dataclass(frozen=True)
class Survey:
    """What each cell of a coarse grid over sq x skv pairs holds: NONE, SOME or ALL of its pairs."""

    cells: npt.NDArray[np.int8]
    sq: int
    skv: int
    live: int | None
    """Live pairs, where they were counted."""


def survey(
    allows: Allows,
    sq: int,
    skv: int,
    rows: int,
    columns: int,
    *,
    offset: int | None = None,
    tensors: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> Survey:
    """Batch 0 and head 0, on a grid of at most rows x columns cells. offset: position of row 0; None: skv - sq."""
    _check_sizes(sq=sq, skv=skv)
    given = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in (tensors or {}).items()}
    shift = skv - sq if offset is None else offset
    zero = torch.zeros((1, 1), dtype=torch.int64)

    def at(i: Ints, j: Ints) -> Flags:
        row, key = torch.from_numpy(i)[:, None], torch.from_numpy(j)[None, :]
        found = allows(Coords(zero, zero, row, row + shift, key, given, packed))
        flags: Flags = found.expand(i.size, j.size).numpy()
        return flags

    top, left = edges_of(sq, rows), edges_of(skv, columns)
    if sq * skv <= EXACT:
        count = _counts(at, top, left)
        area = np.diff(top)[:, None] * np.diff(left)
        return Survey(kinds_of(count > 0, count == area), sq, skv, int(count.sum()))
    some = np.zeros((top.size - 1, left.size - 1), dtype=bool)
    every = ~some
    for flags, inner in _samples(at, top, left):
        some |= flags
        every &= inner
    return Survey(kinds_of(some, every), sq, skv, None)


def _check_sizes(**sizes: object) -> None:
    for name, n in sizes.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(name, f"expected an integer >= 1, got {n!r}")


def edges_of(n: int, cells: int) -> Ints:
    cells = max(1, min(n, cells))
    return np.arange(cells + 1, dtype=np.int64) * n // cells


def kinds_of(some: Flags, every: Flags) -> npt.NDArray[np.int8]:
    return np.where(every, ALL, np.where(some, SOME, NONE)).astype(np.int8)


def _counts(at: At, top: Ints, left: Ints) -> Ints:
    """Live pairs of each cell, from whole cell rows in bounded memory."""
    keys = np.arange(left[-1])
    out = np.zeros((top.size - 1, left.size - 1), dtype=np.int64)
    for n, rows in _bands(top, keys.size):
        out[n] += np.add.reduceat(np.count_nonzero(at(rows, keys), axis=0), left[:-1])
    return out


def _bands(top: Ints, wide: int) -> Iterator[tuple[int, Ints]]:
    """The rows of each cell row, in pieces of at most AT_ONCE pairs."""
    step = max(1, AT_ONCE // wide)
    for n in range(top.size - 1):
        for start in range(int(top[n]), int(top[n + 1]), step):
            yield n, np.arange(start, min(start + step, int(top[n + 1])))


def _samples(at: At, top: Ints, left: Ints) -> Iterator[tuple[Flags, Flags]]:
    """(some, every) of each cell, by its middle row, its middle column, and points inside and on its corners."""
    keys = np.arange(left[-1])
    shape = (top.size - 1, left.size - 1)
    count = np.zeros(shape, dtype=np.int64)
    for n, row in enumerate((top[:-1] + top[1:]) // 2):
        count[n] = np.diff(np.searchsorted(np.flatnonzero(at(row[None], keys)[0]), left))
    yield count > 0, count == np.diff(left)
    count = np.zeros(shape, dtype=np.int64)
    middle = (left[:-1] + left[1:]) // 2
    for n, rows in _bands(top, middle.size):
        count[n] += np.count_nonzero(at(rows, middle), axis=0)
    yield count > 0, count == np.diff(top)[:, None]
    inside = at(_points(top), _points(left)).reshape(shape[0], POINTS, shape[1], POINTS)
    yield np.asarray(inside.any((1, 3))), np.asarray(inside.all((1, 3)))


def _points(edges: Ints) -> Ints:
    """POINTS places in each cell, evenly, from its first to its last."""
    low, high = edges[:-1, None], edges[1:, None] - 1
    places: Ints = (low + (high - low) * np.arange(POINTS) // (POINTS - 1)).reshape(-1)
    return places


def text(
    allows: Allows,
    sq: int,
    skv: int,
    *,
    width: int = 64,
    offset: int | None = None,
    tensors: Mapping[str, Any] | None = None,
    packed: bool = False,
    title: str = "",
) -> str:
    """The picture in characters, at most `width` of them across; see `survey` for the rest."""
    # A character is twice as tall as wide: so are the cells, unless the mask is small enough for pairs as squares.
    _check_sizes(sq=sq, skv=skv, width=width)
    columns = min(skv, width)
    small = 2 * skv <= width and sq <= TALLEST
    rows = sq if small else max(1, min(TALLEST, sq, round(columns * sq / (2 * skv))))
    seen = survey(allows, sq, skv, rows, columns, offset=offset, tensors=tensors, packed=packed)
    return draw(seen, title=title, wide=2 if small else 1)


def draw(seen: Survey, *, title: str = "", wide: int = 1, unit: str = "pairs", verb: str = "attend") -> str:
    """A survey as lines of text: axes, cells, and a legend."""
    rows, columns = seen.cells.shape
    top = edges_of(seen.sq, rows)
    margin = max(len(str(int(top[-2]))), len("query"))
    lines = [title] if title else []
    lines += [f"{'query':>{margin}} ┌{_ruler(seen.skv, columns, wide)}  key"]
    step = max(1, -(-rows // 8))
    for n in range(rows):
        label = str(int(top[n])) if n % step == 0 else ""
        lines.append(f"{label:>{margin}} │" + "".join(MARKS[kind] * wide for kind in seen.cells[n]))
    lines.append("")
    per = f"each mark {_about(seen.sq, rows)} x {_about(seen.skv, columns)} {unit}"
    share = (
        "" if seen.live is None else f"   {_percent(seen.live, seen.sq * seen.skv)} of {seen.sq} x {seen.skv} {verb}"
    )
    lines.append(f"{' ' * margin}  {MARKS[ALL]} all  {MARKS[SOME]} some  {MARKS[NONE]} none   {per}{share}")
    return "\n".join(line.rstrip() for line in lines)


def _ruler(skv: int, columns: int, wide: int) -> str:
    """Key numbers over their columns, at even steps."""
    left = edges_of(skv, columns)
    room = len(str(skv)) + 2
    step = 1
    while step * wide < room:
        step *= 2
    marks = [str(int(left[n])).ljust(step * wide, "─") for n in range(0, columns, step)]
    marks[-1] = marks[-1].rstrip("─")
    line = "".join(marks)
    if len(line) > columns * wide and len(marks) > 1:
        line = "".join(marks[:-1])
    return line.ljust(columns * wide, "─")


def _about(n: int, cells: int) -> str:
    return str(n // cells) if n % cells == 0 else f"~{round(n / cells)}"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.3g}%" if share < 99.95 or part == whole else "99.9%"
