"""Derivatives: which ones a call asks for, autograd around kernels, and those that a backend does not have itself.

A backend says by `derivatives` what it has beyond a first derivative in reverse mode: "forward" (tangents) and "higher"
(gradients of gradients). What it does not say it refuses. A second derivative that shows only in the backward pass
(`create_graph=True`) is computed by the next backend that has it, from the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from attnreg.errors import BackendError
from attnreg.operands import base, is_plain, settled
from attnreg.problem import GRADS, Problem
from attnreg.spec import AttentionSpec

__all__ = [
    "NAMES",
    "Differentiable",
    "Elsewhere",
    "Kernels",
    "asked",
    "differentiable",
    "gradients_again",
    "has_higher",
    "has_tangent",
    "refusals",
    "set_able",
    "twice_differentiable",
    "watched",
]

NAMES = ("q", "k", "v", *GRADS)
"""All tensors that a result depends on smoothly."""

Run = Callable[..., Any]
Upstream = tuple[Tensor | None, Tensor | None]
"""The gradients of out and lse that a backward pass starts from."""
_able: Callable[[Problem], Run] | None = None


class Kernels(Protocol):
    """A backend's kernels without autograd: what `differentiable` and the recorded operator are made of.

    compute: (out, lse, low) of plain tensors. Where `for_backward`, lse is there whatever the spec says, and what
    `gradients` reads beside it; else lse is None unless the spec returns it. low: the part of the log of the sum that
    lse in float32 has lost, in its shape, or None.
    gradients: of the names in `wanted`, each shaped and typed like its tensor. results: what compute gave. upstream:
    the gradients of out and of lse, the latter None for 0.
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
    stack = _levels()
    if forward_ad._current_level < 0 and not stack:
        return frozenset(), 1
    named = {"q": q, "k": k, "v": v, **{name: tensors.get(name) for name in GRADS}}
    floats = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    kinds = [level.key().name for level in stack]
    # Which tensors a transform gives a tangent is not asked: all of them may have one.
    tangents = frozenset(floats) if "Jvp" in kinds else _with_tangent(floats)
    recorded = torch.is_grad_enabled() and any(base(x).requires_grad for x in floats.values())
    order = kinds.count("Grad") + max(kinds.count("Jvp"), bool(tangents)) + recorded
    return tangents, max(order, 1)


def _levels() -> list[Any]:
    """The torch.func transforms in force, the outermost first."""
    return list(getattr(torch._C._functorch, "get_interpreter_stack", lambda: None)() or ())


def _with_tangent(named: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of tensors with a tangent of the level in force."""
    if forward_ad._current_level < 0:
        return frozenset()
    unpack: Callable[..., Any] = forward_ad.unpack_dual
    return frozenset(name for name, x in named.items() if unpack(x).tangent is not None)


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


def _no_second(name: str, what: str = "second derivative") -> NoReturn:
    raise BackendError(f"{name}: no {what}; attnreg.use_backend('eager') around the call computes one")


def gradients_again(
    problem: Problem,
    inputs: Mapping[str, Any],
    upstream: Upstream,
    wanted: Sequence[str],
    name: str = "",
) -> dict[str, Tensor]:
    """Gradients by a backend that has all derivatives, from the call made again; in grad mode they have a graph.

    inputs: q, k, v and the named tensors. Raises BackendError where none is found, or where random numbers would have
    to be drawn again.
    """
    if problem.spec.dropout_p:
        raise BackendError(
            f"{name or 'attnreg'}: a second derivative under dropout needs the same random numbers again; "
            "attnreg.use_backend('eager') around the call computes one"
        )
    if _able is None:
        _no_second(name or "attnreg")
    fields = {n: getattr(problem.spec, n) for n in type(problem.spec).model_fields}
    spec = AttentionSpec(**{**fields, "return_lse": True})
    tangents = problem.tangents | (frozenset(wanted) if has_tangent(*inputs.values(), *upstream) else frozenset())
    run = _able(replace(problem, spec=spec, order=max(problem.order, 2), tangents=tangents, traced=False))
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where k depends on q, its path is not q's.
        fresh = {n: _alias(x) if n in wanted else x for n, x in inputs.items()}
        leaves = {n: fresh[n] for n in wanted}
        results = run(fresh.pop("q"), fresh.pop("k"), fresh.pop("v"), **fresh)
        pairs = [(y, g) for y, g in zip(results, upstream, strict=True) if g is not None and y.requires_grad]
        if not pairs:
            return {n: torch.zeros_like(x) for n, x in leaves.items()}
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            list(leaves.values()),
            [g.to(y.dtype) for y, g in pairs],
            create_graph=graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return dict(zip(leaves, found, strict=True))


def _alias(x: Tensor) -> Tensor:
    """x at a place of its own in the graph, with a gradient even where what it stands for needs none any more."""
    if x.requires_grad:
        return x.view_as(x)
    leaf = x.detach()
    # What Tensor.requires_grad_ does; torch.func forbids that, since a transform would not know of it.
    leaf.requires_grad = True
    return leaf


def has_tangent(*xs: Any) -> bool:
    """Does one of the tensors carry a forward-mode tangent?"""
    if forward_ad._current_level < 0:
        return False
    return bool(_with_tangent({str(n): x for n, x in enumerate(xs) if isinstance(x, Tensor)}))


@dataclass(frozen=True)
class Elsewhere:
    """Derivatives of one backend's problem that another backend computes, since it has none itself.

    name: the backend's. may_ask: False under `use_backend`, which never falls back: then they are an error.
    """

    name: str
    problem: Problem
    may_ask: bool

    def gradients(
        self, inputs: Mapping[str, Any], upstream: Upstream, wanted: Sequence[str], what: str = "second derivative"
    ) -> dict[str, Tensor]:
        """The gradients themselves. what: the kind that the backend lacks, for the error."""
        if not self.may_ask:
            _no_second(self.name, what)
        return gradients_again(self.problem, inputs, upstream, wanted, self.name)

    def second(
        self, inputs: Mapping[str, Any], upstream: Upstream, weights: Mapping[str, Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the sum of weight times gradient: of each tensor of inputs, then of both upstream gradients.

        weights: of the gradients, by name. needs: which of these tensors need one.
        """
        graph = torch.is_grad_enabled()
        tensors = [n for n, x in inputs.items() if isinstance(x, Tensor)]
        given = [*(inputs[n] for n in tensors), *upstream]
        with torch.enable_grad():
            aliases = [_alias(x) if need else x for x, need in zip(given, needs, strict=True)]
            inputs = {**inputs, **dict(zip(tensors, aliases[:-2], strict=True))}
            found = self.gradients(inputs, (aliases[-2], aliases[-1]), tuple(weights))
            pairs = [(found[n], w) for n, w in weights.items() if w is not None and found[n].requires_grad]
            leaves = [x for x, need in zip(aliases, needs, strict=True) if need]
            if not pairs:
                return [None] * len(given)
            some = iter(
                torch.autograd.grad(
                    [x for x, _ in pairs], leaves, [w for _, w in pairs], create_graph=graph, allow_unused=True
                )
            )
        return [next(some) if need else None for need in needs]

    def linked(
        self, found: Mapping[str, Tensor], inputs: Mapping[str, Any], upstream: Upstream
    ) -> dict[str, Tensor | None]:
        """The gradients that the backend found, as functions of inputs and upstream gradients.

        Another backend computes their derivatives, once somebody asks for these.
        """
        found = {n: _alive(x) for n, x in found.items()}
        tensors = {n: _alive(x) for n, x in inputs.items() if isinstance(x, Tensor)}
        rest = {n: x for n, x in inputs.items() if n not in tensors}
        linked = _Linked.apply(
            self, (tuple(found), tuple(tensors), rest), *found.values(), *tensors.values(), *upstream
        )  # type: ignore[no-untyped-call]
        return dict(zip(found, linked, strict=True))


_alive: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead
"""A tensor without the wrapper of a torch.func transform that has ended, by which nothing can be linked any more."""


class _Linked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(elsewhere: Elsewhere, names: Any, *xs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in xs[: len(names[0])] if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.elsewhere, ctx.names, *xs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*xs[len(output) :])

    @staticmethod
    def backward(ctx: Any, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted, names, rest = ctx.names
        nothing: list[Tensor | None] = [None] * (2 + len(wanted))
        *xs, d_out, d_lse = ctx.saved_tensors
        inputs = {**dict(zip(names, xs, strict=True)), **rest}
        needs = ctx.needs_input_grad[len(nothing) :]
        found = ctx.elsewhere.second(inputs, (d_out, d_lse), dict(zip(wanted, weights, strict=True)), needs)
        return *nothing, *found


def differentiable(name: str, kernels: Kernels, problem: Problem) -> Differentiable:
    """For plugins: `run(q, k, v, **tensors)`, autograd around kernels that know nothing of it. name: the backend's."""
    return Differentiable(kernels, Elsewhere(name, problem, False))


class Differentiable:
    """run(q, k, v, **tensors) of one prepared problem whose inputs may need gradients."""

    def __init__(self, kernels: Kernels, elsewhere: Elsewhere) -> None:
        self.kernels = kernels
        self.elsewhere = elsewhere
        self._return_lse = elsewhere.problem.spec.return_lse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        rest = {name: x for name, x in tensors.items() if name not in GRADS}
        out, lse = _Attention.apply(self, rest, q, k, v, *(tensors.get(name) for name in GRADS))  # type: ignore[no-untyped-call]
        return (out, lse) if self._return_lse else out

    def asking(self) -> Differentiable:
        """The same, allowed to have second derivatives computed by another backend."""
        return Differentiable(self.kernels, replace(self.elsewhere, may_ask=True))


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
        ctx.looks = tuple(None if x is None else (x.shape, x.dtype, x.stride()) for x in saved)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved: Sequence[Tensor | None] = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = [None if x is None else _as_saved(x, look) for x, look in zip(saved, ctx.looks, strict=True)]
        call: Differentiable = ctx.call
        q, k, v, out, lse, low, *more = saved
        assert q is not None, "saved"
        assert k is not None, "saved"
        assert v is not None, "saved"
        assert out is not None, "saved"
        assert lse is not None, "saved"
        own, rest = more[: len(GRADS)], more[len(GRADS) :]
        named = {**ctx.rest, **dict(zip(ctx.names, rest, strict=True)), **_given(own)}
        inputs = {"q": q, "k": k, "v": v, **named}
        wanted = [name for name, need in zip(NAMES, ctx.needs_input_grad[2:], strict=True) if need]
        d_out, d_lse = (None if x is None else settled("the gradient of the output", x) for x in (d_out, d_lse))
        found: Mapping[str, Tensor | None]
        what = _beyond_kernels(*saved, d_out, d_lse)
        if what:
            found = call.elsewhere.gradients(inputs, (d_out, d_lse), wanted, what)
        else:
            with torch.no_grad():
                both = torch.zeros_like(out) if d_out is None else d_out, d_lse
                found = given = call.kernels.gradients((q, k, v), named, (out, lse, low), both, frozenset(wanted))
            if torch.is_grad_enabled():
                found = call.elsewhere.linked({n: given[n] for n in wanted}, inputs, (d_out, d_lse))
        return None, None, *(found.get(name) if name in wanted else None for name in NAMES)


def _given(own: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {name: x for name, x in zip(GRADS, own, strict=True) if x is not None}


def _beyond_kernels(*xs: Tensor | None) -> str:
    """What kernels cannot give in a backward pass with these tensors; empty where they can."""
    if has_tangent(*xs):
        return "forward-mode derivative of its gradients"
    if not all(x is None or is_plain(x) for x in xs):
        return "backward pass under vmap (is_grads_batched, vectorize) or another transform"
    return ""


def _as_saved(x: Tensor, look: tuple[torch.Size, torch.dtype, tuple[int, ...]]) -> Tensor:
    """What saved_tensors_hooks gave back, laid out as it was saved: kernels trust the strides of what they have made.

    Raises BackendError where its shape or dtype is another.
    """
    shape, dtype, strides = look
    if (x.shape, x.dtype) != (shape, dtype):
        raise BackendError(
            f"a saved tensor of shape {list(shape)} and {dtype} came back from its saved_tensors_hooks as "
            f"{list(x.shape)} and {x.dtype}; unpack must restore what pack was given"
        )
    if x.stride() == strides or not is_plain(x):
        return x
    once = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in strides)]
    made = once.new_empty_strided(once.shape, strides)
    overlaps = torch._debug_has_internal_overlap(made) == 1
    return (once.contiguous() if overlaps else made.copy_(once)).expand(shape)


class _Cell:
    """What the entry of a call needs from its exit: the upstream gradients of each backward pass under way."""

    def __init__(self, elsewhere: Elsewhere, wanted: tuple[str, ...], rest: Mapping[str, Any]) -> None:
        self.elsewhere, self.wanted, self.rest = elsewhere, wanted, rest
        self.names: tuple[str, ...] = ()
        self.upstream: dict[int, Upstream] = {}


def twice_differentiable(run: Run, elsewhere: Elsewhere) -> Run:
    """`run`, whose second derivatives another backend computes; the first stay its own.

    Two functions that change nothing stand around it. In a backward pass that may be differentiated in turn, the outer
    one notes the upstream gradients, and the inner one links run's gradients to them and to the inputs.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        inputs = {"q": q, "k": k, "v": v, **tensors}
        wanted = tuple(n for n in NAMES if isinstance(x := inputs.get(n), Tensor) and x.requires_grad)
        if not wanted or not torch.is_grad_enabled() or (elsewhere.problem.traced and not _in_grads_alone(inputs)):
            return run(q, k, v, **tensors)
        cell = _Cell(elsewhere, wanted, {n: x for n, x in inputs.items() if not isinstance(x, Tensor)})
        kept = tuple(n for n in inputs if n not in wanted and n not in cell.rest)
        cell.names = (*wanted, *kept)
        entered = _applied(_Entry, cell, *(inputs[n] for n in cell.names))
        inputs |= dict(zip(wanted, entered, strict=True))
        out = run(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), **inputs)
        return _applied(_Exit, cell, *out) if isinstance(out, tuple) else _applied(_Exit, cell, out)[0]

    return call


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply, without its look at the signature, which takes long and only torch.func needs."""
    if _levels():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _in_grads_alone(inputs: Mapping[str, Any]) -> bool:
    """Is a traced call made inside torch.func.grad or vjp, and recorded by nothing else?"""
    tensors = [base(x) for x in inputs.values() if isinstance(x, Tensor)]
    return {level.key().name for level in _levels()} == {"Grad"} and all(map(is_plain, tensors))


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(cell: _Cell, *xs: Tensor) -> tuple[Tensor, ...]:
        # They share the version by which torch sees a later change, and are no views, which may not be changed at all.
        return tuple(x.detach() for x in xs[: len(cell.wanted)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, *xs = inputs
        ctx.save_for_backward(*xs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell: _Cell = ctx.cell
        rest = (None,) * (len(cell.names) - len(grads))
        upstream = cell.upstream.pop(_pass(), None) if cell.upstream else None
        if upstream is None:
            return None, *grads, *rest
        inputs = {**dict(zip(cell.names, ctx.saved_tensors, strict=True)), **cell.rest}
        found: Mapping[str, Tensor | None]
        if has_tangent(*upstream) or not all(x is None or is_plain(base(x)) for x in upstream):
            what = _beyond_kernels(*upstream)
            found = cell.elsewhere.gradients(inputs, upstream, cell.wanted, what)
        else:
            given = {n: x.detach() for n, x in zip(cell.wanted, grads, strict=True) if x is not None}
            found = cell.elsewhere.linked(given, inputs, upstream)
        return None, *(found.get(n) for n in cell.wanted), *rest


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(cell: _Cell, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled() and not has_tangent(*grads):
            return None, *grads
        d_out, d_lse = (*grads, None)[:2]
        ctx.cell.upstream[_pass()] = d_out, d_lse
        return None, *(None if x is None else _without_tangent(x) for x in grads)


def _without_tangent(x: Tensor) -> Tensor:
    if not is_plain(x):
        return x
    unpack: Callable[..., Any] = forward_ad.unpack_dual
    primal: Tensor = x if forward_ad._current_level < 0 else unpack(x).primal
    return primal.detach()


_pass: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass under way."""


def watched(run: Run) -> Run:
    """`run`, made of torch's operators: what saved_tensors_hooks give back is checked, and laid out as it was.

    torch's own kernels trust the strides that they have saved.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        hooks = _hooks(False)
        if hooks is None:
            return run(q, k, v, **tensors)
        pack, unpack = hooks

        def packed(x: Tensor) -> Any:
            return (x.shape, x.dtype, x.stride()), pack(x)

        def unpacked(kept: Any) -> Tensor:
            look, inner = kept
            return _as_saved(unpack(inner), look)

        with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
            return run(q, k, v, **tensors)

    return call


_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
"""The saved_tensors_hooks in force, or None. False: not those of a trace."""
