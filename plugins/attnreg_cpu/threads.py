"""How many threads a call may use: torch's number, and one where a fork has left the thread pool behind."""

from __future__ import annotations

import os

import torch

_pool_lost = False
_threads_at_fork = 1


def thread_count() -> int:
    """Threads of a parallel region that is safe to enter now."""
    return 1 if _pool_lost else torch.get_num_threads()


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
