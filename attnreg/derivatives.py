"""Derivatives: which ones a call asks for, and those that a backend does not have itself.

A backend says by `derivatives` what it has beyond a first derivative in reverse mode: "forward" (tangents) and "higher"
(gradients of gradients). What it does not say it refuses. A second derivative that shows only in the backward pass
(`create_graph=True`) is computed by the next backend that has it, from the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from attnreg.errors import BackendError
from attnreg.operands import base
from attnreg.problem import GRADS, Problem
from attnreg.tracing import is_traced

__all__ = [
    "NAMES",
    "Elsewhere",
    "Upstream",
    "asked",
    "draw_seed",
    "gradients_again",
    "has_higher",
    "has_tangent",
    "levels",
    "refusals",
    "set_able",
]

NAMES = ("q", "k", "v", *GRADS)
"""All tensors that a result depends on smoothly."""

Run = Callable[..., Any]
Upstream = tuple[Tensor | None, Tensor | None]
"""The gradients of out and lse that a backward pass starts from."""
_able: Callable[[Problem], Run] | None = None


def asked(q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> tuple[frozenset[str], int]:
    """The names with a forward-mode tangent, and how often the result is differentiated as far as is known now."""
    stack = levels()
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


def levels() -> list[Any]:
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
    spec = problem.spec.changed(return_lse=True)
    tangents = problem.tangents | (frozenset(wanted) if has_tangent(*inputs.values(), *upstream) else frozenset())
    traced = is_traced(*inputs.values(), *upstream)
    run = _able(replace(problem, spec=spec, order=max(problem.order, 2), tangents=tangents, traced=traced))
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


def draw_seed(q: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The seed of a call's dropout, int64 [1]: drawn on its device: nothing waits, and recorders see it drawn."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=q.device, generator=generator)


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
