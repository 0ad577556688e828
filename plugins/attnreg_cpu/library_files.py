"""The files of compiled libraries: where they lie, how they are named, and how a damaged one is known.

A library ends in a seal, a digest of all before it. The loader reads nothing behind the last section; but it maps a
file that was cut short as if it were whole, and the process dies of reading there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from attnreg import folders

MARK = b"attnreg library\n"
SEAL_SIZE = len(MARK) + hashlib.sha256().digest_size
NAME = re.compile(r"[a-z]+-[0-9a-f]{24}-[0-9a-f]{8}\.so")


LOCK_SECONDS = 900.0
"""A compiler has 300 s; whoever holds a lock for longer hangs, and is not waited for."""

_refused: dict[tuple[Path, int, int], str] = {}


def cache_dir() -> Path:
    """Where libraries are written: cpu in attnreg's folder of compiled kernels, or in what stands in for that.

    Raises OSError where there is none.
    """
    folder = folders.chosen("cache") or next(iter(folders.to_read("cache")), None)
    if folder is None:
        raise FileNotFoundError(errno.ENOENT, "no folder can keep compiled kernels")
    return in_folder(folder)


def in_folder(folder: Path) -> Path:
    """Where libraries lie in one of attnreg's folders of compiled kernels."""
    return folder / "cpu"


def read_dirs() -> list[Path]:
    """Where libraries are looked for, the named folder first."""
    return [in_folder(folder) for folder in folders.to_read("cache")]


def where() -> str:
    """The folders that libraries are looked for in, in words: the first, and others that are there."""
    found = read_dirs()
    return " and ".join(str(path) for n, path in enumerate(found) if n == 0 or path.is_dir()) or "no folder"


def path_of(source: str, key: str, made_by: str) -> Path:
    """The library of `source` under a key of 24 hex digits, by a compiler of which `made_by` is a digest of 8.

    Raises OSError where no folder can keep it.
    """
    return cache_dir() / f"{Path(source).stem}-{key}-{made_by}.so"


def found(name: str) -> Path | None:
    """The library of that name in whichever folder holds it whole; None where none does."""
    return next((path for path in of_name(name) if serves(path)), None)


def of_name(name: str) -> list[Path]:
    """Where the library of that name may lie."""
    return [folder / name for folder in read_dirs()]


def of_key(source: str, key: str) -> list[Path]:
    """The libraries of `source` under a key by whatever compilers, whole or damaged, the newest first."""
    dated = []
    for folder in read_dirs():
        for path in folder.glob(f"{Path(source).stem}-{key}-*.so"):
            with contextlib.suppress(OSError):  # gone meanwhile
                dated.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(dated, reverse=True)]


def libraries() -> list[Path]:
    """Every library of the caches, by name; those of releases that named and ended them otherwise are left out."""
    every = (path for folder in read_dirs() for path in folder.glob("*.so"))
    return sorted(path for path in every if NAME.fullmatch(path.name))


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


def copy(path: Path, to: Path) -> Path:
    """A whole copy of a library at `to`, which may be there already. Raises OSError."""
    if not is_whole(to):
        with tempfile.TemporaryDirectory(dir=folders.ready(to.parent), prefix=to.stem, suffix=".tmp") as scratch:
            os.replace(shutil.copyfile(path, Path(scratch) / to.name), to)
    return to


def serves(path: Path) -> bool:
    """Does a whole library lie at `path`, which has not been found to be one that cannot be loaded?"""
    return is_whole(path) and not why_refused(path)


def refuse(path: Path, why: str) -> None:
    """Note that a library cannot be loaded here; the file is not tried again unless it changes."""
    _refused[_version(path)] = why


def why_refused(path: Path) -> str:
    """Why the library at `path` cannot be loaded; empty where that is not known."""
    return _refused.get(_version(path), "") if _refused else ""


def locked(path: Path) -> contextlib.AbstractContextManager[bool]:
    """Hold the lock file, waiting for whoever has it; without where there is no lock to be had.

    A library appears whole, by rename, so that the lock only spares compiling twice.
    """
    return folders.locked(path, LOCK_SECONDS, needed=False)


def _version(path: Path) -> tuple[Path, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return path, 0, 0
    return path, stat.st_ino, stat.st_mtime_ns


@functools.cache
def _is_sealed(path: Path, *version: int) -> bool:
    text = path.read_bytes()
    return len(text) > SEAL_SIZE and text[-SEAL_SIZE:] == _seal_of(text[:-SEAL_SIZE])


def _seal_of(text: bytes) -> bytes:
    return MARK + hashlib.sha256(text).digest()
