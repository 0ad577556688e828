"""What the command line prints on: any encoding, any width, closed pipes, and plugins that print as well."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich._null_file import NULL_FILE
from rich.console import Console

__all__ = ["claim_stdout", "finish", "own_stdout", "stdout_file", "width_of"]

ENDED_BY_PIPE = 141
"""Exit status of a program whose reader has gone, as shells tell it: 128 + SIGPIPE."""

PLAIN = {
    "─": "-", "━": "-", "│": "|", "┃": "|", "┌": "+", "┐": "+", "└": "+", "┘": "+", "├": "+", "┤": "+", "┬": "+",
    "┴": "+", "┼": "+", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "═": "=", "║": "|", "╸": "-", "╺": "-",
    "█": "#", "▓": "#", "▒": "+", "░": "-", "▀": "#", "▄": "#", "▌": "#", "▐": "#", "·": ".", "•": "*", "●": "*",
    "…": "...", "–": "-", "—": "-", "−": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "×": "x", "÷": "/", "±": "+/-",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "→": "->", "←": "<-", "↑": "^", "↓": "v", "µ": "u", "μ": "u",
    "²": "^2", "³": "^3", "∞": "inf", "√": "sqrt", "°": " deg", "\N{NO-BREAK SPACE}": " ", "✓": "ok", "✗": "x",
}  # fmt: skip
"""What stands for a sign that an encoding lacks; signs of drawings are replaced by one character, so that they line up.
"""
BRAILLE = "\N{BRAILLE PATTERN BLANK}", "\N{BRAILLE PATTERN DOTS-12345678}"
HANDLER = "attnreg.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: the ASCII form of what cannot be encoded, and an escape where there is none."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(sign: str) -> str:
    if BRAILLE[0] <= sign <= BRAILLE[1]:
        return " .:#"[min((bin(ord(sign) - ord(BRAILLE[0])).count("1") + 2) // 3, 3)]
    return PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(HANDLER, _plain)


def any_encoding(stream: object) -> None:
    """Let a stream print everything, whatever its encoding lacks."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=HANDLER)


_kept: io.TextIOWrapper | None = None


def claim_stdout() -> None:
    """Keep the process's standard output for the command's own words; called once, where the command line starts."""
    global _kept
    any_encoding(sys.stdout)  # help and version, which are printed before a command runs
    try:
        standard = sys.stdout.fileno() == 1
    except (AttributeError, OSError, ValueError):  # none, or one that tests have put there
        return
    if standard and _kept is None:
        out = sys.stdout
        kept = os.fdopen(os.dup(1), "wb")  # open as long as the process
        _kept = io.TextIOWrapper(kept, encoding=out.encoding, errors=HANDLER, line_buffering=out.isatty())


@contextlib.contextmanager
def own_stdout(console: Console) -> Iterator[None]:
    """Within: what the console prints goes to stdout, and what anything else prints there goes to stderr.

    Where stdout was claimed that holds for C code and subprocesses as well, and until the process ends: what a plugin
    writes at its exit is no part of the output either. Elsewhere, as in tests, it holds for Python and for the block.
    """
    before, file = sys.stdout, console.file
    if _kept is not None:
        before.flush()
        _point(1, at=2)
    console.file = _kept or before or NULL_FILE  # a process may be started without a stdout
    sys.stdout = sys.stderr
    try:
        yield
        console.file.flush()
    finally:
        if _kept is None:
            sys.stdout = before
            console.file = file


def finish() -> int:
    """Flush stdout at the end; an exit status if its reader has gone, else 0. Raises OSError, as of a full disk."""
    for out in (_kept, sys.stdout):
        if out is None:
            continue
        try:
            out.flush()
        except BrokenPipeError:
            _point(out.fileno())  # what is buffered still would raise again when Python ends
            return ENDED_BY_PIPE
        except OSError:
            _point(out.fileno())
            raise
    return 0


def _point(descriptor: int, at: int | None = None) -> None:
    """Let a file descriptor write where another writes; nowhere, if that is closed or none is said."""
    try:
        if at is not None:
            os.dup2(at, descriptor)
            return
    except OSError:
        pass
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def stdout_file(path: Path) -> Path:
    """The path; that of the kept stdout where it names stdout, which by then leads to stderr."""
    if _kept is not None and str(path) in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        return Path(f"/dev/fd/{_kept.fileno()}")
    return path


def width_of(console: Console) -> int | None:
    """Columns to print in; None where lines may have any length, as in a pipe or a file. COLUMNS overrides both."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    if not console.is_terminal:
        return None
    try:
        return os.get_terminal_size(console.file.fileno()).columns or console.width
    except (OSError, ValueError):
        return console.width
