"""attention(): from a call to a prepared callable, through the hot table; prepare() and use_backend()."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import register_constant

from attnreg import modes, registry
from attnreg.autograd import Differentiable, twice_differentiable, watched
from attnreg.backend import error_text
from attnreg.decide import Decision, decide
from attnreg.derivatives import Elsewhere, asked, has_higher, set_able
from attnreg.errors import InputError, SpecError, UnsupportedError
from attnreg.failures import is_out_of_memory, is_transient
from attnreg.hardware import detect
from attnreg.hot import Forced, Run, Settled, exact_key, forced, growing_key, table
from attnreg.modes import checking
from attnreg.operands import Kind, check_device, is_plain, kind_of, settle_all, settled
from attnreg.operators import recorded
from attnreg.problem import Problem
from attnreg.sharded import attend_sharded, is_sharded
from attnreg.space import Config
from attnreg.spec import AttentionSpec
from attnreg.tracing import (
    concrete,
    hint,
    is_jit_traced,
    is_traced,
    opened_at_trace_time,
    ordinary,
    same,
    unrecorded,
)
from attnreg.validate import NAMES, Sizes, check
from attnreg.values import VALUE_NAMES, check_values

__all__ = ["attention", "decision", "decision_of", "prepare", "use_backend"]

register_constant(AttentionSpec)

RETRY_SECONDS = 60.0
"""How long a backend stays set aside after a trouble that may pass."""


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
        _refuse_generator(tensors)
        _open_graph_call()
        return _graph_call(spec, q, k, v, tensors)
    if not ordinary():
        return _slow(spec, q, k, v, tensors)
    try:
        key = exact_key(spec, q, k, v, tensors)
        hit = table().exact.get(key)
    except (AttributeError, TypeError, RuntimeError):
        return _slow(spec, q, k, v, tensors)  # not tensors, or without strides: it says which
    if hit is not None:
        run, sizes, of_q, of_k, of_v = hit
        if of_q(q) and of_k(k) and of_v(v):
            if sizes is not None:
                check_values(spec, sizes, tensors)
            return run(q, k, v, **tensors)
    elif not tensors and isinstance(spec, AttentionSpec):
        longer = table().growing.get(growing_key(spec, q, k, v))
        if longer is not None:
            run, _, of_q, of_k, of_v = longer
            if of_q(q) and of_k(k) and of_v(v):
                table().remember(key, longer)
                return run(q, k, v)
    return _slow(spec, q, k, v, tensors)


def _refuse_generator(tensors: Mapping[str, Any]) -> None:
    if tensors.get("generator") is not None:
        raise InputError("generator", "torch.compile cannot carry one into its graph; seed torch's own RNG instead")


def _autocast(kind: str) -> bool:
    """Is autocast on for this kind of device? Some, such as meta, have none."""
    return torch.amp.autocast_mode.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _given(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that are there; a name that does not exist stays, None or not, for the check to refuse."""
    return {name: x for name, x in tensors.items() if x is not None or name not in NAMES}


def _slow(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    """Check the call, find or make its bucket's callable, run it, and remember the exact signature."""
    tensors = _given(tensors)
    everything = (q, k, v, *tensors.values())
    if has_torch_function(everything):  # a subclass, a proxy or a mode has a say of its own
        force = forced.get()
        if force is not None and any(map(_is_proxy, everything)):
            return handle_torch_function(attention_by, everything, *force, spec, q, k, v, **tensors)
        return handle_torch_function(attention, everything, spec, q, k, v, **tensors)
    remember = ordinary() and _all_plain({"q": q, "k": k, "v": v, **tensors})
    q, k, v, tensors = _settled(q, k, v, tensors)
    if is_sharded(q, k, v, tensors):
        return attend_sharded(attention, spec, q, k, v, tensors)
    if isinstance(q, Tensor) and _autocast(q.device.type):
        return _under_autocast(spec, q, k, v, tensors)
    jit = is_jit_traced()
    with unrecorded():
        call = _Call.of(spec, q, k, v, tensors)
        known = _known(call.problem, jit)
    if known is not None:
        settled, out = known, known.run(q, k, v, **tensors)
    else:
        settled, out = _first_call(call.problem, jit, lambda run: run(q, k, v, **tensors))
    if remember and settled.again is None and _stable(spec, tensors):
        entry = (settled.run, call.watched, kind_of(q), kind_of(k), kind_of(v))
        table().remember(exact_key(spec, q, k, v, tensors), entry)
        if not tensors and (key := growing_key(spec, q, k, v)) is not None:
            table().growing[key] = entry
    return out


def _is_proxy(x: object) -> bool:
    """Does `x` stand for a value in a trace of torch.fx?"""
    return isinstance(x, torch.fx.Proxy)


def attention_by(
    name: str, pairs: tuple[tuple[str, Any], ...] | None, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor,
    **tensors: Any,
) -> Any:  # fmt: skip
    """attention() under use_backend: what torch.fx records of a call that stood under it."""
    with use_backend(name, None if pairs is None else dict(pairs)):
        return attention(spec, q, k, v, **tensors)


@dataclass(frozen=True)
class _Call:
    """A checked call: its problem, and the sizes that its values are checked against (None: they are not read)."""

    problem: Problem
    watched: Sizes | None

    @staticmethod
    def of(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> _Call:
        """Raises what attention() raises where the call does not fit the spec."""
        sizes = check(spec, q, k, v, tensors)
        check_device("q", q)
        traced = is_traced(q, k, v, *tensors.values())
        watched = sizes if _watch(q, tensors, traced) else None
        if watched is not None:
            check_values(spec, sizes, tensors)
        return _Call(_problem(_in_force(spec), sizes, q, k, v, tensors, traced), watched)


def _in_force(spec: AttentionSpec) -> AttentionSpec:
    """The spec, deterministic where torch.use_deterministic_algorithms(True) asks everything to be."""
    wanted = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return _deterministic(spec) if wanted and not spec.deterministic else spec


@functools.lru_cache(maxsize=1024)
def _deterministic(spec: AttentionSpec) -> AttentionSpec:
    return spec.changed(deterministic=True)


def _settled(q: Any, k: Any, v: Any, tensors: Mapping[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The call's tensors with lazy bits resolved. Raises where one holds no dense data; leaves what is no tensor."""
    q, k, v = (settled(name, x) if isinstance(x, Tensor) else x for name, x in (("q", q), ("k", k), ("v", v)))
    return q, k, v, settle_all(tensors)


class _Bound:
    """What a prepared callable stands for, wherever it is not called as it was prepared; to Dynamo a constant."""

    def __init__(self, spec: AttentionSpec, force: Forced | None) -> None:
        self.spec, self.force = spec, force

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and (self.spec, self.force) == (other.spec, other.force)

    def __hash__(self) -> int:
        return hash((self.spec, self.force))

    def call(self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
        token = forced.set(self.force)
        try:
            return attention(self.spec, q, k, v, **tensors)
        finally:
            forced.reset(token)


register_constant(_Bound)


def _slow_bound(bound: _Bound, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Any:
    token = forced.set(bound.force)
    try:
        return _slow(bound.spec, q, k, v, tensors)
    finally:
        forced.reset(token)


_graph_call = _slow
_open_graph_call = opened_at_trace_time(globals(), "_graph_call")
_graph_bound = _slow_bound
_open_graph_bound = opened_at_trace_time(globals(), "_graph_bound")


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
    tangents, order = asked(q, k, v, tensors)
    if not traced:
        return Problem.of(spec, sizes, q, k, v, tensors, tangents=tangents, order=order)
    problem = Problem.of(
        spec, concrete(sizes), q, k, v, tensors, traced=True, hint=hint, tangents=tangents, order=order
    )
    return replace(problem, square=same(sizes.sq, sizes.skv))


def _known(problem: Problem, jit: bool) -> Settled | None:
    """What the problem's bucket was given before; None where a backend that was set aside is to be tried again."""
    known = table().buckets.get((problem.bucket(), forced.get(), jit))
    return known if known is None or known.again is None or time.monotonic() < known.again else None


def _first_call(problem: Problem, jit: bool, call: Callable[[Run], Any]) -> tuple[Settled, Any]:
    """Decide for the problem's bucket, prepare, and make the first call; one thread does, the others wait."""
    known_table, key = table(), (problem.bucket(), forced.get(), jit)
    with known_table.lock(key):
        known = _known(problem, jit)
        if known is not None:
            return known, call(known.run)
        known_table.misses += 1
        if not problem.traced:
            modes.seen(problem)
            modes.tune_missed(problem)
        settled, out = _settle(key[0], jit, call)
        known_table.buckets[key] = settled
        return settled, out


def _decide(problem: Problem, broken: Mapping[str, str] | None = None) -> Decision:
    """The decision for a bucket, under `use_backend` if that is in force."""
    name, pairs = forced.get() or (None, None)
    config = dict(pairs) if pairs is not None else None
    return decide(problem, detect(problem.device), forced=name, config=config, excluded=broken)


def _settle(problem: Problem, jit: bool, call: Callable[[Run], Any]) -> tuple[Settled, Any]:
    """Decide, prepare and call; a backend that breaks is set aside with a warning and the next one decided on.

    A forced backend never falls back: its own error comes out. No memory is nobody's fault: it comes out as it is. A
    trouble that may pass sets a backend aside for a while, and for good when it comes again.
    """
    broken: dict[str, str] = {}
    again: float | None = None
    first: Exception | SystemExit | None = None
    while True:
        try:
            with unrecorded():
                made = _decide(problem, broken)
        except UnsupportedError:
            if first is not None:
                raise first from None
            raise
        try:
            with unrecorded():
                run = _prepared(problem, made, jit)
            return Settled(run, made, again), call(run)
        except (InputError, SpecError):
            raise
        except (Exception, SystemExit) as error:
            if forced.get() is not None or is_out_of_memory(error):
                raise
            first = first or error
            text = error_text(error)
            if _comes_again(problem, made.backend, error):
                again, when = time.monotonic() + RETRY_SECONDS, f"until {_clock(RETRY_SECONDS)}, when it is tried again"
                broken[made.backend] = f"{text}; tried again after {_clock(RETRY_SECONDS)}"
            else:
                when, broken[made.backend] = "for such problems", text
            warnings.warn(
                f"attnreg: backend {made.backend!r} broke on {problem} ({text}); it is set aside {when}, "
                "and the next backend is taken. attnreg.explain shows which.",
                RuntimeWarning,
                stacklevel=4,
            )


def _comes_again(problem: Problem, backend: str, error: BaseException) -> bool:
    """Is the backend to be tried again later? Not where the same trouble has come before."""
    if not is_transient(error):
        return False
    seen, key = table().failures, (problem, backend)
    before, seen[key] = seen.get(key), type(error).__name__
    return before != type(error).__name__


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))


def _prepared(problem: Problem, made: Decision, jit: bool) -> Run:
    """The chosen backend's callable, with the derivatives that another backend has to compute."""
    backend = registry.current().get(made.backend).backend
    if jit:
        return recorded(problem, made.backend, made.config)
    run = backend.prepare(problem, made.config)
    elsewhere = Elsewhere(made.backend, problem, may_ask=forced.get() is None)
    if isinstance(run, Differentiable):
        return run.asking() if elsewhere.may_ask else run
    if not problem.needs_grad:
        return run
    run = run if problem.traced else watched(run)
    if problem.spec.dropout_p or has_higher(backend):
        return run
    return twice_differentiable(run, elsewhere)


def _able(problem: Problem) -> Run:
    """A callable with all derivatives that the problem asks for: what higher derivatives are made of."""
    token = forced.set(None)
    try:
        known = _known(problem, False)
        return (known or _first_call(problem, False, lambda run: None)[0]).run
    finally:
        forced.reset(token)


set_able(_able)


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
    q, k, v, tensors = _settled(q, k, v, _given(tensors))
    if isinstance(q, Tensor) and _autocast(q.device.type):
        tensors = _cast_named(tensors, q.device.type)
        q, k, v = (_cast(x, q.device.type) for x in (q, k, v))
    problem = _Call.of(spec, q, k, v, tensors).problem
    return problem, decision_of(problem)


def decision_of(problem: Problem) -> Decision:
    """What was or would be decided for the problem's bucket."""
    known = table().buckets.get((problem.bucket(), forced.get(), False))
    return known.decision if known is not None else _decide(problem.bucket())


def prepare(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Run:
    """The callable that attention() would use, to call as `run(q, k, v, **tensors)` without check or look-up.

    The tensors stand for the calls to come: same dtypes, devices, strides, named tensors and need of gradients,
    and sizes of the same bucket (each rounded up to a power of two). A call that is recorded, transformed or made with
    tensors of another kind goes through attention() instead. Raises what attention() would raise.
    """
    if isinstance(q, Tensor) and _autocast(q.device.type):
        kind = q.device.type
        with torch.autocast(kind, enabled=False):
            inner = prepare(spec, *(_cast(x, kind) for x in (q, k, v)), **_cast_named(tensors, kind))
        return lambda q, k, v, **named: inner(*(_cast(x, kind) for x in (q, k, v)), **_cast_named(named, kind))
    for name, x in (("q", q), ("k", k), ("v", v), *tensors.items()):
        if _is_proxy(x):
            raise InputError(
                name, "expected a tensor, got a torch.fx Proxy; prepare outside of what is traced, or call attention()"
            )
    problem, _ = decision(spec, q, k, v, **tensors)
    known = _known(problem, False) or _first_call(problem, False, lambda run: None)[0]
    return _guarded(_Bound(spec, forced.get()), known.run, (kind_of(q), kind_of(k), kind_of(v)))


def _guarded(bound: _Bound, run: Run, kinds: tuple[Kind, Kind, Kind]) -> Run:
    """`run` for calls like the one that it was prepared for, and attention() for those that are not."""
    of_q, of_k, of_v = kinds

    def call(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        if torch.compiler.is_compiling():
            _refuse_generator(tensors)
            _open_graph_bound()
            return _graph_bound(bound, q, k, v, tensors)
        # torch's guards end the process where they are asked for a nested tensor.
        dense = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        dense = dense and not (q.is_nested or k.is_nested or v.is_nested)
        if dense and ordinary() and of_q(q) and of_k(k) and of_v(v) and (not tensors or _all_plain(tensors)):
            return run(q, k, v, **tensors)
        return bound.call(q, k, v, tensors)

    return call


def _all_plain(tensors: Mapping[str, Any]) -> bool:
    return all(is_plain(x) for x in tensors.values() if isinstance(x, Tensor))


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
