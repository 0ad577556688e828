"""Autograd: around kernels that know nothing of it, and around backends whose second derivatives another computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from attnreg.derivatives import NAMES, Elsewhere, Upstream, draw_seed, has_tangent, levels
from attnreg.errors import BackendError
from attnreg.operands import base, is_plain, settled
from attnreg.problem import GRADS, Problem

__all__ = ["Differentiable", "Kernels", "differentiable", "twice_differentiable", "watched"]

Run = Callable[..., Any]


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
        if self.elsewhere.problem.spec.dropout_p:
            rest["seed"] = draw_seed(q, rest.pop("generator", None))
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

    A function that changes nothing stands before it, and a hook behind it. In a backward pass that may be
    differentiated in turn, the hook notes the upstream gradients, and the function links run's gradients to them and to
    the inputs. Inside torch.func, which knows no hooks, a function stands behind it too.
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
        results = out if isinstance(out, tuple) else (out,)
        if levels():
            results = _applied(_Exit, cell, *results)
        else:
            for n, x in enumerate(results):
                if x.grad_fn is not None:
                    x.grad_fn.register_prehook(_note(cell, n, x.output_nr))
        return results if isinstance(out, tuple) else results[0]

    return call


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply, without its look at the signature, which takes long and only torch.func needs."""
    if levels():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _in_grads_alone(inputs: Mapping[str, Any]) -> bool:
    """Is a traced call made inside torch.func.grad or vjp, and recorded by nothing else?"""
    tensors = [base(x) for x in inputs.values() if isinstance(x, Tensor)]
    return {level.key().name for level in levels()} == {"Grad"} and all(map(is_plain, tensors))


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


def _note(cell: _Cell, n: int, output: int) -> Callable[..., Any]:
    """A hook that notes the upstream gradient of the n-th result, which is one output of the function that made it."""

    def note(grads: tuple[Tensor | None, ...]) -> Any:
        x = grads[output]
        if x is None or not (torch.is_grad_enabled() or has_tangent(x)):
            return None
        d_out, d_lse = cell.upstream.get(_pass(), (None, None))
        cell.upstream[_pass()] = (x, d_lse) if n == 0 else (d_out, x)
        return tuple(_without_tangent(x) if at == output else g for at, g in enumerate(grads))

    return note


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
