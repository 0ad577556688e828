"""Places: which folder holds records and studies ("data") and compiled kernels ("cache"), and what stands in for it.

The folder that variables or the home name comes first; a private one in a temporary folder stands in where that cannot
be used. Which one, and why, is said once a process and by `attnreg doctor`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from attnreg.folders import system

__all__ = [
    "KINDS", "Fault", "Kind", "Report", "child_environ", "chosen", "expand", "full", "named", "places", "ready",
    "refuse", "report", "scratch_file", "tell", "temporary", "to_read",
]  # fmt: skip

Kind = Literal["data", "cache"]
KINDS: tuple[Kind, ...] = ("data", "cache")
VARIABLES: dict[Kind, str] = {"data": "ATTNREG_DATA_DIR", "cache": "ATTNREG_CACHE_DIR"}
XDG: dict[Kind, str] = {"data": "XDG_DATA_HOME", "cache": "XDG_CACHE_HOME"}
AT_HOME: dict[Kind, str] = {"data": ".local/share", "cache": ".cache"}
WHAT: dict[Kind, str] = {"data": "records and studies", "cache": "compiled kernels"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


START = _working_directory()
"""Where the process was when attnreg was imported; relative folders are meant from there, whatever chdir comes."""


@dataclass(frozen=True)
class Fault:
    """A folder that was passed over, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Report:
    """What doctor says of one kind of folder. path: None where nothing is kept."""

    kind: Kind
    what: str
    path: Path | None
    passed: tuple[Fault, ...]
    variable: str


_guard = threading.RLock()
_faults: dict[tuple[Kind, Path], tuple[str, bool]] = {}
_told: set[tuple[Kind, Path | None]] = set()


def expand(text: str) -> Path:
    """The absolute path of what a user wrote: `~` and `~user` are homes, the rest is meant from the start's folder.

    Raises OSError where that home or folder is not known.
    """
    if text.startswith("~"):
        name, _, rest = text[1:].partition("/")
        home = system.home() if not name else system.home_of(name)
        if home is None:
            whose = system.no_home() if not name else f"there is no user {name!r} with a home folder"
            raise FileNotFoundError(errno.ENOENT, f"{text!r}: {whose}")
        return home / rest if rest else home
    path = Path(text)
    if path.is_absolute():
        return path
    if START is None:
        raise FileNotFoundError(errno.ENOENT, f"{text!r} is relative, and the working directory is gone")
    return START / path


def named(kind: Kind) -> Path:
    """The folder that ATTNREG_*_DIR names, else attnreg in XDG_*_HOME, else in the home. Raises OSError where none is.

    The specification of XDG_*_HOME wants a relative path there to be ignored.
    """
    own = os.environ.get(VARIABLES[kind])
    if own:
        return expand(own)
    root = os.environ.get(XDG[kind], "")
    if root.startswith("~"):
        with contextlib.suppress(OSError):
            root = str(expand(root))
    if os.path.isabs(root):
        return Path(root) / "attnreg"
    home = system.home()
    if home is None:
        raise FileNotFoundError(errno.ENOENT, system.no_home())
    if not home.is_dir():  # /nonexistent is the home of system users; root could make it
        raise FileNotFoundError(errno.ENOENT, f"{home} does not exist")
    return home / AT_HOME[kind] / "attnreg"


def places(kind: Kind) -> Iterator[Path]:
    """The folders to try for writing, best first, without those that are known not to do. Nothing is made yet.

    Where kernels are compiled, a disk that is full comes last, as room may be made on it.
    """
    last = []
    for path in _every(kind):
        if isinstance(path, Path) and not _why_not(kind, path):
            if kind == "cache" and system.is_full(path):
                last.append(path)
            else:
                yield path
    yield from last


def chosen(kind: Kind) -> Path | None:
    """The folder to write to, though not made yet; None where there is none at all."""
    return next(places(kind), None)


def to_read(kind: Kind) -> list[Path]:
    """The folders to read from, that which variables or the home name first; a private one only if it is the user's."""
    paths = (path for path in _every(kind) if isinstance(path, Path))
    return [path for path in paths if not _is_private(path) or not _private_fault(path.parent)]


def ready(path: Path) -> Path:
    """Make the folder, with its parents, unless it is there. Raises OSError; for a private one of somebody else too."""
    for folder in (path, *path.parents):
        if _is_private(folder / "x"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            fault = _private_fault(folder)
            if fault:
                raise PermissionError(errno.EPERM, fault or "is gone", str(folder))
    path.mkdir(parents=True, exist_ok=True)
    return path


def refuse(kind: Kind, path: Path, why: str | OSError) -> None:
    """Note that a folder did not do. It is not tried again in this process, unless it only had no room."""
    lasting = not (isinstance(why, OSError) and full(why))
    text = system.text(why) if isinstance(why, OSError) else why
    with _guard:
        _faults[kind, path] = (text, lasting)


def full(error: OSError) -> bool:
    """Is it one of a full disk or quota, which may be over later?"""
    return error.errno in NO_ROOM


def tell(kind: Kind, path: Path | None) -> None:
    """Warn, once a process and folder, where `path` is not the folder that is named, or there is none (None)."""
    passed = _passed(kind, path)
    with _guard:
        if not passed or (kind, path) in _told:
            return
        _told.add((kind, path))
    why = "; ".join(f"{fault.where}: {fault.why}" for fault in passed)
    now = f"are kept in {path}" if path is not None else "are not kept"
    todo = f"Set {VARIABLES[kind]} to a folder that can be used."
    warnings.warn(f"attnreg: {WHAT[kind]} {now} ({why}). {todo}", RuntimeWarning, stacklevel=3)


def report(kind: Kind, path: Path | None = None) -> Report:
    """The folder in use, or `path` of them, and what was passed over before it."""
    path = path if path is not None else chosen(kind)
    return Report(kind, WHAT[kind], path, tuple(_passed(kind, path)), VARIABLES[kind])


def child_environ() -> dict[str, str]:
    """The environment with absolute folders, for a child that starts in whatever folder this process is now."""
    out = dict(os.environ)
    for variable in VARIABLES.values():
        if out.get(variable):
            with contextlib.suppress(OSError):
                out[variable] = str(expand(out[variable]))
    return out


def temporary(*, to_execute: bool = False) -> Path | None:
    """A folder for files that nobody keeps: the first of TMPDIR and the system's that can be written."""
    for path in system.temporary_folders():
        if os.path.isdir(path) and system.can_write(path) and not (to_execute and system.no_kernels(path)):
            return path
    return None


def scratch_file() -> IO[bytes]:
    """An unnamed file to write and read; in memory where no temporary folder can be written."""
    try:
        return tempfile.TemporaryFile(dir=temporary())
    except OSError:
        return os.fdopen(os.memfd_create("attnreg"), "w+b")


def _every(kind: Kind) -> Iterator[Path | Fault]:
    """All candidates, or why what should name the first does not."""
    try:
        yield named(kind)
    except OSError as error:
        yield Fault(os.environ.get(VARIABLES[kind]) or "the home folder", system.text(error))
    for folder in system.temporary_folders():
        yield folder / f"attnreg-{system.user_id()}" / kind


def _passed(kind: Kind, path: Path | None) -> list[Fault]:
    """What stands before `path` and does not do."""
    out: list[Fault] = []
    for found in _every(kind):
        if found == path:
            return out
        if isinstance(found, Fault):
            out.append(found)
        else:
            why = _why_not(kind, found) or _faults.get((kind, found), ("", False))[0]
            why = why or ("its disk is full" if kind == "cache" and system.is_full(found) else "")
            # That a temporary folder is missing is no news; what was tried or should have served is.
            if why and (not _is_private(found) or found.parent.parent.is_dir()):
                out.append(Fault(str(found), why))
    return out


def _why_not(kind: Kind, path: Path) -> str:
    """Why the folder cannot be used, as far as is known without making it; empty if nothing is."""
    with _guard:
        why, lasting = _faults.get((kind, path), ("", False))
    if lasting:
        return why
    if _is_private(path):
        if not os.path.isdir(path.parent.parent):
            return f"there is no folder {path.parent.parent}"
        fault = _private_fault(path.parent)
        if fault:
            return fault
    try:
        there = system.nearest(path)
        if not there.is_dir():
            return f"{there} is no folder" if there != path else "is no folder"
        if not system.can_write(there):
            return "cannot be written" if there == path else f"cannot be made: {there} cannot be written"
        return system.no_kernels(there) if kind == "cache" else ""
    except OSError as error:
        return system.text(error)


def _is_private(path: Path) -> bool:
    """Is it a kind's folder within this user's own folder in a temporary one?"""
    return path.parent.name == f"attnreg-{system.user_id()}" and path.parent.parent in system.temporary_folders()


def _private_fault(folder: Path) -> str:
    """What is wrong with a private folder that is there: anybody may make one of that name in a temporary folder."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return system.text(error)
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is no folder"
    if os.name == "posix" and found.st_uid != os.geteuid():
        return f"{folder} belongs to another user"
    if os.name == "posix" and found.st_mode & 0o077:
        return f"{folder} is open to other users"
    return ""
