"""Ways to ask for gradients of gradients, and for derivatives in forward mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from derivative_tables import (
    FORWARD,
    SECOND,
    Function,
    leaves_of,
    like,
    loss_of,
    some_of,
    way,
    weights_of,
)
from torch import Tensor
from torch.autograd import functional
from torch.utils.checkpoint import checkpoint

# Gradients of gradients


@way(SECOND)
def create_graph(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    first = torch.autograd.grad(loss_of(f)(*leaves), leaves, create_graph=True)
    penalty = sum((g * g * like(g, n)).sum() for n, g in enumerate(first))
    return [*first, *torch.autograd.grad(penalty, leaves)]


@way(SECOND)
def create_graph_backward(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    loss = loss_of(f)(*leaves)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    (loss + sum((g * g).sum() for g in first)).backward()
    return [x.grad for x in leaves]


@way(SECOND)
def by_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    """By the upstream gradients alone: forward mode by two reverse passes."""
    leaves = leaves_of(xs)
    ys = f(*leaves)
    us = [w.requires_grad_() for w in weights_of(ys)]
    first = torch.autograd.grad(ys, leaves, us, create_graph=True)
    return torch.autograd.grad(first, us, [like(x, n) for n, x in enumerate(first)])


@way(SECOND)
def of_each_result_again(f: Function, xs: Sequence[Tensor]) -> Any:
    out: list[Tensor] = []
    for n in range(len(f(*xs))):
        leaves = leaves_of(xs)
        y = f(*leaves)[n]
        u = like(y.detach(), n).requires_grad_()
        first = torch.autograd.grad(y, leaves, u, create_graph=True, allow_unused=True, materialize_grads=True)
        out += first
        some = [g for g in first if g.requires_grad]
        weights = [like(g, m) for m, g in enumerate(some)]
        out += torch.autograd.grad(some, [*leaves, u], weights, allow_unused=True, materialize_grads=True)
    return out


@way(SECOND)
def of_one_gradient(f: Function, xs: Sequence[Tensor]) -> Any:
    """Of the gradient of one input, by all."""
    out: list[Tensor] = []
    for n in range(len(xs)):
        leaves = leaves_of(xs)
        (first,) = torch.autograd.grad(loss_of(f)(*leaves), [leaves[n]], create_graph=True)
        out += torch.autograd.grad((first * first).sum(), leaves)
    return out


@way(SECOND)
def third_order(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    first = torch.autograd.grad(loss_of(f)(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves, create_graph=True)
    third = torch.autograd.grad(sum((g * g).sum() for g in second), leaves)
    return [*second, *(x / 16 for x in third)]


@way(SECOND)
def nested_func_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))

    def norm(*ys: Tensor) -> Tensor:
        return sum((g * g).sum() for g in torch.func.grad(loss_of(f), argnums=every)(*ys))  # type: ignore[return-value]

    return torch.func.grad(norm, argnums=every)(*xs)


@way(SECOND)
def func_grad_then_backward(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    leaves = leaves_of(xs)
    sum((g * g).sum() for g in torch.func.grad(loss_of(f), argnums=every)(*leaves)).backward()
    return [x.grad for x in leaves]


@way(SECOND)
def func_vjp_by_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    ys, pull = torch.func.vjp(f, *xs)
    us = tuple(weights_of(ys))

    def norm(*us: Tensor) -> Tensor:
        return sum((g * g).sum() for g in pull(us))  # type: ignore[return-value]

    out = list(torch.func.grad(norm, argnums=tuple(range(len(us))))(*us))
    leaves = [u.clone().requires_grad_() for u in us]
    return [*out, *torch.autograd.grad(norm(*leaves), leaves)]


@way(SECOND)
def hessians(f: Function, xs: Sequence[Tensor]) -> Any:
    """Of one number by a few directions, every way."""

    def small(*ts: Tensor) -> Tensor:
        moved = [x + t * like(x, n) for n, (x, t) in enumerate(zip(xs, ts, strict=True))]
        return loss_of(f)(*moved)

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


@way(SECOND)
def functional_products(f: Function, xs: Sequence[Tensor]) -> Any:
    given, ts = tuple(xs), tuple(like(x, n) for n, x in enumerate(xs))
    return [
        functional.hvp(loss_of(f), given, ts)[1],
        functional.vhp(loss_of(f), given, ts)[1],
        functional.jvp(f, given, ts)[1],
        functional.jvp(f, given, ts, strict=True)[1],
        functional.jacobian(some_of(f), given, create_graph=True),
    ]


@way(SECOND)
def batched_second(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    first = torch.autograd.grad(loss_of(f)(*leaves), leaves, create_graph=True)
    batch = [torch.stack([like(g.detach(), 1), like(g.detach(), 2)]) for g in first]
    out = list(torch.autograd.grad(first, leaves, batch, is_grads_batched=True))
    leaves = leaves_of(xs)
    ys = f(*leaves)
    batch = [torch.stack([like(y.detach(), 1), like(y.detach(), 2)]) for y in ys]
    both = torch.autograd.grad(ys, leaves, batch, is_grads_batched=True, create_graph=True)
    return [*out, *torch.autograd.grad(sum((g * g).sum() for g in both), leaves)]


@way(SECOND)
def checkpointed_again(f: Function, xs: Sequence[Tensor]) -> Any:
    return create_graph(lambda *ys: checkpoint(f, *ys, use_reentrant=False), xs)


@way(SECOND)
def saved_on_cpu_again(f: Function, xs: Sequence[Tensor]) -> Any:
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        return create_graph(f, xs)


# Forward mode


@way(FORWARD)
def dual_numbers(f: Function, xs: Sequence[Tensor]) -> Any:
    """Of every input alone, and of all together; the results' own values too."""
    out: list[Tensor] = []
    for chosen in (*({n} for n in range(len(xs))), set(range(len(xs)))):
        with forward_ad.dual_level():
            given = [forward_ad.make_dual(x, like(x, n)) if n in chosen else x for n, x in enumerate(xs)]
            for y in f(*given):
                both = forward_ad.unpack_dual(y)
                out += [both.primal, both.tangent if both.tangent is not None else torch.zeros_like(y)]
    return out


@way(FORWARD)
def dual_numbers_no_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return dual_numbers(f, xs)


@way(FORWARD)
def forward_over_reverse(f: Function, xs: Sequence[Tensor]) -> Any:
    """Tangents of gradients, and gradients of tangents."""
    with forward_ad.dual_level():
        leaves = leaves_of(xs)
        given = [forward_ad.make_dual(x, like(x, n)) for n, x in enumerate(leaves)]
        ys = f(*given)
        first = torch.autograd.grad(ys, leaves, weights_of(ys), create_graph=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in first]
        by = [forward_ad.unpack_dual(y).tangent for y in ys]
        return [*tangents, *torch.autograd.grad([(t * t).sum() for t in by], leaves)]


@way(FORWARD)
def dual_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    """The tangent of a gradient whose upstream gradient has one."""
    leaves = leaves_of(xs)
    ys = f(*leaves)
    out: list[Tensor | None] = []
    for graph in (False, True):
        with forward_ad.dual_level():
            us = [forward_ad.make_dual(w, like(w, 3)) for w in weights_of(ys)]
            first = torch.autograd.grad(ys, leaves, us, create_graph=graph, retain_graph=True)
            out += [forward_ad.unpack_dual(g).tangent for g in first]
    return out


@way(FORWARD)
def func_jvp(f: Function, xs: Sequence[Tensor]) -> Any:
    given, ts = tuple(xs), tuple(like(x, n) for n, x in enumerate(xs))
    return torch.func.jvp(f, given, ts)


@way(FORWARD)
def func_linearize(f: Function, xs: Sequence[Tensor]) -> Any:
    ys, push = torch.func.linearize(f, *xs)
    return ys, push(*(like(x, n) for n, x in enumerate(xs)))


@way(FORWARD)
def func_jvp_of_one(f: Function, xs: Sequence[Tensor]) -> Any:
    return [
        torch.func.jvp(lambda x, n=n: f(*xs[:n], x, *xs[n + 1 :]), (xs[n],), (like(xs[n], n),)) for n in range(len(xs))
    ]


@way(FORWARD)
def func_mixed(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    given, ts = tuple(xs), tuple(like(x, n) for n, x in enumerate(xs))
    jvp_of_grad = torch.func.jvp(torch.func.grad(loss_of(f), argnums=every), given, ts)
    grad_of_jvp = torch.func.grad(lambda *ys: torch.func.jvp(loss_of(f), ys, ts)[1], argnums=every)(*xs)
    leaves = leaves_of(xs)
    torch.func.jvp(loss_of(f), tuple(leaves), ts)[1].backward()
    return [jvp_of_grad, grad_of_jvp, [x.grad for x in leaves]]


@way(FORWARD)
def jacobian_forward(f: Function, xs: Sequence[Tensor]) -> Any:
    def small(*ts: Tensor) -> tuple[Tensor, ...]:
        return f(*(x + t * like(x, n) for n, (x, t) in enumerate(zip(xs, ts, strict=True))))

    zero = tuple(torch.full((2,), 0.25, dtype=x.dtype).sum() for x in xs)
    every = tuple(range(len(zero)))
    return [
        torch.func.jacfwd(small, argnums=every)(*zero),
        functional.jacobian(small, zero, vectorize=True, strategy="forward-mode"),
        torch.func.jacfwd(torch.func.jacfwd(lambda *ts: some_of(small)(*ts), argnums=every), argnums=every)(*zero),
    ]


@way(FORWARD)
def vmapped_jvp(f: Function, xs: Sequence[Tensor]) -> Any:
    stacked = tuple(torch.stack([x, x / 2]) for x in xs)
    ts = tuple(like(x, n) for n, x in enumerate(stacked))
    inner = torch.func.vmap(lambda x, t: torch.func.jvp(f, x, t))(stacked, ts)
    return [inner, torch.func.jvp(torch.func.vmap(f), stacked, ts)]
