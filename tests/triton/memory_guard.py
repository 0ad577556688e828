"""Every address that an interpreted kernel reads or writes lies in a tensor of its launch, or the test fails.

The interpreter follows any pointer: a read behind a tensor's end mostly finds mapped memory and shows nothing, where a
GPU would fault or take garbage. Here each access is held to the extents (first to last element, not the storage) of the
tensors that the launch was given.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that none of its tensors holds."""


def extents(value: Any) -> Iterator[tuple[int, int]]:
    """First byte and the byte behind the last element of every tensor in nested arguments."""
    if isinstance(value, torch.Tensor):
        if value.numel():
            last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
            yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from extents(one)


def joined(ranges: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted, disjoint ranges as starts and ends."""
    out: list[list[int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    table = np.array(out, dtype=np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


class Guard:
    """The ranges of the launch that runs now, and the check of an access against them."""

    def __init__(self) -> None:
        self.starts, self.ends = joined([])
        self.kernel = ""
        self.accesses = 0

    def check(self, what: str, pointers: Any, mask: Any, size: int) -> None:
        """Raise OutOfBoundsError where an unmasked pointer of `pointers` leaves the ranges."""
        self.accesses += 1
        data, there = np.broadcast_arrays(pointers, mask)
        at = data[there.astype(bool)].astype(np.uint64)
        if not at.size:
            return
        low, high = int(at.min()), int(at.max()) + size
        n = bisect.bisect_right(self.starts, low) - 1
        if n >= 0 and high <= int(self.ends[n]):
            return
        index = np.searchsorted(self.starts, at, side="right").astype(np.int64) - 1
        inside = index >= 0
        inside[inside] = at[inside] + np.uint64(size) <= self.ends[index[inside]]
        if not inside.all():
            off = at[~inside]
            near = self.ends[np.maximum(index[~inside], 0)]
            raise OutOfBoundsError(
                f"{self.kernel}: {what} of {off.size} of {at.size} elements outside its tensors, the first "
                f"{int(off[0]) - int(near[0])} bytes behind the end of the nearest one below"
            )


@contextmanager
def guarded() -> Iterator[Guard]:
    """Check every access of every kernel that starts inside."""
    from triton.runtime import interpreter

    guard = Guard()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        guard.check("load", ptrs.data, mask.data, max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.check("store", ptrs.data, mask.data, max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        return store(self, ptrs, value, mask, *rest)

    def named_call(self: Any, *arguments: Any, **named: Any) -> Any:
        guard.starts, guard.ends = joined(list(extents((*arguments, *named.values()))))
        guard.kernel = self.fn.__name__
        return call(self, *arguments, **named)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store  # type: ignore[method-assign]
    executor.__call__ = named_call  # type: ignore[method-assign]
    try:
        yield guard
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store  # type: ignore[method-assign]
        executor.__call__ = call  # type: ignore[method-assign]
