"""attention(): from a call to a prepared callable, through the hot table; prepare() and use_backend()."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_constant

from attnreg import modes, registry
from attnreg.backend import error_text
from attnreg.decide import Decision, decide
from attnreg.errors import InputError, SpecError, UnsupportedError
from attnreg.hardware import detect
from attnreg.hot import Run, exact_key, forced, growing_key, table
from attnreg.modes import checking
from attnreg.problem import Problem
from attnreg.space import Config
from attnreg.spec import AttentionSpec
from attnreg.tracing import concrete, hint, is_traced, opened_at_trace_time, same, transform
from attnreg.validate import NAMES, Sizes, check
from attnreg.values import VALUE_NAMES, check_values

__all__ = ["attention", "decision", "decision_of", "prepare", "use_backend"]

register_constant(AttentionSpec)


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
        if tensors.get("generator") is not None:
            raise InputError("generator", "torch.compile cannot carry one into its graph; seed torch's own RNG instead")
        _open_graph_call()
        return _graph_call(spec, q, k, v, tensors)
    try:
        key = exact_key(spec, q, k, v, tensors)
        hit = table().exact.get(key) if transform() is None else None
    except (AttributeError, TypeError):
        return _slow(spec, q, k, v, tensors)  # not tensors, or symbolic sizes: it says which
    if hit is not None:
        run, sizes = hit
        if sizes is not None:
            check_values(spec, sizes, tensors)
        return run(q, k, v, **tensors)
    if not tensors and _well_typed(spec, q, k, v) and not is_traced(q, k, v):
        longer = table().growing.get(growing_key(spec, q, k, v))
        if longer is not None:
            table().remember(key, longer, None)
            return longer(q, k, v)
    return _slow(spec, q, k, v, tensors)


def _well_typed(spec: object, *qkv: object) -> bool:
    return isinstance(spec, AttentionSpec) and all(isinstance(x, Tensor) for x in qkv)


def _autocast(kind: str) -> bool:
    """Is autocast on for this kind of device? Some, such as meta, have none."""
    return torch.amp.autocast_mode.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _given(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that are there; a name that does not exist stays, None or not, for the check to refuse."""
    return {name: x for name, x in tensors.items() if x is not None or name not in NAMES}


def _slow(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """Check the call, find or make its bucket's callable, run it, and remember the exact signature."""
    tensors = _given(tensors)
    if isinstance(q, Tensor) and _autocast(q.device.type):
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
        table().remember(exact_key(spec, q, k, v, tensors), run, watched)
        if not tensors and (key := growing_key(spec, q, k, v)) is not None:
            table().growing[key] = run
    return out


_graph_call = _slow
_open_graph_call = opened_at_trace_time(globals(), "_graph_call")


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
    known = table().buckets.get((problem.bucket(), forced.get()))
    return known[0] if known is not None else None


def _first_call(problem: Problem, call: Callable[[Run], Any]) -> tuple[Run, Any]:
    """Decide for the problem's bucket, prepare, and make the first call; one thread does, the others wait."""
    known_table, key = table(), (problem.bucket(), forced.get())
    with known_table.lock(key):
        known = known_table.buckets.get(key)
        if known is not None:
            return known[0], call(known[0])
        known_table.misses += 1
        if not problem.traced:
            modes.seen(problem)
            modes.tune_missed(problem)
        run, made, out = _settle(key[0], call)
        known_table.buckets[key] = (run, made)
        return run, out


def _decide(problem: Problem, broken: Mapping[str, str] | None = None) -> Decision:
    """The decision for a bucket, under `use_backend` if that is in force."""
    name, pairs = forced.get() or (None, None)
    config = dict(pairs) if pairs is not None else None
    return decide(problem, detect(problem.device), forced=name, config=config, excluded=broken)


def _settle(problem: Problem, call: Callable[[Run], Any]) -> tuple[Run, Decision, Any]:
    """Decide, prepare and call; a backend that breaks is set aside with a warning and the next one decided on.

    A forced backend never falls back: its own error comes out.
    """
    broken: dict[str, str] = {}
    first: Exception | SystemExit | None = None
    while True:
        try:
            made = _decide(problem, broken)
        except UnsupportedError:
            if first is not None:
                raise first from None
            raise
        try:
            run = registry.current().get(made.backend).backend.prepare(problem, made.config)
            return run, made, call(run)
        except (InputError, SpecError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            if forced.get() is not None:
                raise
            first = first or error
            broken[made.backend] = error_text(error)
            warnings.warn(
                f"attnreg: backend {made.backend!r} broke on {problem} ({broken[made.backend]}); it is set aside for "
                "such problems and the next backend is taken. attnreg.explain shows which.",
                RuntimeWarning,
                stacklevel=4,
            )


def _under_autocast(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """What autocast does to scaled_dot_product_attention: its inputs in autocast's dtype, then no more casts."""
    kind = q.device.type
    with torch.autocast(kind, enabled=False):
        return attention(spec, *(_cast(x, kind) for x in (q, k, v)), **_cast_named(tensors, kind))


def _cast(x: Tensor, kind: str) -> Tensor:
    wide = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return x.to(torch.get_autocast_dtype(kind)) if wide else x


def _cast_named(tensors: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The named tensors, with those that have to share q's dtype in autocast's."""
    return {name: _cast(x, kind) if name in ("bias", "score_weight") else x for name, x in tensors.items()}


def decision(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> tuple[Problem, Decision]:
    """The problem of a call, and what was or would be decided for its bucket. Raises what attention() would."""
    tensors = _given(tensors)
    if isinstance(q, Tensor) and _autocast(q.device.type):
        tensors = _cast_named(tensors, q.device.type)
        q, k, v = (_cast(x, q.device.type) for x in (q, k, v))
    sizes = check(spec, q, k, v, tensors)
    if _watch(q, tensors, False):
        check_values(spec, sizes, tensors)
    problem = _problem(spec, sizes, q, k, v, tensors, False)
    return problem, decision_of(problem)


def decision_of(problem: Problem) -> Decision:
    """What was or would be decided for the problem's bucket."""
    known = table().buckets.get((problem.bucket(), forced.get()))
    return known[1] if known is not None else _decide(problem.bucket())


def prepare(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Run:
    """The callable that attention() would use, to call as `run(q, k, v, **tensors)` without check or look-up.

    The tensors stand for the calls to come: same dtypes, devices, strides, named tensors and need of gradients,
    and sizes of the same bucket (each rounded up to a power of two). Raises what attention() would raise.
    """
    if isinstance(q, Tensor) and _autocast(q.device.type):
        kind = q.device.type
        with torch.autocast(kind, enabled=False):
            inner = prepare(spec, *(_cast(x, kind) for x in (q, k, v)), **_cast_named(tensors, kind))
        return lambda q, k, v, **named: inner(*(_cast(x, kind) for x in (q, k, v)), **_cast_named(named, kind))
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
    token = forced.set((name, tuple(sorted(config.items())) if config is not None else None))
    try:
        yield
    finally:
        forced.reset(token)
