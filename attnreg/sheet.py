"""Tables and paragraphs for a terminal of any width, in which no value is cut and no word is broken.

A table that is wider than the terminal keeps its narrow columns, and the wide ones stand below each row, on lines of
their own. Into a pipe or a file nothing is folded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from attnreg.terminal import width_of

__all__ = ["Part", "Sheet", "paragraph"]

Part: TypeAlias = "str | tuple[str, str]"
"""A text, or a text and its style."""
GAP = 2
NARROW = 20
"""Columns that a value wants beside its name; with less room it stands under it."""


def paragraph(console: Console, *parts: Part, hang: int = 2) -> None:
    """Print texts, and texts with a style, as one line; what does not fit goes on below, indented by `hang`.

    None is read as markup, for plugins write what they like, and no word is broken.
    """
    width = width_of(console)
    for text in Text.assemble(*parts).split("\n", allow_blank=True):
        first, *rest = _wrapped(text, width, hang)
        _put(console, first)
        for line in rest:
            _put(console, Text(" " * hang).append_text(line))


class Sheet:
    """A table of texts, or texts with a style; a cell may have several lines."""

    def __init__(self, *columns: str, title: str = "", right: Sequence[str] = ()) -> None:
        self.columns = columns
        self.title = title
        self.right = frozenset(right)
        self.rows: list[tuple[Text, ...]] = []

    def add(self, *cells: Part) -> None:
        """A row, with a cell a column."""
        self.rows.append(tuple(Text.assemble(cell) for cell in cells))

    def print(self, console: Console) -> None:
        """Print it as wide as the console is; nothing is cut."""
        if self.title:
            _put(console, Text(self.title, "italic"))
        for line in self._lines(width_of(console)):
            _put(console, line)

    def _lines(self, width: int | None) -> Iterator[Text]:
        widths = [max([cell_len(name), *(_wide(row[n]) for row in self.rows)]) for n, name in enumerate(self.columns)]
        beside = self._beside(widths, width)
        below = [n for n in range(len(widths)) if n not in beside]
        yield self._joined([Text(self.columns[n], "bold") for n in beside], beside, widths)
        for row in self.rows:
            parts = [row[n].split("\n", allow_blank=True) for n in beside]
            for at in range(max(map(len, parts))):
                cells = [lines[at] if at < len(lines) else Text() for lines in parts]
                yield self._joined(cells, beside, widths)
            for n in below:
                yield from self._below(n, row[n], max(cell_len(self.columns[m]) for m in below), width or 0)

    def _beside(self, widths: list[int], width: int | None) -> list[int]:
        """The columns that fit beside one another: the first, and the narrowest of the others."""
        left = list(range(len(widths)))
        while width is not None and len(left) > 1 and sum(widths[n] + GAP for n in left) - GAP > width:
            left.remove(max(left[1:], key=lambda n: widths[n]))
        return left

    def _joined(self, cells: list[Text], columns: list[int], widths: list[int]) -> Text:
        out = Text()
        for n, cell in zip(columns, cells, strict=True):
            pad = " " * (widths[n] - cell_len(cell.plain))
            out.append_text(Text.assemble(pad, cell) if self.columns[n] in self.right else Text.assemble(cell, pad))
            out.append(" " * GAP)
        out.rstrip()
        return out

    def _below(self, column: int, cell: Text, heads: int, width: int) -> Iterator[Text]:
        """A cell on lines of its own, under its row, with its column's name."""
        if not cell.plain:
            return
        name, hang = self.columns[column], 2 + heads + GAP
        label = Text(f"  {name:<{heads}}{' ' * GAP}", "dim")
        if width - hang < NARROW:
            yield Text(f"  {name}", "dim")
            hang, label = 4, Text(" " * 4)
        for line in cell.split("\n", allow_blank=True):
            for part in _wrapped(line, width - hang, 0):
                yield label + part
                label = Text(" " * hang)


def _wide(cell: Text) -> int:
    return max(map(cell_len, cell.plain.split("\n")))


def _wrapped(text: Text, width: int | None, hang: int) -> list[Text]:
    """The text in lines of at most `width` columns, all but the first `hang` narrower, broken between words only."""
    if width is None or cell_len(text.plain) <= width:
        return [text]
    spans: list[tuple[int, int]] = []
    start = end = 0
    for word in re.finditer(r"\S+", text.plain):
        room = max(width - (hang if spans else 0), 1)
        if end and cell_len(text.plain[start : word.end()]) > room:
            spans.append((start, end))
            start = word.start()
        end = word.end()
    return [text[a:b] for a, b in (*spans, (start, end))]


def _put(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True, highlight=False, emoji=False)
