"""The files of compiled libraries: where they lie, how they are named, and how a damaged one is known.

A library ends in a seal, a digest of all before it. The loader reads nothing behind the last section; but it maps a
file that was cut short as if it were whole, and the process dies of reading there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

MARK = b"attnreg library\n"
SEAL_SIZE = len(MARK) + hashlib.sha256().digest_size
NAME = re.compile(r"[a-z]+-[0-9a-f]{24}-[0-9a-f]{8}\.so")


def cache_dir() -> Path:
    """Where libraries are kept: `ATTNREG_CACHE_DIR`/cpu, else attnreg/cpu in `XDG_CACHE_HOME` or ~/.cache."""
    own = os.environ.get("ATTNREG_CACHE_DIR")
    if own:
        return Path(own) / "cpu"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "attnreg" / "cpu"


def path_of(source: str, key: str, made_by: str) -> Path:
    """The library of `source` under a key of 24 hex digits, by a compiler of which `made_by` is a digest of 8."""
    return cache_dir() / f"{Path(source).stem}-{key}-{made_by}.so"


def of_key(source: str, key: str) -> list[Path]:
    """The libraries of `source` under a key by whatever compilers, whole or damaged, the newest first."""
    found = []
    for path in cache_dir().glob(f"{Path(source).stem}-{key}-*.so"):
        with contextlib.suppress(OSError):  # gone meanwhile
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def libraries() -> list[Path]:
    """Every library of the cache, by name; those of releases that named and ended them otherwise are left out."""
    return sorted(path for path in cache_dir().glob("*.so") if NAME.fullmatch(path.name))


def seal(path: Path) -> None:
    """Append the seal to what the compiler has written."""
    with open(path, "r+b") as handle:
        handle.write(_seal_of(handle.read()))


def is_whole(path: Path) -> bool:
    """Does a library lie at `path` as it was sealed? It is read once a process, unless the file changes."""
    try:
        found = path.stat()
        return _is_sealed(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError:
        return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file, waiting for whoever has it. Raises OSError where it cannot be written."""
    import fcntl  # absent on Windows, where `supports` refuses before anything is built

    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # A child that was forked meanwhile has the file open too, so closing it here would not release it.
            fcntl.flock(handle, fcntl.LOCK_UN)


@functools.cache
def _is_sealed(path: Path, *version: int) -> bool:
    text = path.read_bytes()
    return len(text) > SEAL_SIZE and text[-SEAL_SIZE:] == _seal_of(text[:-SEAL_SIZE])


def _seal_of(text: bytes) -> bytes:
    return MARK + hashlib.sha256(text).digest()
