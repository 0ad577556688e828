"""Memory of a process: what it holds now, what its allocators handed out, its peak over a call, what is free."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

__all__ = ["available", "in_use", "peak_over", "resident", "settle"]

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


class _HeapInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns; of these, bytes in blocks mapped apart and bytes in use of the heaps matter."""

    _fields_ = [  # what ctypes asks for
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _heap_info() -> Callable[[], Any] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):  # no glibc, or one before 2.33
        return None
    function.restype = _HeapInfo
    return cast("Callable[[], Any]", function)


def in_use(device: str) -> int | None:
    """Bytes that allocators have handed out and not got back, exactly; None where none tells."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated())
    ask = _heap_info()
    if ask is None:
        return None
    now = ask()
    return int(now.hblkhd + now.uordblks)


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
