"""`attnreg variants`: every kind of attention that the spec can say, and which backends run it here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attnreg.cli import app, console, put, put_json
from attnreg.cli.options import device_here
from attnreg.hardware import detect
from attnreg.sheet import Sheet
from attnreg.targets import target
from attnreg.variants import VARIANTS, markdown, runners


@app.command()
def variants(
    device: Annotated[str, typer.Option(callback=device_here, help="cpu or cuda.")] = "cpu",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The README's table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Plain data for programs.")] = False,
) -> None:
    """List every variant, the spec that says it, and the backends that run it forward and with gradients."""
    hardware = detect(device)
    if as_markdown:
        put(markdown(hardware, target("sm_90")))
        return
    rows: list[dict[str, Any]] = [
        {"name": v.name, "spec": v.code, "forward": runners(v, hardware), "backward": runners(v, hardware, grad=True)}
        for v in VARIANTS
    ]
    if as_json:
        put_json(rows, indent=2)
        return
    sheet = Sheet("variant", "spec", "backends", "with gradients")
    for row in rows:
        sheet.add(row["name"], row["spec"], ", ".join(row["forward"]), ", ".join(row["backward"]))
    sheet.print(console)
