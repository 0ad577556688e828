"""A chart of a run: one bar a contestant, its time over ours, as self-contained HTML or, with matplotlib, as PNG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnreg.bench.run import OURS, CaseResult
from attnreg.errors import InputError

__all__ = ["check_chart", "write_chart"]

BAR, GAP, LEFT, WIDTH = 16, 26, 300, 560
COLORS = {True: "#0b6e4f", False: "#8d99ae"}


def write_chart(path: Path, results: Sequence[CaseResult], machine: Mapping[str, Any]) -> None:
    """Write the chart; the name's end says the kind. Raises InputError for another end than .html, .svg or .png."""
    check_chart(path)
    if path.suffix == ".png":
        _png(path, results, machine)
    elif path.suffix == ".svg":
        path.write_text(_svg(results, machine), encoding="utf-8")
    else:
        head = '<!doctype html><meta charset="utf-8"><title>attnreg bench</title>'
        path.write_text(
            f'{head}<body style="margin:24px;background:#fff">{_svg(results, machine)}</body>', encoding="utf-8"
        )


def check_chart(path: Path) -> None:
    """Raise InputError for a name that no chart can have, before what it is to show is measured."""
    if path.suffix not in (".html", ".svg", ".png"):
        raise InputError("chart", f"expected a name that ends in .html, .svg or .png, got {str(path)!r}")


def _bars(result: CaseResult) -> list[tuple[str, float]]:
    """Contestants with their time over ours, ours first, then the fastest."""
    rest = sorted(((n, r[1]) for n, r in result.ratios.items()), key=lambda pair: pair[1])
    return [(OURS, 1.0), *rest]


def _svg(results: Sequence[CaseResult], machine: Mapping[str, Any]) -> str:
    """Bars on a scale cut at 8 times our time; a longer one is marked with its figure."""
    most = 8.0
    y, body = 64, []
    for result in results:
        body.append(f'<text x="0" y="{y}" class="case">{html.escape(result.case)}</text>')
        y += 8
        for name, ratio in _bars(result):
            wide = WIDTH * min(ratio, most) / most
            ours = name == OURS or name.startswith("backend ")
            body.append(f'<text x="{LEFT - 8}" y="{y + 12}" class="name">{html.escape(name)}</text>')
            body.append(
                f'<rect x="{LEFT}" y="{y}" width="{wide:.1f}" height="{BAR - 3}" rx="2" fill="{COLORS[ours]}"/>'
            )
            note = f"{ratio:.2f}x" + (" (cut)" if ratio > most else "")
            body.append(f'<text x="{LEFT + wide + 6:.1f}" y="{y + 11}" class="figure">{note}</text>')
            y += BAR
        y += GAP
    one = LEFT + WIDTH / most
    body.append(f'<line x1="{one}" x2="{one}" y1="52" y2="{y - GAP}" stroke="#c1121f" stroke-dasharray="3 3"/>')
    style = (
        "text{font:12px sans-serif;fill:#222}.case{font-weight:600}.name{text-anchor:end;fill:#555}"
        ".figure{font-size:11px;fill:#333}.title{font-size:16px;font-weight:600}"
    )
    where = html.escape(f"{machine['hardware']}, {machine['threads']} threads, {machine['date']}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 110}" height="{y}"><style>{style}</style>'
        f'<text x="0" y="18" class="title">Time over attnreg\'s, paired and interleaved (longer is slower)</text>'
        f'<text x="0" y="38">{where}</text>{"".join(body)}</svg>'
    )


def _png(path: Path, results: Sequence[CaseResult], machine: Mapping[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("chart", "a .png needs matplotlib; install it, or say .html or .svg") from None
    rows = [(r.case if n == OURS else "", n, ratio) for r in results for n, ratio in _bars(r)]
    figure = Figure(figsize=(9, 0.8 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ours = [n == OURS or n.startswith("backend ") for _, n, _ in rows]
    axes.barh(range(len(rows)), [min(x, 8.0) for _, _, x in rows], color=[COLORS[o] for o in ours])
    axes.set_yticks(range(len(rows)), [f"{case}   {name}" if case else name for case, name, _ in rows], fontsize=7)
    for n, (_, _, ratio) in enumerate(rows):
        axes.text(min(ratio, 8.0) + 0.05, n, f"{ratio:.2f}x", va="center", fontsize=6)
    axes.axvline(1.0, color="#c1121f", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("time over attnreg's, paired and interleaved (longer is slower; cut at 8)")
    axes.set_title(f"{machine['hardware']}, {machine['threads']} threads, {machine['date']}", fontsize=9)
    figure.savefig(path, dpi=130)
