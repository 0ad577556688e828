"""The command line: one typer app; each command module registers itself on it."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperGroup

from attnreg import terminal
from attnreg.errors import AttnregError
from attnreg.redaction import hide_argument, redact
from attnreg.sheet import Part, paragraph

__all__ = ["Commands", "app", "console", "main", "put", "put_json", "say"]

Command = TypeVar("Command", bound=Callable[..., Any])


class _Commands(TyperGroup):
    """The commands; whatever they print of their arguments has no passwords in it."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **named: Any) -> Any:
        """Hide the passwords of URLs; the storage asks for them back."""
        given = sys.argv[1:] if args is None else args
        return super().main([hide_argument(argument) for argument in given], *rest, **named)


class Commands(typer.Typer):
    """A typer app whose commands own stdout: what plugins print while one runs goes to stderr."""

    def command(self, *args: Any, **named: Any) -> Callable[[Command], Command]:
        """Register a command, as typer does."""

        def keep(function: Command) -> Command:
            first = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
            register = super(Commands, self).command(*args, **{"short_help": first, **named})  # Click would cut it

            @functools.wraps(function)
            def run(*args: Any, **named: Any) -> Any:
                with terminal.own_stdout(console):
                    return function(*args, **named)

            register(run)
            return function

        return keep


app = Commands(
    name="attnreg",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # its frames cut the names of options on a narrow terminal
    help="One front door to attention: see what was chosen and why, tune it, ship the result.",
)
console = Console(soft_wrap=True, emoji=False)  # ":x:" in a message is no picture


def say(*parts: Part, hang: int = 2) -> None:
    """Print texts, and texts with a style, as one line that wraps between words."""
    paragraph(console, *parts, hang=hang)


def put(text: str) -> None:
    """Print a text as it is: a drawing, a document."""
    console.file.write(text + "\n")


def put_json(data: object, *, indent: int | None = None, sort_keys: bool = False) -> None:
    """Print plain data for programs; what JSON has no word for is printed as text."""
    put(json.dumps(data, indent=indent, sort_keys=sort_keys, default=str))


def main() -> None:
    """Run the command line; an error of attnreg's tree, or of a file, is a message and exit status 2.

    A reader that has gone, as `head` does, ends it quietly.
    """
    from attnreg.cli import commands  # noqa: F401  # importing registers the commands

    terminal.claim_stdout()
    status: Any = 0
    try:
        app()
    except SystemExit as error:
        status = error.code
    except BrokenPipeError:
        pass
    except (AttnregError, OSError) as error:
        print(f"attnreg: {redact(str(error))}", file=sys.stderr)
        status = 2
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        status = 1
    try:
        status = terminal.finish() or status
    except OSError as error:
        if not status:
            print(f"attnreg: {redact(str(error))}", file=sys.stderr)
            status = 2
    sys.exit(status)
