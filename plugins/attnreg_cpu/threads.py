"""How many threads a call may use: torch's number, and one where a fork has left the thread pool behind.

libgomp keeps a pool with the thread that made it, and in a forked child the thread that forked still counts on threads
that are gone: its next parallel region never ends. A fork of a process that has imported this module is noticed by a
hook. A process that was forked without exec and imports it only then may have such a pool, or one that torch has made
since, or none; it finds out before its main thread's first region (all other threads of a child are its own):

- Threads that sleep in the OpenMP runtime belong to a pool of this process: all is well.
- Else a child of its own tries a region of two threads. One that ends shows that there is no pool yet. One that does
  not end shows a pool that its thread has inherited, and as nobody sleeps in it, so has this one.

The sleepers are known by where they wait, which Linux tells; where it does not, or the runtime waits inside libc (on
other CPUs than x86), a pool counts as lost, which is safe and slow.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import torch

from attnreg_cpu import build

FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC of linux/sched.h
PROBE_SECONDS = 1.0


def _forked_without_exec() -> bool:
    """Was this process forked from one that may have imported torch, and not started anew since?"""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return bool(int(fields[6]) & FORKED_WITHOUT_EXEC)
    except (OSError, IndexError, ValueError):
        return False


_pool_lost = False
_pool_unknown = _forked_without_exec()
_threads_at_fork = 1


def thread_count() -> int:
    """Threads of a parallel region that is safe to enter now."""
    threads = 1 if _pool_lost else torch.get_num_threads()
    if _pool_unknown and threads > 1 and threading.get_ident() == threading.main_thread().ident:
        _find_out()
        return 1 if _pool_lost else threads
    return threads


def _find_out() -> None:
    global _pool_lost, _pool_unknown
    entry = build.openmp_entry()
    # Those that have just worked may not sleep yet: they do once the probe has run out of time.
    if entry is not None and not _pool_sleeps() and not _region_ends(entry) and not _pool_sleeps():
        _pool_lost = True
    _pool_unknown = False


def _pool_sleeps() -> bool:
    """Does a thread of this process wait in the OpenMP runtime, as those of a pool do between regions?"""
    code = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if build.is_openmp(line.split(maxsplit=5)[-1]):
                start, end = line.split(maxsplit=1)[0].split("-")
                code.append(range(int(start, 16), int(end, 16)))
    for task in Path("/proc/self/task").glob("*/syscall"):
        with contextlib.suppress(OSError, ValueError):
            # "running", or the call's number and arguments, the stack pointer and the program counter.
            at = int(task.read_text().split()[-1], 16)
            if any(at in part for part in code):
                return True
    return False


def _region_ends(entry: int) -> bool:
    """Does a parallel region of two threads end in a fork of this thread?"""
    # Called with the GIL held, so that the child holds it; os.fork() would run the hooks of others in a child that
    # only tries this. free(NULL) is the region's body: it does nothing, on any thread.
    libc = ctypes.PyDLL(None)
    parallel = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(entry)
    nothing = ctypes.cast(libc.free, ctypes.c_void_p)
    child = libc.fork()
    if child == 0:
        parallel(nothing, None, 2, 0)
        os._exit(0)
    if child < 0:
        return False
    deadline = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < deadline:
        try:
            ended, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:  # it has ended, and a handler of SIGCHLD was told first
            return True
        if ended:
            return status == 0
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return False


def _before_fork() -> None:
    global _threads_at_fork
    try:
        _threads_at_fork = len(os.listdir("/proc/self/task"))
    except OSError:
        _threads_at_fork = 2


def _in_child() -> None:
    # A child has only the thread that forked. An OpenMP runtime that had started others still counts on them, and
    # would wait for ever; one that had started none makes its own.
    global _pool_lost
    _pool_lost = _pool_lost or _threads_at_fork > 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
