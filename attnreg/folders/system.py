"""What the system says: homes, temporary folders, and what can be done in a folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = [
    "can_write", "home", "home_of", "is_full", "nearest", "no_home", "no_kernels", "temporary_folders", "text",
    "user_id",
]  # fmt: skip

TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
ENOUGH = 1 << 20
"""Bytes that must be free for a folder to be taken for a kernel; the largest takes half of it."""


def no_kernels(folder: Path) -> str:
    """Why no library in it can be loaded."""
    system = _system_of(folder)
    noexec = system is not None and system.f_flag & getattr(os, "ST_NOEXEC", 0)
    return "its file system is mounted noexec, so nothing in it can be loaded" if noexec else ""


def is_full(path: Path) -> bool:
    system = _system_of(nearest(path))
    # Some file systems, such as /proc and FUSE's, tell nothing.
    return system is not None and system.f_blocks > 0 and system.f_bavail * system.f_frsize < ENOUGH


def _system_of(folder: Path) -> os.statvfs_result | None:
    try:
        return os.statvfs(folder)
    except (OSError, AttributeError):  # Windows has none
        return None


def nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there. Raises OSError where that cannot be told."""
    while not _exists(path):
        path = path.parent
    return path


def _exists(path: Path) -> bool:
    """As Path.exists, but an error other than that it is missing comes out, on every version of Python."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return False
    return True


def can_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def temporary_folders() -> list[Path]:
    """TMPDIR and the system's own. Python's gettempdir() ends at the working directory, where nobody looks for them."""
    if os.name != "posix":
        return [Path(tempfile.gettempdir())]
    own = os.environ.get("TMPDIR", "")
    return list(dict.fromkeys(Path(text) for text in (own, *TEMPORARY) if os.path.isabs(text)))


def user_id() -> int | str:
    return os.geteuid() if hasattr(os, "geteuid") else os.environ.get("USERNAME", "user")


def home() -> Path | None:
    """HOME if it is absolute, else what the password database says; None for a user that it does not know."""
    text = os.environ.get("HOME" if os.name == "posix" else "USERPROFILE", "")
    if os.path.isabs(text):
        return Path(text)
    try:
        import pwd  # absent on Windows

        text = pwd.getpwuid(os.getuid()).pw_dir
    except (ImportError, KeyError):
        return None
    return Path(text) if os.path.isabs(text) else None


def home_of(name: str) -> Path | None:
    text = os.path.expanduser(f"~{name}")
    return Path(text) if os.path.isabs(text) else None


def no_home() -> str:
    return f"HOME is not set, and user {user_id()} is not in the password database"


def text(error: OSError) -> str:
    """What the system says, without the number and the path, which stand beside it."""
    return error.strerror or str(error)
