"""The command line: one typer app; each command module registers itself on it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from attnreg.errors import AttnregError
from attnreg.redaction import hide_argument, redact

__all__ = ["app", "console", "main"]


class _Commands(TyperGroup):
    """The commands; whatever they print of their arguments has no passwords in it."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **named: Any) -> Any:
        """Hide the passwords of URLs; the storage asks for them back."""
        given = sys.argv[1:] if args is None else args
        return super().main([hide_argument(argument) for argument in given], *rest, **named)


app = typer.Typer(
    name="attnreg",
    cls=_Commands,
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
        print(f"attnreg: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        sys.exit(1)
