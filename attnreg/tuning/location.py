"""Where studies are kept, as people write it: a journal file or a database URL, and nothing that only looks so."""

from __future__ import annotations

import os
import re
from pathlib import Path

from attnreg.errors import InputError
from attnreg.folders import expand
from attnreg.redaction import hide, redact, reveal

__all__ = ["is_database", "location", "shown"]

DATABASES = ("postgresql", "mysql", "mariadb", "oracle", "mssql", "sqlite")
MEANT = {
    "postgres": "postgresql",
    "postgre": "postgresql",
    "psql": "postgresql",
    "pg": "postgresql",
    "sqlite3": "sqlite",
}
EXPECTED = "expected a journal file or a database URL such as postgresql://host/name"

_URL = re.compile(r"([A-Za-z][A-Za-z0-9.\-]*)((?:\+[A-Za-z0-9_]+)?)://(.*)", re.DOTALL)
_SCHEME = re.compile(r"['\"]?([A-Za-z][A-Za-z0-9+.\-]+)\s*:")
_SLASHES = re.compile(rf"(?i)['\"]?(?:{'|'.join((*DATABASES, *MEANT))})(?:\+\w+)?\s*//")
_LOGIN = re.compile(r":[^@]*@")


def location(where: str | Path) -> str | Path:
    """The URL (a str) or the absolute path of a journal. Raises InputError, without a password, for what is neither."""
    text = reveal(str(where))
    why = _fault(text, isinstance(where, Path))
    if why:
        raise InputError("storage", f"{EXPECTED}, got {hide(text)!r}: {why}")
    found = _URL.match(text)
    if found:
        hide(text)  # so that errors of drivers, which repeat passwords in their own ways, are told without
        return f"{found[1].lower()}{found[2]}://{found[3]}"
    try:
        return expand(text) if text.startswith("~") else Path(text)
    except OSError as error:
        raise InputError("storage", f"{EXPECTED}, got {error.strerror}") from None


def is_database(where: str | Path | None) -> bool:
    """Is it a URL?"""
    return isinstance(where, str) and _URL.match(where) is not None


def shown(where: str | Path) -> str:
    """The place without its password, for messages."""
    return hide(str(where))


def _fault(text: str, is_path: bool) -> str:
    """Why the text is neither a URL that we take nor a file; empty if it is one."""
    if not text.strip():
        return "it is empty"
    found = _URL.match(text)
    if found:
        return _of_url(found[1].lower(), found[3])
    if "://" in text:
        return "a URL begins with its scheme"
    if os.name == "nt" and re.match(r"[A-Za-z]:[\\/]", text):
        return ""
    if _LOGIN.search(text) or redact(text) != text:
        return "it looks like a database URL and is none: a scheme, a colon and two slashes come first"
    scheme = _SCHEME.match(text.lstrip())
    if scheme and not (is_path and "/" not in text):
        file = "give the absolute path of a file of that name"
        return f"what begins with {scheme[1]}: is no file name, and a URL goes on with two slashes; {file}"
    if _SLASHES.match(text.lstrip()):
        return "a URL has a colon before its slashes"
    return ""


def _of_url(scheme: str, rest: str) -> str:
    """What is wrong with a URL. Whoever reads it must not be able to take a part of the password for something else."""
    if scheme not in DATABASES:
        meant = f"did you mean {MEANT[scheme]}://? " if scheme in MEANT else ""
        return f"{meant}databases are {', '.join(DATABASES)}"
    if re.search(r"[\s\"'<>\\]", rest):
        return "a URL holds no spaces, quotes or backslashes; in a password they are written as %20, %22, %27 and %5C"
    authority, tail = re.match(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]  # matches anything
    path, _, query = tail.partition("?")
    if scheme == "sqlite":
        return "sqlite has no host: sqlite:///relative.db or sqlite:////absolute.db" if authority else ""
    login, _, host = authority.rpartition("@")
    if "@" in login or re.search("[@:;]", path) or "#" in rest:
        return "user, password and host stand behind two slashes; a password writes @ %40, : %3A, / %2F, # %23, ? %3F"
    port = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?", host)
    if port is None:
        return "a host is a name and perhaps a colon and the number of a port"
    if query and not all("=" in part for part in re.split("[&;]", query)):
        return "behind the ? stand name=value pairs, joined by &"
    return ""
