"""Pictures of masks as SVG, for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from attnreg._picture import ALL, SOME, Allows, Flags, survey

__all__ = ["svg"]


def svg(
    allows: Allows,
    sq: int,
    skv: int,
    *,
    offset: int | None = None,
    tensors: Mapping[str, Any] | None = None,
    packed: bool = False,
    title: str = "",
) -> str:
    """The picture as an SVG image of 64 cells along the longer side; see `survey` for the rest."""
    longest = max(sq, skv)
    rows, columns = (max(1, round(64 * n / longest)) for n in (sq, skv))
    seen = survey(allows, sq, skv, rows, columns, offset=offset, tensors=tensors, packed=packed)
    rows, columns = seen.cells.shape
    cell = 320 / max(rows, columns)
    w, h, x0, y0 = columns * cell, rows * cell, 56, 44
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x0 + max(w, 220) + 16:g} {y0 + h + 40:g}"'
        f' width="{x0 + max(w, 220) + 16:g}" font-family="system-ui, sans-serif" font-size="11" fill="#57606a">',
        f"<title>{escape(title)}</title>",
        f'<text x="{x0}" y="16" font-size="12" font-weight="600">{escape(_short(title))}</text>',
        f'<text x="{x0}" y="{y0 - 6}">0</text><text x="{x0 + w:g}" y="{y0 - 6}" text-anchor="end">{skv} keys</text>',
        f'<text x="{x0 - 6}" y="{y0 + 9}" text-anchor="end">0</text>',
        f'<text x="{x0 - 6}" y="{y0 + h:g}" text-anchor="end">{sq}</text>',
        f'<text x="{x0 - 6}" y="{y0 + h / 2 + 4:g}" text-anchor="end">queries</text>' if h > 60 else "",
        f'<rect x="{x0}" y="{y0}" width="{w:g}" height="{h:g}" fill="#eaeef2" stroke="#8c959f" stroke-width="0.5"/>',
    ]
    for kind, colour in ((SOME, "#79a8dc"), (ALL, "#1f5fa8")):
        path = "".join(
            f"M{x0 + c * cell:g} {y0 + r * cell:g}h{n * cell:g}v{cell:g}h{-n * cell:g}z"
            for r, c, n in _stretches(seen.cells == kind)
        )
        out.append(f'<path d="{path}" fill="{colour}"/>' if path else "")
    for n, (name, colour) in enumerate((("all", "#1f5fa8"), ("some", "#79a8dc"), ("none", "#eaeef2"))):
        out.append(
            f'<rect x="{x0 + n * 56}" y="{y0 + h + 14:g}" width="10" height="10" fill="{colour}" stroke="#8c959f"'
            f' stroke-width="0.5"/><text x="{x0 + n * 56 + 14}" y="{y0 + h + 23:g}">{name}</text>'
        )
    return "".join([*out, "</svg>"])


def _short(title: str) -> str:
    return title if len(title) <= 52 else title[:49] + "..."


def _stretches(flags: Flags) -> Iterator[tuple[int, int, int]]:
    """Runs of True in each row: (row, first column, length)."""
    edge = np.diff(flags.astype(np.int8), axis=1, prepend=0, append=0)
    row, start = np.nonzero(edge == 1)
    end = np.nonzero(edge == -1)[1]
    yield from zip(row.tolist(), start.tolist(), (end - start).tolist(), strict=True)
