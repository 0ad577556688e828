"""What an error of a backend means: no memory, a trouble that may pass, or a backend that is broken."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import torch

from attnreg.errors import TransientError

__all__ = ["is_out_of_memory", "is_transient"]

_NO_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator, which raises a plain RuntimeError
    "not enough memory",  # the same on Windows
    "cuda out of memory",
    "hip out of memory",
    "cuda_error_out_of_memory",
    "hiperroroutofmemory",
    "cudaerrormemoryallocation",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "std::bad_alloc",
)
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EAGAIN", "ENOMEM", "EINTR", "EIO", "ESTALE", "ETIMEDOUT", "EBUSY",
    )
    if hasattr(errno, name)
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Does the error, or what caused it, say that memory was short: on the CPU, a GPU, or in a kernel's own scratch?

    Not where the system had none for a process of its own, such as a compiler: that is a trouble that may pass.
    """
    return any(
        isinstance(e, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(e, RuntimeError) and any(text in str(e).lower() for text in _NO_MEMORY))
        for e in _chain(error)
    )


def is_transient(error: BaseException) -> bool:
    """May the same call work later: a full disk, too many open files, a compiler that was interrupted?"""
    return any(isinstance(e, TransientError) or (isinstance(e, OSError) and e.errno in _PASSING) for e in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, nearest first."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
