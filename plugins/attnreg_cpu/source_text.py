"""What the compiler sees of a C++ source of this plugin: the code in include order, without comments and file names."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["code_of"]

_INCLUDE = re.compile(r'#\s*include "([^"]+)"')
# Strings and characters are kept whole, as they may hold what looks like a comment.
_TOKEN = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(?:[ \t]|//[^\n]*|/\*.*?\*/)+""", re.DOTALL)


def code_of(source: str, folder: Path) -> str:
    """The lines of folder/`source` with each header of ours in its include's place, once, as `#pragma once` has it.

    Comments, blank lines, indentation and the names of files leave no trace, so that what a compiler would make the
    same library of has the same text. Raises OSError for a file that is not there.
    """
    return "\n".join(_lines(source, folder, set()))


def _lines(source: str, folder: Path, seen: set[str]) -> list[str]:
    if source in seen:
        return []
    seen.add(source)
    out: list[str] = []
    for line in _without_comments((folder / source).read_text()).split("\n"):
        code = line.strip()
        included = _INCLUDE.match(code)
        if included is not None:
            out += _lines(included.group(1), folder, seen)
        elif code and code != "#pragma once":
            out.append(code)
    return out


def _without_comments(text: str) -> str:
    """Each comment and run of blanks as one space."""
    return _TOKEN.sub(lambda found: found.group(1) or " ", text)
