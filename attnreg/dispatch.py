"""attention(): from a call to a prepared callable, through the hot table; prepare() and use_backend()."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_constant

from attnreg import modes, registry, store
from attnreg.decide import Decision, decide
from attnreg.errors import InputError, SpecError, UnsupportedError
from attnreg.hardware import detect
from attnreg.modes import checking
from attnreg.problem import Problem, bucket_size
from attnreg.space import Config
from attnreg.spec import AttentionSpec
from attnreg.tracing import at_trace_time, concrete, hint, is_traced, opaque, same, transform
from attnreg.validate import Sizes, check
from attnreg.values import VALUE_NAMES, check_values

__all__ = ["attention", "clear", "decision", "prepare", "use_backend"]

Run = Callable[..., Any]
Forced = tuple[str, tuple[tuple[str, Any], ...] | None]

_forced: ContextVar[Forced | None] = ContextVar("attnreg_forced", default=None)
register_constant(AttentionSpec)
_autocast_on: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu")
)


class HotTable:
    """What past calls decided, in three tables.

    exact: by the whole signature, one dict hit a call. A signature is checked once; its entry holds the prepared
    callable and, where a call carries integer tensors whose values can be wrong, the sizes to check them against.
    growing: by the signature less the KV length, whose bucket stands for it: a decode step, without a new check.
    buckets: by the problem's bucket, with the decision; `misses` counts what was not found even there.
    """

    EXACT_LIMIT = 8192

    def __init__(self) -> None:
        self.exact: dict[Any, tuple[Run, Sizes | None]] = {}
        self.growing: dict[Any, Run] = {}
        self.buckets: dict[Any, tuple[Run, Decision]] = {}
        self.locks: dict[Any, threading.Lock] = {}
        self.guard = threading.Lock()
        self.misses = 0

    def lock(self, key: Any) -> threading.Lock:
        """One lock a bucket, so that concurrent first calls decide once and others do not wait."""
        with self.guard:
            return self.locks.setdefault(key, threading.Lock())

    def remember(self, key: Any, run: Run, sizes: Sizes | None) -> None:
        if len(self.exact) >= self.EXACT_LIMIT:
            self.exact, self.growing = {}, {}
        self.exact[key] = (run, sizes)


_hot = HotTable()


def clear() -> None:
    """Forget every decision; the next calls decide again."""
    global _hot
    _hot = HotTable()


@contextlib.contextmanager
def fresh_table() -> Iterator[HotTable]:
    """An empty hot table for the length of the block, for tests and recorders."""
    global _hot
    before, _hot = _hot, HotTable()
    try:
        yield _hot
    finally:
        _hot = before


registry.on_change(clear)
store.on_change(clear)
modes.on_change(clear)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=clear)  # a lock held by another thread at the fork would never open


def attention(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
    """Attention as `spec` says, by the fastest backend that is proven correct here.

    q: [B, Hq, Sq, D], k: [B, Hkv, Skv, D], v: [B, Hkv, Skv, Dv] under layout "bhsd"; [B, S, H, D] under "bshd";
    packed [T, H, D] with `cu_seqlens_q/k` [B + 1] under "thd"; k and v [pages, Hkv, page_size, D] with
    `block_table` where the spec has a page_size. float32, float16, bfloat16, float64, or float8 with descales.
    `tensors` are the named tensors that the spec asks for (README, "Tensors at the call").

    Returns the output, [..., Dv] in q's layout and dtype (bfloat16 for float8 q), or (output, lse) where the
    spec says return_lse: natural log, float32, [B, Hq, Sq] (thd: [Hq, T]).

    Raises an error of `attnreg.errors` that names the argument where the call does not fit the spec, and
    UnsupportedError with every backend's reasons where none can run it.
    """
    if torch.compiler.is_compiling():
        _open_graph_call()
        return _graph_call(spec, q, k, v, tensors)
    try:
        hit = _hot.exact.get(_exact_key(spec, q, k, v, tensors)) if transform() is None else None
    except (AttributeError, TypeError):
        hit = None  # not tensors, or symbolic sizes: the slow path says which
    if hit is not None:
        run, sizes = hit
        if sizes is not None:
            check_values(spec, sizes, tensors)
        return run(q, k, v, **tensors)
    if not tensors and isinstance(k, Tensor) and isinstance(v, Tensor) and not is_traced(q, k, v):
        longer = _hot.growing.get(_growing_key(spec, q, k, v))
        if longer is not None:
            _hot.remember(_exact_key(spec, q, k, v, tensors), longer, None)
            return longer(q, k, v)
    return _slow(spec, q, k, v, tensors)


def _exact_key(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """All that validity and choice can depend on, but for values; one flat tuple, since this is the hot path."""
    return (
        spec, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, q.requires_grad, k.requires_grad, v.requires_grad, torch.is_grad_enabled(),
        _forced.get(), _autocast_on(), tuple([_signature(n, x) for n, x in tensors.items()]) if tensors else None,
    )  # fmt: skip


def _growing_key(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The exact key with the bucket of Skv for Skv; None where a longer Skv needs a check of its own."""
    if spec.layout == "thd" or spec.page_size is not None or k.dim() != 4 or v.dim() != 4:
        return None
    axis = 1 if spec.layout == "bshd" else 2
    a, b = k.shape, v.shape
    n = a[axis]
    if b[axis] != n:
        return None
    return (
        spec, q.shape, a[:axis], a[axis + 1 :], b[:axis], b[axis + 1 :], bucket_size(n), n == q.shape[axis], q.stride(),
        k.is_contiguous() or k.stride(), v.is_contiguous() or v.stride(), q.dtype, k.dtype, v.dtype, q.device,
        k.device, v.device, q.requires_grad, k.requires_grad, v.requires_grad, torch.is_grad_enabled(),
        _forced.get(), _autocast_on(),
    )  # fmt: skip


def _signature(name: str, x: Any) -> Any:
    if isinstance(x, Tensor):
        return name, x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    return name, x if isinstance(x, int) else type(x)


def _slow(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """Check the call, find or make its bucket's callable, run it, and remember the exact signature."""
    tensors = {name: x for name, x in tensors.items() if x is not None}
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        return _under_autocast(spec, q, k, v, tensors)
    sizes = check(spec, q, k, v, tensors)
    traced = is_traced(q, k, v)
    watched = sizes if _watch(q, tensors, traced) else None
    if watched is not None:
        check_values(spec, sizes, tensors)
    problem = _problem(spec, sizes, q, k, v, tensors, traced)
    run = _known(problem)
    out = run(q, k, v, **tensors) if run is not None else None
    if run is None:
        run, out = _first_call(problem, lambda run: run(q, k, v, **tensors))
    if not traced and _stable(spec, tensors):
        _hot.remember(_exact_key(spec, q, k, v, tensors), run, watched)
        if not tensors and (key := _growing_key(spec, q, k, v)) is not None:
            _hot.growing[key] = run
    return out


_graph_call = _slow


@at_trace_time
def _open_graph_call() -> bool:
    """Make `_graph_call` opaque to Dynamo at the first trace: before that nobody needs torch._dynamo."""
    global _graph_call
    if _graph_call is _slow:
        _graph_call = opaque(_slow)
    return True


def _watch(q: Tensor, tensors: Mapping[str, Any], traced: bool) -> bool:
    """Are there values to check, and may they be read: on the CPU always, elsewhere if ATTNREG_CHECK says so?"""
    return not traced and not VALUE_NAMES.isdisjoint(tensors) and (q.device.type == "cpu" or checking())


def _stable(spec: AttentionSpec, tensors: Mapping[str, Any]) -> bool:
    """Do shapes alone say the sizes? Not where the longest packed sequence was read off the values."""
    longest = {"max_seqlen_q"} if spec.page_size else {"max_seqlen_q", "max_seqlen_k"}
    return spec.layout != "thd" or longest <= set(tensors)


def _problem(
    spec: AttentionSpec, sizes: Sizes, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], traced: bool
) -> Problem:
    if not traced:
        return Problem.of(spec, sizes, q, k, v, tensors)
    problem = Problem.of(spec, concrete(sizes), q, k, v, tensors, traced=True, hint=hint)
    return replace(problem, square=same(sizes.sq, sizes.skv))


def _known(problem: Problem) -> Run | None:
    """The callable that the problem's bucket was given before."""
    known = _hot.buckets.get((problem.bucket(), _forced.get()))
    return known[0] if known is not None else None


def _first_call(problem: Problem, call: Callable[[Run], Any]) -> tuple[Run, Any]:
    """Decide for the problem's bucket, prepare, and make the first call; one thread does, the others wait."""
    table, key = _hot, (problem.bucket(), _forced.get())
    with table.lock(key):
        known = table.buckets.get(key)
        if known is not None:
            return known[0], call(known[0])
        table.misses += 1
        if not problem.traced:
            modes.seen(problem)
            modes.tune_missed(problem)
        run, made, out = _settle(key[0], key[1], call)
        table.buckets[key] = (run, made)
        return run, out


def _settle(problem: Problem, forced: Forced | None, call: Callable[[Run], Any]) -> tuple[Run, Decision, Any]:
    """Decide, prepare and call; a backend that breaks is set aside with a warning and the next one decided on.

    A forced backend never falls back: its own error comes out.
    """
    name, pairs = forced if forced is not None else (None, None)
    config: Config | None = dict(pairs) if pairs is not None else None
    broken: dict[str, str] = {}
    first: Exception | None = None
    while True:
        try:
            made = decide(problem, detect(problem.device), forced=name, config=config, excluded=broken)
        except UnsupportedError:
            if first is not None:
                raise first from None
            raise
        try:
            run = registry.current().get(made.backend).backend.prepare(problem, made.config)
            return run, made, call(run)
        except (InputError, SpecError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if name is not None:
                raise
            first = first or error
            broken[made.backend] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"attnreg: backend {made.backend!r} broke on {problem} ({broken[made.backend]}); it is set aside for "
                "such problems and the next backend is taken. attnreg.explain shows which.",
                RuntimeWarning,
                stacklevel=4,
            )


def _under_autocast(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """What autocast does to scaled_dot_product_attention: q, k and v in autocast's dtype, then no more casts."""
    kind = q.device.type
    with torch.autocast(kind, enabled=False):
        return attention(spec, *(_cast(x, kind) for x in (q, k, v)), **tensors)


def _cast(x: Tensor, kind: str) -> Tensor:
    wide = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return x.to(torch.get_autocast_dtype(kind)) if wide else x


def decision(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> tuple[Problem, Decision]:
    """The problem of a call, and what was or would be decided for its bucket. Raises what attention() would."""
    tensors = {name: x for name, x in tensors.items() if x is not None}
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        q, k, v = (_cast(x, q.device.type) for x in (q, k, v))
    sizes = check(spec, q, k, v, tensors)
    if _watch(q, tensors, False):
        check_values(spec, sizes, tensors)
    problem = _problem(spec, sizes, q, k, v, tensors, False)
    return problem, decision_of(problem)


def decision_of(problem: Problem) -> Decision:
    """What was or would be decided for the problem's bucket."""
    forced = _forced.get()
    known = _hot.buckets.get((problem.bucket(), forced))
    if known is not None:
        return known[1]
    name, pairs = forced if forced is not None else (None, None)
    config = dict(pairs) if pairs is not None else None
    return decide(problem.bucket(), detect(problem.device), forced=name, config=config)


def prepare(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Run:
    """The callable that attention() would use, to call as `run(q, k, v, **tensors)` without check or look-up.

    The tensors stand for the calls to come: same dtypes, devices, strides, named tensors and need of gradients,
    and sizes of the same bucket (each rounded up to a power of two). Raises what attention() would raise.
    """
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        kind = q.device.type
        with torch.autocast(kind, enabled=False):
            inner = prepare(spec, *(_cast(x, kind) for x in (q, k, v)), **tensors)
        return lambda q, k, v, **named: inner(*(_cast(x, kind) for x in (q, k, v)), **named)
    problem, _ = decision(spec, q, k, v, **tensors)
    run = _known(problem)
    return run if run is not None else _first_call(problem, lambda run: None)[0]


@contextlib.contextmanager
def use_backend(name: str, config: Config | None = None) -> Iterator[None]:
    """Within the block, every call runs on the backend `name`, or raises with that backend's reasons.

    config: a point of the backend's search space; None: from its record, else its default. Never falls back.
    Raises UnknownBackendError where no backend has that name. Applies to this thread or task.
    """
    registry.current().get(name)
    token = _forced.set((name, tuple(sorted(config.items())) if config is not None else None))
    try:
        yield
    finally:
        _forced.reset(token)
