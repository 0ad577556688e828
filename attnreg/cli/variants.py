"""`attnreg variants`: every kind of attention that the spec can say, and which backends run it here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from attnreg.cli import app, console
from attnreg.cli.options import device_here
from attnreg.hardware import detect
from attnreg.targets import target
from attnreg.variants import VARIANTS, markdown, runners


@app.command()
def variants(
    device: Annotated[str, typer.Option(callback=device_here, help="cpu or cuda.")] = "cpu",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The README's table.")] = False,
) -> None:
    """List every variant, the spec that says it, and the backends that run it forward and with gradients."""
    hardware = detect(device)
    if as_markdown:
        typer.echo(markdown(hardware, target("sm_90")))
        return
    table = Table("variant", "spec", "backends", "with gradients", box=None, pad_edge=False)
    for variant in VARIANTS:
        forward, backward = (", ".join(runners(variant, hardware, grad=grad)) for grad in (False, True))
        table.add_row(variant.name, escape(variant.code), forward, backward)
    console.print(table)
