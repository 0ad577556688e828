"""A child process that is asked over one pipe and answers over another: how it starts, and how it is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import IO

__all__ = ["kill", "start"]


def start(
    module: str, environ: Mapping[str, str], output: IO[bytes] | int
) -> tuple[subprocess.Popen[bytes], IO[str], int]:
    """Run `python -m module FD_IN FD_OUT` in a session of its own, with this process's import path.

    environ: what else its environment holds. output: where stdout and stderr go. Returns the process, the text file
    that it reads, and the descriptor that it writes to; the caller closes both.
    """
    child_in, mine_out = os.pipe()
    mine_in, child_out = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(child_in), str(child_out)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        pass_fds=(child_in, child_out),
        start_new_session=True,
    )
    os.close(child_in)
    os.close(child_out)
    return process, os.fdopen(mine_out, "w", encoding="utf-8"), mine_in


def kill(process: subprocess.Popen[bytes]) -> int:
    """Kill the process and whatever it started; its status, negative for a signal."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
