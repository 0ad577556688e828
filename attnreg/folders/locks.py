"""Locks between processes: the kernel's where the file system has them, a lock file that is made and deleted elsewhere.

The kernel frees its locks with their holder, however that ends, and needs no right to write: another user's lock file
will do. Some network and container file systems have none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

__all__ = ["Lock", "LockTimeoutError", "lacks_flock", "locked"]

LACKING = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
"""What flock answers where there is none; EBADF comes from NFS, for a file that is open for reading."""
POLL = 0.02

_told: set[Path] = set()


class LockTimeoutError(OSError):
    """Somebody else held the lock for too long."""


class Lock:
    """A lock file, between processes and threads; whoever acquires it twice in one thread must release it twice.

    path: made where it is missing, and never deleted. Beside it `<path>.held` comes and goes where the file system has
    no locks of the kernel's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mine = threading.local()

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for the lock; True. Raises LockTimeoutError after `timeout` seconds, OSError where none can be had."""
        held = self._mine.__dict__.setdefault("held", [])
        held.append(held[-1] if held else _take(self.path, timeout))
        return True

    def release(self) -> None:
        """Give it back."""
        held = self._mine.held
        last = held.pop()
        if not held:
            _give(last)


@contextlib.contextmanager
def locked(path: Path, timeout: float | None = None, *, needed: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`; gives True. Raises LockTimeoutError after `timeout` seconds, OSError without any.

    needed: False for work that a lock only spares from being done twice: where there is none to be had, or it is held
    for too long, gives False and lets the work be done.
    """
    lock = Lock(path)
    try:
        got = lock.acquire(timeout)
    except OSError:
        if needed:
            raise
        got = False
    try:
        yield got
    finally:
        if got:
            lock.release()


def lacks_flock(error: OSError) -> bool:
    """Does the error say that the file system has no locks of the kernel's?"""
    return error.errno in LACKING


def _take(path: Path, timeout: float | None) -> int | SoftFileLock:
    """A descriptor that holds the kernel's lock, or the lock file that stands in for it."""
    until = None if timeout is None else time.monotonic() + timeout
    handle = _open(path)
    if handle is not None:
        try:
            _flock(handle, path, until)
            return handle
        except OSError as error:
            os.close(handle)
            if not lacks_flock(error):
                raise
            _tell(path, error)
        except BaseException:
            os.close(handle)
            raise
    soft = SoftFileLock(f"{path}.held", timeout=-1 if until is None else max(0.0, until - time.monotonic()))
    try:
        soft.acquire()
    except Timeout:
        raise _late(path.with_name(path.name + ".held")) from None
    return soft


def _give(held: int | SoftFileLock) -> None:
    if isinstance(held, SoftFileLock):
        held.release()
        return
    import fcntl

    try:
        # A child that was forked meanwhile has the file open too, so closing it here would not release it.
        fcntl.flock(held, fcntl.LOCK_UN)
    finally:
        os.close(held)


def _open(path: Path) -> int | None:
    """The lock file, open; None where it is another user's and closed to us, or the system has no flock."""
    try:
        import fcntl  # noqa: F401  # absent on Windows
    except ImportError:
        return None
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):
            os.fchmod(handle, 0o666)  # it holds nothing, and others who share the folder need it as well
        return handle
    for mode in (os.O_RDWR, os.O_RDONLY):
        with contextlib.suppress(PermissionError):
            return os.open(path, mode | os.O_CLOEXEC)
    return None


def _flock(handle: int, path: Path, until: float | None) -> None:
    import fcntl

    if until is None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise _late(path) from None
        time.sleep(POLL)


def _late(path: Path) -> LockTimeoutError:
    return LockTimeoutError(errno.ETIMEDOUT, "is held by another process", str(path))


def _tell(path: Path, error: OSError) -> None:
    """Say once a folder that its file system has no locks."""
    if path.parent not in _told:
        _told.add(path.parent)
        warnings.warn(
            f"attnreg: {path.parent}: its file system has no flock ({error.strerror}); lock files that come and go "
            "stand in for it. One that a killed process left behind has to be deleted if it is waited for.",
            RuntimeWarning,
            stacklevel=6,
        )
