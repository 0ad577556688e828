"""Ways to ask for a derivative: each takes a function of tensors and the tensors, and gives the derivatives it found.

The same way runs on attention in float32 or less and on the reference in float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["FIRST", "FORWARD", "SECOND", "WAYS"]

Function = Callable[..., tuple[Tensor, ...]]
Way = Callable[[Function, Sequence[Tensor]], Any]

FIRST: dict[str, Way] = {}
SECOND: dict[str, Way] = {}
FORWARD: dict[str, Way] = {}


def _way(table: dict[str, Way]) -> Callable[[Way], Way]:
    def keep(way: Way) -> Way:
        table[way.__name__] = way
        return way

    return keep


def _like(x: Tensor, n: int) -> Tensor:
    """Fixed numbers in the shape of x, equal in every dtype."""
    count = math.prod(x.shape)
    places = torch.arange(count, dtype=torch.float64)
    return (torch.sin(places * 1.7 + n * n + 1) * 8).round().reshape(x.shape).to(x.dtype) / 8


def _leaves(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in xs]


def _weights(ys: Sequence[Tensor]) -> list[Tensor]:
    return [_like(y.detach(), 100 + n) for n, y in enumerate(ys)]


def _loss(f: Function) -> Callable[..., Tensor]:
    """A number that depends on every result, not linearly."""

    def loss(*xs: Tensor) -> Tensor:
        return sum((y * _like(y, 100 + n)).sum() + (y * y).sum() / 2 for n, y in enumerate(f(*xs)))  # type: ignore[return-value]

    return loss


def _only(f: Function, n: int) -> Callable[..., Tensor]:
    return lambda *xs: f(*xs)[n]


# First derivatives in reverse mode


@_way(FIRST)
def backward(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    ys = f(*leaves)
    torch.autograd.backward(ys, _weights(ys))
    return [x.grad for x in leaves]


@_way(FIRST)
def of_each_result(f: Function, xs: Sequence[Tensor]) -> Any:
    out = []
    for n in range(len(f(*xs))):
        leaves = _leaves(xs)
        y = f(*leaves)[n]
        out += torch.autograd.grad(y, leaves, _like(y.detach(), n), allow_unused=True, materialize_grads=True)
    return out


@_way(FIRST)
def of_one_input_alone(f: Function, xs: Sequence[Tensor]) -> Any:
    out = []
    for n in range(len(xs)):
        given = [x.detach().clone().requires_grad_(n == m) for m, x in enumerate(xs)]
        ys = [y for y in f(*given) if y.requires_grad]
        out += torch.autograd.grad(ys, [given[n]], _weights(ys))
    return out


@_way(FIRST)
def twice_over_one_graph(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    loss = _loss(f)(*leaves)
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad for x in leaves]


@_way(FIRST)
def of_a_subset(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    _loss(f)(*leaves).backward(inputs=leaves[1:2])
    assert all(x.grad is None for n, x in enumerate(leaves) if n != 1)
    return [leaves[1].grad]


@_way(FIRST)
def odd_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    """Upstream gradients that are expanded, transposed, negated lazily, zero tensors, of a subclass."""
    out = []
    for make in (
        lambda y: torch.full((), 0.5, dtype=y.dtype).expand(y.shape),
        lambda y: _like(y.mT.contiguous(), 5).mT,
        lambda y: torch._neg_view(_like(y, 6)),
        lambda y: torch._efficientzerotensor(y.shape, dtype=y.dtype),
        lambda y: (
            torch.imag(torch.complex(_like(y, 8), _like(y, 7)).conj()) if y.dtype != torch.bfloat16 else -_like(y, 7)
        ),
        lambda y: _like(y, 9).as_subclass(torch.nn.Parameter),
    ):
        leaves = _leaves(xs)
        ys = f(*leaves)
        out += torch.autograd.grad(ys, leaves, [make(y.detach()) for y in ys])
    return out


@_way(FIRST)
def functorch_reverse(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    out = list(torch.func.grad(_loss(f), argnums=every)(*xs))
    ys, pull = torch.func.vjp(f, *xs)
    return [*out, *pull(tuple(_weights(ys)))]


@_way(FIRST)
def jacobian_reverse(f: Function, xs: Sequence[Tensor]) -> Any:
    """Every way to the Jacobian of some numbers, in reverse mode."""
    every = tuple(range(len(xs)))
    ways = [torch.func.jacrev(_some(f), argnums=every)(*xs)]
    ways += [functional.jacobian(_some(f), tuple(xs), strict=strict) for strict in (False, True)]
    ways.append(functional.jacobian(_some(f), tuple(xs), vectorize=True))
    return ways


def _some(f: Function) -> Callable[..., Tensor]:
    """A few numbers, each of every result."""

    def numbers(*xs: Tensor) -> Tensor:
        first, *rest = f(*xs)
        return (first * _like(first, 100)).flatten(1).sum(1) + sum((y * _like(y, 101)).sum() for y in rest)

    return numbers


@_way(FIRST)
def batched_gradients(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    ys = f(*leaves)
    batch = [torch.stack([_like(y.detach(), 1), _like(y.detach(), 2)]) for y in ys]
    return torch.autograd.grad(ys, leaves, batch, is_grads_batched=True)


@_way(FIRST)
def vmapped_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    stacked = [torch.stack([x, x / 2]) for x in xs]
    out = list(torch.func.vmap(torch.func.grad(_loss(f), argnums=every))(*stacked))
    whole = torch.func.grad(lambda *ys: torch.func.vmap(_loss(f))(*ys).sum(), argnums=every)
    return [*out, *whole(*stacked)]


@_way(FIRST)
def functional_vjp(f: Function, xs: Sequence[Tensor]) -> Any:
    ys = f(*xs)
    return functional.vjp(f, tuple(xs), tuple(_weights(ys)))[1], functional.vjp(
        f, tuple(xs), tuple(_weights(ys)), strict=True
    )[1]


@_way(FIRST)
def anomaly(f: Function, xs: Sequence[Tensor]) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return backward(f, xs)


@_way(FIRST)
def saved_tensors_repacked(f: Function, xs: Sequence[Tensor]) -> Any:
    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)

    def through_numpy(x: Tensor) -> Any:
        return x.numpy().copy() if x.dtype != torch.bfloat16 else x.clone()

    out = []
    for pack, unpack in (
        (strided, lambda x: x[..., 0]),
        (
            lambda x: x.clone(),
            lambda x: x.t().contiguous().t() if x.dim() == 2 else x.mT.contiguous().mT if x.dim() > 2 else x,
        ),
        (through_numpy, lambda x: torch.from_numpy(x) if isinstance(x, numpy.ndarray) else x),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out.append(backward(f, xs))
    with torch.autograd.graph.save_on_cpu():
        out.append(backward(f, xs))
    return out


@_way(FIRST)
def checkpointed(f: Function, xs: Sequence[Tensor]) -> Any:
    return [backward(lambda *ys, r=r: checkpoint(f, *ys, use_reentrant=r), xs) for r in (True, False)]


@_way(FIRST)
def hooks(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    inner = [x * 1 for x in leaves]
    seen: list[Tensor] = []
    inner[0].register_hook(lambda g: g * 2)
    inner[1].retain_grad()
    ys = f(*inner)
    ys[0].register_hook(lambda g: seen.append(g) or g * 3)
    torch.autograd.backward(ys, _weights(ys))
    return [*(x.grad for x in leaves), inner[1].grad, *seen]


@_way(FIRST)
def in_another_thread(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    loss = _loss(f)(*leaves)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    return [x.grad for x in leaves]


@_way(FIRST)
def under_no_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    out = []
    for mode in (torch.no_grad, torch.enable_grad):
        leaves = _leaves(xs)
        ys = f(*leaves)
        with mode():
            out += torch.autograd.grad(ys, leaves, _weights(ys))
    return out


@_way(FIRST)
def shared_inputs(f: Function, xs: Sequence[Tensor]) -> Any:
    """Inputs that depend on one another."""
    x = xs[1].detach().clone().requires_grad_()
    return torch.autograd.grad(_loss(f)(xs[0], x, x * 2, *xs[3:]), x)


@_way(FIRST)
def changed_result(f: Function, xs: Sequence[Tensor]) -> Any:
    """The result is changed in place before the backward pass, where torch can tell: else its error."""
    leaves = _leaves(xs)
    ys = f(*leaves)
    total = sum(y.sum() for y in ys[1:])
    result = ys[0] * 1
    result += 1
    return torch.autograd.grad((result * result).sum() + total, leaves)


# Gradients of gradients


@_way(SECOND)
def create_graph(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    first = torch.autograd.grad(_loss(f)(*leaves), leaves, create_graph=True)
    penalty = sum((g * g * _like(g, n)).sum() for n, g in enumerate(first))
    return [*first, *torch.autograd.grad(penalty, leaves)]


@_way(SECOND)
def create_graph_backward(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    loss = _loss(f)(*leaves)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    (loss + sum((g * g).sum() for g in first)).backward()
    return [x.grad for x in leaves]


@_way(SECOND)
def by_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    """By the upstream gradients alone: forward mode by two reverse passes."""
    leaves = _leaves(xs)
    ys = f(*leaves)
    us = [w.requires_grad_() for w in _weights(ys)]
    first = torch.autograd.grad(ys, leaves, us, create_graph=True)
    return torch.autograd.grad(first, us, [_like(x, n) for n, x in enumerate(first)])


@_way(SECOND)
def of_each_result_again(f: Function, xs: Sequence[Tensor]) -> Any:
    out: list[Tensor] = []
    for n in range(len(f(*xs))):
        leaves = _leaves(xs)
        y = f(*leaves)[n]
        u = _like(y.detach(), n).requires_grad_()
        first = torch.autograd.grad(y, leaves, u, create_graph=True, allow_unused=True, materialize_grads=True)
        out += first
        some = [g for g in first if g.requires_grad]
        weights = [_like(g, m) for m, g in enumerate(some)]
        out += torch.autograd.grad(some, [*leaves, u], weights, allow_unused=True, materialize_grads=True)
    return out


@_way(SECOND)
def of_one_gradient(f: Function, xs: Sequence[Tensor]) -> Any:
    """Of the gradient of one input, by all."""
    out: list[Tensor] = []
    for n in range(len(xs)):
        leaves = _leaves(xs)
        (first,) = torch.autograd.grad(_loss(f)(*leaves), [leaves[n]], create_graph=True)
        out += torch.autograd.grad((first * first).sum(), leaves)
    return out


@_way(SECOND)
def third_order(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    first = torch.autograd.grad(_loss(f)(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves, create_graph=True)
    third = torch.autograd.grad(sum((g * g).sum() for g in second), leaves)
    return [*second, *(x / 16 for x in third)]


@_way(SECOND)
def nested_func_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))

    def norm(*ys: Tensor) -> Tensor:
        return sum((g * g).sum() for g in torch.func.grad(_loss(f), argnums=every)(*ys))  # type: ignore[return-value]

    return torch.func.grad(norm, argnums=every)(*xs)


@_way(SECOND)
def func_grad_then_backward(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    leaves = _leaves(xs)
    sum((g * g).sum() for g in torch.func.grad(_loss(f), argnums=every)(*leaves)).backward()
    return [x.grad for x in leaves]


@_way(SECOND)
def func_vjp_by_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    ys, pull = torch.func.vjp(f, *xs)
    us = tuple(_weights(ys))

    def norm(*us: Tensor) -> Tensor:
        return sum((g * g).sum() for g in pull(us))  # type: ignore[return-value]

    out = list(torch.func.grad(norm, argnums=tuple(range(len(us))))(*us))
    leaves = [u.clone().requires_grad_() for u in us]
    return [*out, *torch.autograd.grad(norm(*leaves), leaves)]


@_way(SECOND)
def hessians(f: Function, xs: Sequence[Tensor]) -> Any:
    """Of one number by a few directions, every way."""

    def small(*ts: Tensor) -> Tensor:
        moved = [x + t * _like(x, n) for n, (x, t) in enumerate(zip(xs, ts, strict=True))]
        return _loss(f)(*moved)

    zero = tuple(torch.full((), 0.25, dtype=x.dtype) for x in xs)
    every = tuple(range(len(zero)))
    return [
        torch.func.hessian(small, argnums=every)(*zero),
        torch.func.jacrev(torch.func.jacrev(small, argnums=every), argnums=every)(*zero),
        functional.hessian(small, zero),
        functional.hessian(small, zero, strict=True),
        functional.hessian(small, zero, vectorize=True),
        functional.hessian(small, zero, vectorize=True, outer_jacobian_strategy="forward-mode"),
    ]


@_way(SECOND)
def functional_products(f: Function, xs: Sequence[Tensor]) -> Any:
    given, ts = tuple(xs), tuple(_like(x, n) for n, x in enumerate(xs))
    return [
        functional.hvp(_loss(f), given, ts)[1],
        functional.vhp(_loss(f), given, ts)[1],
        functional.jvp(f, given, ts)[1],
        functional.jvp(f, given, ts, strict=True)[1],
        functional.jacobian(_some(f), given, create_graph=True),
    ]


@_way(SECOND)
def batched_second(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = _leaves(xs)
    first = torch.autograd.grad(_loss(f)(*leaves), leaves, create_graph=True)
    batch = [torch.stack([_like(g.detach(), 1), _like(g.detach(), 2)]) for g in first]
    out = list(torch.autograd.grad(first, leaves, batch, is_grads_batched=True))
    leaves = _leaves(xs)
    ys = f(*leaves)
    batch = [torch.stack([_like(y.detach(), 1), _like(y.detach(), 2)]) for y in ys]
    both = torch.autograd.grad(ys, leaves, batch, is_grads_batched=True, create_graph=True)
    return [*out, *torch.autograd.grad(sum((g * g).sum() for g in both), leaves)]


@_way(SECOND)
def checkpointed_again(f: Function, xs: Sequence[Tensor]) -> Any:
    return create_graph(lambda *ys: checkpoint(f, *ys, use_reentrant=False), xs)


@_way(SECOND)
def saved_on_cpu_again(f: Function, xs: Sequence[Tensor]) -> Any:
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        return create_graph(f, xs)


# Forward mode


@_way(FORWARD)
def dual_numbers(f: Function, xs: Sequence[Tensor]) -> Any:
    """Of every input alone, and of all together; the results' own values too."""
    out: list[Tensor] = []
    for chosen in (*({n} for n in range(len(xs))), set(range(len(xs)))):
        with forward_ad.dual_level():
            given = [forward_ad.make_dual(x, _like(x, n)) if n in chosen else x for n, x in enumerate(xs)]
            for y in f(*given):
                both = forward_ad.unpack_dual(y)
                out += [both.primal, both.tangent if both.tangent is not None else torch.zeros_like(y)]
    return out


@_way(FORWARD)
def dual_numbers_no_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return dual_numbers(f, xs)


@_way(FORWARD)
def forward_over_reverse(f: Function, xs: Sequence[Tensor]) -> Any:
    """Tangents of gradients, and gradients of tangents."""
    with forward_ad.dual_level():
        leaves = _leaves(xs)
        given = [forward_ad.make_dual(x, _like(x, n)) for n, x in enumerate(leaves)]
        ys = f(*given)
        first = torch.autograd.grad(ys, leaves, _weights(ys), create_graph=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in first]
        by = [forward_ad.unpack_dual(y).tangent for y in ys]
        return [*tangents, *torch.autograd.grad([(t * t).sum() for t in by], leaves)]


@_way(FORWARD)
def dual_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    """The tangent of a gradient whose upstream gradient has one."""
    leaves = _leaves(xs)
    ys = f(*leaves)
    out: list[Tensor | None] = []
    for graph in (False, True):
        with forward_ad.dual_level():
            us = [forward_ad.make_dual(w, _like(w, 3)) for w in _weights(ys)]
            first = torch.autograd.grad(ys, leaves, us, create_graph=graph, retain_graph=True)
            out += [forward_ad.unpack_dual(g).tangent for g in first]
    return out


@_way(FORWARD)
def func_jvp(f: Function, xs: Sequence[Tensor]) -> Any:
    given, ts = tuple(xs), tuple(_like(x, n) for n, x in enumerate(xs))
    return torch.func.jvp(f, given, ts)


@_way(FORWARD)
def func_linearize(f: Function, xs: Sequence[Tensor]) -> Any:
    ys, push = torch.func.linearize(f, *xs)
    return ys, push(*(_like(x, n) for n, x in enumerate(xs)))


@_way(FORWARD)
def func_jvp_of_one(f: Function, xs: Sequence[Tensor]) -> Any:
    return [
        torch.func.jvp(lambda x, n=n: f(*xs[:n], x, *xs[n + 1 :]), (xs[n],), (_like(xs[n], n),)) for n in range(len(xs))
    ]


@_way(FORWARD)
def func_mixed(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    given, ts = tuple(xs), tuple(_like(x, n) for n, x in enumerate(xs))
    jvp_of_grad = torch.func.jvp(torch.func.grad(_loss(f), argnums=every), given, ts)
    grad_of_jvp = torch.func.grad(lambda *ys: torch.func.jvp(_loss(f), ys, ts)[1], argnums=every)(*xs)
    leaves = _leaves(xs)
    torch.func.jvp(_loss(f), tuple(leaves), ts)[1].backward()
    return [jvp_of_grad, grad_of_jvp, [x.grad for x in leaves]]


@_way(FORWARD)
def jacobian_forward(f: Function, xs: Sequence[Tensor]) -> Any:
    def small(*ts: Tensor) -> tuple[Tensor, ...]:
        return f(*(x + t * _like(x, n) for n, (x, t) in enumerate(zip(xs, ts, strict=True))))

    zero = tuple(torch.full((2,), 0.25, dtype=x.dtype).sum() for x in xs)
    every = tuple(range(len(zero)))
    return [
        torch.func.jacfwd(small, argnums=every)(*zero),
        functional.jacobian(small, zero, vectorize=True, strategy="forward-mode"),
        torch.func.jacfwd(torch.func.jacfwd(lambda *ts: _some(small)(*ts), argnums=every), argnums=every)(*zero),
    ]


@_way(FORWARD)
def vmapped_jvp(f: Function, xs: Sequence[Tensor]) -> Any:
    stacked = tuple(torch.stack([x, x / 2]) for x in xs)
    ts = tuple(_like(x, n) for n, x in enumerate(stacked))
    inner = torch.func.vmap(lambda x, t: torch.func.jvp(f, x, t))(stacked, ts)
    return [inner, torch.func.jvp(torch.func.vmap(f), stacked, ts)]


WAYS: dict[str, Way] = {**FIRST, **SECOND, **FORWARD}
