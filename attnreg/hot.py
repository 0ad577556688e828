"""The hot table: what past calls decided, by the keys that a call's signature makes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg import modes, registry, store
from attnreg.decide import Decision
from attnreg.operands import Kind, dispatch_keys
from attnreg.problem import bucket_size
from attnreg.spec import AttentionSpec
from attnreg.validate import Sizes

__all__ = [
    "Entry",
    "Forced",
    "HotTable",
    "Run",
    "Settled",
    "clear",
    "exact_key",
    "forced",
    "fresh_table",
    "growing_key",
    "table",
]

Run = Callable[..., Any]
Forced = tuple[str, tuple[tuple[str, Any], ...] | None]

forced: ContextVar[Forced | None] = ContextVar("attnreg_forced", default=None)
"""The backend that `use_backend` asks for, with its configuration: part of every key."""

_autocast_on: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu")
)
_grad_on: Callable[[], bool] = getattr(torch._C, "is_grad_enabled", torch.is_grad_enabled)
_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms
_strides: Callable[[Tensor], tuple[int, ...]] = torch.Tensor.stride
"""Of tensors alone: a proxy of torch.fx, whose own method would be recorded, is a TypeError."""


@dataclass(frozen=True)
class Settled:
    """What a bucket was given: a callable, the decision, and when a backend that was set aside is tried again.

    again: of time.monotonic(); None where nothing is tried again.
    """

    run: Run
    decision: Decision
    again: float | None = None


Entry = tuple[Run, Sizes | None, Kind, Kind, Kind]
"""What a signature was given: a callable, the sizes that values are checked against, and the kinds of q, k and v."""


class Turn:
    """A bucket's lock, and how many hold it or wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.takers = 0


class Bounded(dict[Any, Any]):
    """A dict that starts over when it is full."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.limit and key not in self:
            self.clear()
        super().__setitem__(key, value)


class HotTable:
    """What past calls decided, in three tables, none of which grows past EXACT_LIMIT entries.

    exact: by the whole signature, one dict hit a call. A signature is checked once; see Entry.
    growing: by the signature less the KV length, whose bucket stands for it: a decode step, without a new check.
    buckets: by the problem's bucket, with the decision; `misses` counts what was not found even there.
    recorded: kernels of calls that come back out of a recorded graph. failures: what a backend that may be tried again
    said last, by bucket and backend.
    """

    EXACT_LIMIT = 8192

    def __init__(self) -> None:
        self.exact: dict[Any, Entry] = {}
        self.growing: dict[Any, Entry] = {}
        self.buckets: dict[Any, Settled] = Bounded(self.EXACT_LIMIT)
        self.recorded: dict[Any, Any] = Bounded(self.EXACT_LIMIT)
        self.failures: dict[Any, str] = Bounded(self.EXACT_LIMIT)
        self.locks: dict[Any, Turn] = {}
        self.guard = threading.Lock()
        self.misses = 0

    @contextlib.contextmanager
    def lock(self, key: Any) -> Iterator[None]:
        """One lock a bucket, so that concurrent first calls decide once and others do not wait.

        The last who takes a turn drops it: by then the bucket is stored, or the next call decides anew.
        """
        with self.guard:
            turn = self.locks.setdefault(key, Turn())
            turn.takers += 1
        try:
            with turn.lock:
                yield
        finally:
            with self.guard:
                turn.takers -= 1
                if not turn.takers:
                    del self.locks[key]

    def remember(self, key: Any, entry: Entry) -> None:
        """Keep an exact signature; a full table starts over, and the next calls find their buckets."""
        if len(self.exact) >= self.EXACT_LIMIT:
            self.exact, self.growing = {}, {}
        self.exact[key] = entry


_table = HotTable()


def table() -> HotTable:
    """The table in force."""
    return _table


def clear() -> None:
    """Forget every decision; the next calls decide again."""
    global _table
    _table = HotTable()


@contextlib.contextmanager
def fresh_table() -> Iterator[HotTable]:
    """An empty hot table for the length of the block, for tests and recorders."""
    global _table
    before, _table = _table, HotTable()
    try:
        yield _table
    finally:
        _table = before


registry.on_change(clear)
store.on_change(clear)
modes.on_change(clear)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=clear)  # a lock held by another thread at the fork would never open


def exact_key(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """What validity and choice can depend on, but for values; one flat tuple, since this is the hot path.

    What kinds of tensor q, k and v are is asked of the entry (see Entry). What else a call may depend on keeps it
    from the table: see `tracing.ordinary`.
    """
    return (
        spec, q.shape, k.shape, v.shape, _strides(q), _strides(k), _strides(v), q.dtype, k.dtype, q.device,
        q.requires_grad, k.requires_grad, _grad_on(), _deterministic(), forced.get(), _autocast_on(),
        tuple([_signature(n, x) for n, x in tensors.items()]) if tensors else None,
    )  # fmt: skip


def growing_key(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The exact key with the bucket of Skv for Skv; None where a longer Skv needs a check of its own."""
    if spec.layout == "thd" or spec.page_size is not None or not q.dim() == k.dim() == v.dim() == 4:
        return None
    axis = 1 if spec.layout == "bshd" else 2
    a, b = k.shape, v.shape
    n = a[axis]
    if b[axis] != n:
        return None
    return (
        spec, q.shape, a[:axis], a[axis + 1 :], b[:axis], b[axis + 1 :], bucket_size(n), n == q.shape[axis], q.stride(),
        k.is_contiguous() or k.stride(), v.is_contiguous() or v.stride(), q.dtype, k.dtype, q.device,
        q.requires_grad, k.requires_grad, _grad_on(), _deterministic(), forced.get(), _autocast_on(),
    )  # fmt: skip


def _signature(name: str, x: Any) -> Any:
    if isinstance(x, Tensor):
        return name, x.shape, x.stride(), x.dtype, x.device, x.requires_grad, type(x), dispatch_keys(x)
    return name, type(x), x if isinstance(x, int) else None  # the type, since True == 1
