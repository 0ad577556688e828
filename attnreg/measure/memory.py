"""Memory of a process: what it holds now, its peak over a call, what the machine has free."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["available", "peak_over", "resident", "settle"]

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_libc: Any = None


def resident(pid: int | None = None) -> int:
    """Bytes of physical memory that a process holds; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid or 'self'}/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def available() -> int:
    """Bytes that could be taken without swapping; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def settle(device: str) -> int:
    """Collect garbage, give freed memory back, and say what is held on the device: for comparing before and after."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated())
    global _libc
    if _libc is None and sys.platform == "linux":
        _libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)
    return resident()


def peak_over(call: Callable[[], object], device: str) -> int:
    """The most bytes that were held beyond the start while `call` ran."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return max(int(torch.cuda.max_memory_allocated() - before), 0)
    before = resident()
    if _reset_high_water():
        call()
        return max(_high_water() - before, 0)
    return _sampled(call, before)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _sampled(call: Callable[[], object], before: int) -> int:
    """The peak as a thread sees it; it misses what is taken and given back between two looks."""
    highest, done = before, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return highest - before
