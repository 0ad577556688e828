"""`attnreg plugins`: what is loaded, from where, and what was set aside with its traceback."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from attnreg import registry
from attnreg.cli import app, console


@app.command()
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Plain data for programs.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Print the traceback of each failure.")] = False,
) -> None:
    """List plugins with their backends, and what was set aside and why."""
    loaded = registry.current()
    if as_json:
        data = {
            "plugins": [
                {
                    "name": p.name,
                    "origin": p.origin,
                    "backends": [e.name for e in loaded.entries.values() if e.plugin == p.name],
                }
                for p in loaded.plugins
            ],
            "failures": [asdict(f) for f in loaded.failures],
            "blocked": list(loaded.blocked),
        }
        typer.echo(json.dumps(data, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("plugin", "from", "backends"):
        table.add_column(column)
    for plugin in loaded.plugins:
        names = [f"{e.name} {e.version}" for e in loaded.entries.values() if e.plugin == plugin.name]
        table.add_row(*map(Text, (plugin.name, plugin.origin, ", ".join(names) or "none")))
    console.print(table)
    for failure in loaded.failures:
        # As Text: a reason may hold "[cuda]", which is no markup.
        console.print(Text.assemble(("set aside", "red"), f" {failure.plugin} at {failure.step}: {failure.reason}"))
        if trace and failure.trace:
            console.print(failure.trace, highlight=False, markup=False)
