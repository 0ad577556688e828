"""Fill memory that nobody wrote with NaN while a candidate runs, so that what it leaves unwritten shows.

Three means, for no one of them reaches every allocation, and none of them changes which code of a candidate runs (a
dispatch mode or a replaced `torch.empty` would: both count as recorders):

- glibc fills what `malloc` and its kin hand out, those of native code and of generated code included
  (`mallopt(M_PERTURB)`, which works at run time). Off elsewhere than on Linux with glibc.
- Memory of the sizes of the results is filled and freed just before, which reaches allocators that keep what they
  get: those of GPUs, and others than glibc's.
- Where the caller says so, torch's own filling in deterministic mode (`run_once.poisoned_allocations`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator

import torch

__all__ = ["filled_memory", "fills_memory"]

M_PERTURB = -6
NAN_BYTES = 0x100
"""glibc fills new memory with the low byte of this number xor 0xff: with 0xff, a NaN in every floating dtype."""


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Within the block, new memory of the process holds bytes of 0xff, where the C library can do so."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(M_PERTURB, NAN_BYTES)
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)


@functools.lru_cache(maxsize=1)
def fills_memory() -> bool:
    """Does memory that torch gets on the CPU come filled with NaN inside `filled_memory`?"""
    with filled_memory():
        return all(bool(torch.empty(count).isnan().all()) for count in (300, 5000, 200_000))


@functools.lru_cache(maxsize=1)
def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # other C libraries lack it, and take mallopt for nothing
        found: Callable[[int, int], int] = library.mallopt
    except (OSError, AttributeError):
        return None
    return found
