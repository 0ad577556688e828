"""Derivatives: which ones a call asks for, autograd around kernels, and those that a backend does not have itself.

A backend says by `derivatives` what it has beyond a first derivative in reverse mode: "forward" (tangents) and "higher"
(gradients of gradients). What it does not say it refuses. A second derivative that shows only in the backward pass
(`create_graph=True`) is computed by the next backend that has it, from the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from attnreg.errors import BackendError
from attnreg.operands import is_plain, settled
from attnreg.problem import GRADS, Problem
from attnreg.spec import AttentionSpec
from attnreg.tracing import is_traced

__all__ = [
    "NAMES",
    "Differentiable",
    "Kernels",
    "asked",
    "differentiable",
    "draw_seed",
    "gradients_again",
    "has_higher",
    "refusals",
    "set_able",
    "twice_differentiable",
]

NAMES = ("q", "k", "v", *GRADS)
"""All tensors that a result depends on smoothly."""

Run = Callable[..., Any]
_able: Callable[[Problem], Run] | None = None


class Kernels(Protocol):
    """A backend's kernels without autograd: what `differentiable` and the recorded operator are made of.

    compute: (out, lse, low) of plain tensors. Where `for_backward`, lse is there whatever the spec says, and what
    `gradients` reads beside it; else lse is None unless the spec returns it. low: the part of the log of the sum that
    lse in float32 has lost, in its shape, or None.
    gradients: of the names in `wanted`, each shaped and typed like its tensor. results: what compute gave. upstream:
    the gradients of out and of lse, the latter None for 0. tensors: the named tensors, and `seed`, int64 [1], where the
    spec has dropout: `gradients` gets the one that `compute` got.
    """

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor | None],
        upstream: tuple[Tensor, Tensor | None],
        wanted: frozenset[str],
    ) -> Mapping[str, Tensor]: ...


def asked(q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> tuple[frozenset[str], int]:
    """The names with a forward-mode tangent, and how often the result is differentiated as far as is known now."""
    stack = getattr(torch._C._functorch, "get_interpreter_stack", lambda: None)() or ()
    if forward_ad._current_level < 0 and not stack:
        return frozenset(), 1
    named = {"q": q, "k": k, "v": v, **{name: tensors.get(name) for name in GRADS}}
    floats = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    kinds = [level.key().name for level in stack]
    if "Jvp" in kinds:
        return frozenset(floats), max(kinds.count("Grad") + kinds.count("Jvp"), 1)
    tangents = set()
    if forward_ad._current_level >= 0:
        unpack: Callable[..., Any] = forward_ad.unpack_dual
        tangents = {name for name, x in floats.items() if unpack(x).tangent is not None}
    order = kinds.count("Grad") + any(_base(x).requires_grad for x in floats.values()) if stack else 1
    return frozenset(tangents), max(order, 1)


def _base(x: Tensor) -> Tensor:
    """The tensor under all wrappers of torch.func."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def refusals(backend: object, problem: Problem) -> list[str]:
    """Why a backend cannot give the derivatives that the problem asks for; empty if it can."""
    has, out = _said(backend), []
    if problem.tangents and "forward" not in has:
        names = ", ".join(sorted(problem.tangents))
        out.append(f"forward-mode derivative of {names}: it has none; use_backend('eager') computes one")
    if problem.order > 1 and "higher" not in has:
        out.append(f"no second derivative, and order {problem.order} is asked for; use_backend('eager') computes it")
    return out


def has_higher(backend: object) -> bool:
    """Does the backend say that it differentiates its gradients itself?"""
    return "higher" in _said(backend)


def _said(backend: object) -> frozenset[str]:
    try:
        return frozenset(getattr(backend, "derivatives", ()))
    except (Exception, SystemExit):
        return frozenset()


def set_able(able: Callable[[Problem], Run]) -> None:
    """Say what finds a backend with higher derivatives; calls do so once, so that nothing here imports them."""
    global _able
    _able = able


def no_second(name: str) -> NoReturn:
    """Raise the error of a second derivative that may not be computed by another backend."""
    raise BackendError(f"{name}: no second derivative; attnreg.use_backend('eager') computes one")


def gradients_again(
    problem: Problem,
    inputs: Mapping[str, Any],
    upstream: tuple[Tensor | None, Tensor | None],
    wanted: Sequence[str],
    name: str = "",
) -> dict[str, Tensor]:
    """Gradients that can be differentiated in turn, by a backend that has higher derivatives: the call made again.

    inputs: q, k, v and the named tensors. Raises BackendError where none is found, or where random numbers would have
    to be drawn again.
    """
    if problem.spec.dropout_p:
        raise BackendError(
            f"{name or 'attnreg'}: a second derivative under dropout needs the same random numbers again; "
            "attnreg.use_backend('eager') around the call computes one"
        )
    if _able is None:
        no_second(name or "attnreg")
    fields = {n: getattr(problem.spec, n) for n in type(problem.spec).model_fields}
    spec = AttentionSpec(**{**fields, "return_lse": True})
    traced = is_traced(*inputs.values(), *upstream)
    run = _able(replace(problem, spec=spec, order=max(problem.order, 2), traced=traced))
    with torch.enable_grad():
        # Aliases: where k depends on q, its path is not q's.
        fresh = {n: x.view_as(x) if n in wanted else x for n, x in inputs.items()}
        leaves = {n: fresh[n] for n in wanted}
        results = run(fresh.pop("q"), fresh.pop("k"), fresh.pop("v"), **fresh)
        pairs = [(y, g) for y, g in zip(results, upstream, strict=True) if g is not None and y.requires_grad]
        if not pairs:
            return {n: torch.zeros_like(x) for n, x in leaves.items()}
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            list(leaves.values()),
            [g.to(y.dtype) for y, g in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    return dict(zip(leaves, found, strict=True))


def draw_seed(q: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The seed of a call's dropout, int64 [1]: drawn on its device: nothing waits, and recorders see it drawn."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=q.device, generator=generator)


def differentiable(name: str, kernels: Kernels, problem: Problem) -> Differentiable:
    """For plugins: `run(q, k, v, **tensors)`, autograd around kernels that know nothing of it. name: the backend's."""
    return Differentiable(name, kernels, problem)


class Differentiable:
    """run(q, k, v, **tensors) of one prepared problem whose inputs may need gradients.

    may_ask: may another backend compute a second derivative? Not under `use_backend`, which never falls back.
    """

    def __init__(self, name: str, kernels: Kernels, problem: Problem, may_ask: bool = False) -> None:
        self.name = name
        self.kernels = kernels
        self.problem = problem
        self.may_ask = may_ask
        self._return_lse = problem.spec.return_lse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        rest = {name: x for name, x in tensors.items() if name not in GRADS}
        if self.problem.spec.dropout_p:
            rest["seed"] = draw_seed(q, rest.pop("generator", None))
        out, lse = _Attention.apply(self, rest, q, k, v, *(tensors.get(name) for name in GRADS))  # type: ignore[no-untyped-call]
        return (out, lse) if self._return_lse else out

    def asking(self) -> Differentiable:
        """The same, allowed to have second derivatives computed by another backend."""
        other = copy.copy(self)
        other.may_ask = True
        return other


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Differentiable, tensors: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, *own: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        named = {**tensors, **_given(own)}
        out, lse, low = call.kernels.compute(q, k, v, named, True)
        assert lse is not None, "compute() gives lse for a backward pass"
        ctx.call = call
        # Saved, all tensors are watched: one that is overwritten before the backward pass is torch's error.
        ctx.names = tuple(name for name, x in tensors.items() if isinstance(x, Tensor))
        ctx.rest = {name: x for name, x in tensors.items() if not isinstance(x, Tensor)}
        saved = (q, k, v, out, lse, low, *own, *(tensors[name] for name in ctx.names))
        ctx.looks = tuple(None if x is None else (x.shape, x.dtype) for x in saved)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        _check_looks(saved, ctx.looks)
        call: Differentiable = ctx.call
        q, k, v, out, lse, low, *more = saved
        own, rest = more[: len(GRADS)], more[len(GRADS) :]
        named = {**ctx.rest, **dict(zip(ctx.names, rest, strict=True)), **_given(own)}
        wanted = [name for name, need in zip(NAMES, ctx.needs_input_grad[2:], strict=True) if need]
        d_out, d_lse = (None if x is None else settled("the gradient of the output", x) for x in (d_out, d_lse))
        kernels_can = all(x is None or is_plain(x) for x in (*saved, d_out, d_lse))
        if torch.is_grad_enabled() or not kernels_can:
            if not call.may_ask:
                no_second(call.name)
            inputs = {"q": q, "k": k, "v": v, **named}
            found: Mapping[str, Tensor] = gradients_again(call.problem, inputs, (d_out, d_lse), wanted, call.name)
        else:
            d_out = torch.zeros_like(out) if d_out is None else d_out
            found = call.kernels.gradients((q, k, v), named, (out, lse, low), (d_out, d_lse), frozenset(wanted))
        return None, None, *(found.get(name) if name in wanted else None for name in NAMES)


def _given(own: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {name: x for name, x in zip(GRADS, own, strict=True) if x is not None}


def _check_looks(saved: Sequence[Tensor | None], looks: Sequence[Any]) -> None:
    """Raise BackendError where a saved-tensor hook gave back another shape or dtype than it was given."""
    for x, look in zip(saved, looks, strict=True):
        if x is not None and (x.shape, x.dtype) != look:
            raise BackendError(
                f"a saved tensor of shape {list(look[0])} and {look[1]} came back from its saved_tensors_hooks as "
                f"{list(x.shape)} and {x.dtype}; unpack must restore what pack was given"
            )


class _Cell:
    """What the entry of a call needs from its exit: the upstream gradients of the backward pass under way."""

    def __init__(self, name: str, problem: Problem, may_ask: bool, named: Mapping[str, Any]) -> None:
        self.name, self.problem, self.may_ask = name, problem, may_ask
        self.names = tuple(named)
        self.rest: dict[str, Any] = {}
        self.wanted: tuple[str, ...] = ()
        self.upstream: tuple[Tensor | None, ...] = ()


def twice_differentiable(name: str, run: Run, problem: Problem, may_ask: bool) -> Run:
    """`run`, whose second derivatives another backend computes; the first stay its own.

    Two functions that change nothing stand around it. In a backward pass that is differentiated in turn, the outer one
    notes the upstream gradients, and the inner one gives gradients that can be differentiated, in place of run's.
    may_ask: where False, such a pass is an error that names the backend that can.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        inputs = {"q": q, "k": k, "v": v, **tensors}
        wanted = [n for n, x in inputs.items() if isinstance(x, Tensor) and n in NAMES and x.requires_grad]
        if not wanted or not torch.is_grad_enabled():
            return run(q, k, v, **tensors)
        cell = _Cell(name, problem, may_ask, inputs)
        cell.wanted = tuple(wanted)
        kept = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and n not in wanted}
        cell.rest = {n: x for n, x in inputs.items() if not isinstance(x, Tensor)}
        cell.names = (*wanted, *kept)
        entered = _Entry.apply(cell, len(wanted), *(inputs[n] for n in wanted), *kept.values())  # type: ignore[no-untyped-call]
        inputs |= dict(zip(wanted, entered, strict=True))
        out = run(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), **inputs)
        if isinstance(out, tuple):
            return _Exit.apply(cell, *out)  # type: ignore[no-untyped-call]
        return _Exit.apply(cell, out)[0]  # type: ignore[no-untyped-call]

    return call


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: _Cell, count: int, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.cell, ctx.count = cell, count
        ctx.save_for_backward(*xs)
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in xs[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell: _Cell = ctx.cell
        rest = (None,) * (len(cell.names) - ctx.count)
        if not torch.is_grad_enabled():
            return None, None, *grads, *rest
        if not cell.may_ask:
            no_second(cell.name)
        inputs = {**dict(zip(cell.names, ctx.saved_tensors, strict=True)), **cell.rest}
        upstream, cell.upstream = cell.upstream, ()
        both = (*upstream, None)[:2]
        found = gradients_again(cell.problem, inputs, (both[0], both[1]), cell.wanted, cell.name)
        return None, None, *(found[n] for n in cell.wanted), *rest


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: _Cell, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            ctx.cell.upstream = grads
        return None, *grads
