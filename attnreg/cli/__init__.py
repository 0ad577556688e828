"""The command line: one typer app; each command module registers itself on it."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from attnreg.errors import AttnregError

__all__ = ["app", "console", "main"]

app = typer.Typer(
    name="attnreg",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="One front door to attention: see what was chosen and why, tune it, ship the result.",
)
console = Console(soft_wrap=True, emoji=False)  # ":x:" in a message is no picture


def main() -> None:
    """Run the command line; an error of attnreg's tree, or of a file, is a message and exit status 2."""
    from attnreg.cli import commands  # noqa: F401  # importing registers the commands

    try:
        app()
    except (AttnregError, OSError) as error:
        print(f"attnreg: {error}", file=sys.stderr)
        sys.exit(2)
