"""`attnreg plugins`: what is loaded, from where, and what was set aside with its traceback."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from attnreg import registry
from attnreg.cli import app, console, put_json, say
from attnreg.sheet import Sheet


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
        put_json(data, indent=2)
        return
    sheet = Sheet("plugin", "from", "backends")
    for plugin in loaded.plugins:
        names = [f"{e.name} {e.version}" for e in loaded.entries.values() if e.plugin == plugin.name]
        sheet.add(plugin.name, plugin.origin, ", ".join(names) or "none")
    sheet.print(console)
    if loaded.blocked:
        say(f"blocked by ATTNREG_BLOCK: {', '.join(loaded.blocked)}")
    for failure in loaded.failures:
        say(("set aside", "red"), f" {failure.plugin} ({failure.origin}) at {failure.step}: {failure.reason}")
        if trace and failure.trace:
            say(failure.trace)
