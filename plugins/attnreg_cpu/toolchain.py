"""Start the C++ compiler: what its failures mean, and whether it works at all.

Many a machine has a compiler that answers --version and builds nothing: no headers, no linker, a wrapper that lost its
target. So the first build of a process tries a one-line kernel. One that fails is not started again in that process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from attnreg import errors

COMPILE_TIMEOUT = 300.0
TRIAL_TIMEOUT = 60.0
TRIAL = """#include <cmath>
#include <cstdint>
extern "C" __attribute__((visibility("default"))) int attnreg_trial() { return 42; }
"""
# What the system lacks at the moment: no fault of the compiler's, nor of the source.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EIO, errno.EROFS)

_guard = threading.Lock()
_faults: dict[tuple[str, ...], str] = {}


class BuildError(errors.BackendError):
    """The system's compiler is missing, does not work, or refused a kernel source."""


def run(command: Sequence[str], made: Path, timeout: float = COMPILE_TIMEOUT, said: str = "") -> None:
    """Start the compiler, which is to make the file `made`; its own temporary files lie beside that.

    said: what errors call the command; the whole unless given. Raises BuildError with the compiler's words, and OSError
    where the system lacks something, such as room on the disk.
    """
    # Its messages are read, so they have to be English; the system's temporary folder may be full or closed.
    environ = {**os.environ, "LC_ALL": "C", "TMPDIR": str(made.parent)}
    said = said or " ".join(command)
    try:
        done = subprocess.run(
            [*command, "-o", str(made)], capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
            stdin=subprocess.DEVNULL, env=environ,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"compiling took over {timeout:.0f} s: {said}") from error
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise BuildError(f"`{said}` cannot be started: {error}") from error
    if done.returncode != 0:
        lacking = _of_the_system(done.returncode, done.stderr)
        if lacking is not None:
            raise lacking
        raise BuildError(f"`{said}` failed with status {done.returncode}:\n{done.stderr.strip()}")
    if not made.is_file():
        raise BuildError(f"`{said}` ended well and made no file")


def fault(command: Sequence[str]) -> str:
    """Why the compiler is known not to work with these flags; empty where nothing is known."""
    return _faults.get(tuple(command), "")


def prove(command: Sequence[str], folder: Path) -> None:
    """Let the compiler build a one-line kernel with its flags, in `folder`, and load it, once a process.

    Raises BuildError where it cannot, and OSError where it is the folder or the system that cannot.
    """
    key = tuple(command)
    with _guard:
        if key not in _faults:
            try:
                _try(command, folder)
                _faults[key] = ""
            except BuildError as error:
                _faults[key] = f"{command[0]} cannot build and load a one-line kernel: {_short(str(error))}"
        if _faults[key]:
            raise BuildError(_faults[key])


def cannot_execute(error: OSError) -> bool:
    """Does the loader's error say that nothing can be executed where the library lies (noexec, a policy)?"""
    text = str(error)
    return "failed to map segment" in text and "Cannot allocate memory" not in text


def _try(command: Sequence[str], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix="trial", suffix=".tmp") as scratch:
        source, made = Path(scratch) / "trial.cpp", Path(scratch) / "trial.so"
        source.write_text(TRIAL)
        run([*command, str(source)], made, TRIAL_TIMEOUT, said=command[0])
        try:
            answer = ctypes.CDLL(str(made)).attnreg_trial()
        except OSError as error:
            if cannot_execute(error):
                raise OSError(
                    errno.EPERM, "nothing can be loaded from it (is it mounted noexec?)", str(folder)
                ) from error
            raise BuildError(f"what it makes cannot be loaded: {error}") from error
        except AttributeError as error:
            raise BuildError(f"what it makes lacks what was compiled: {error}") from error
        if answer != 42:
            raise BuildError(f"what it makes is wrong: a function that returns 42 gives {answer}")


def _short(text: str) -> str:
    """On one line, and no longer than a reason should be."""
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _of_the_system(status: int, said: str) -> OSError | None:
    """What the system lacked, where that is why the compiler failed."""
    for number in PASSING:
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    if -status in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return OSError(errno.EINTR, f"the compiler was ended by {signal.Signals(-status).name}")
    if status == -signal.SIGKILL or "Killed signal terminated program" in said:
        return OSError(errno.ENOMEM, "the compiler was killed, as where memory is short")
    return None
