"""Ways to ask for a first derivative in reverse mode."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from derivative_tables import (
    FIRST,
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

# First derivatives in reverse mode


@way(FIRST)
def backward(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    ys = f(*leaves)
    torch.autograd.backward(ys, weights_of(ys))
    return [x.grad for x in leaves]


@way(FIRST)
def of_each_result(f: Function, xs: Sequence[Tensor]) -> Any:
    out = []
    for n in range(len(f(*xs))):
        leaves = leaves_of(xs)
        y = f(*leaves)[n]
        out += torch.autograd.grad(y, leaves, like(y.detach(), n), allow_unused=True, materialize_grads=True)
    return out


@way(FIRST)
def of_one_input_alone(f: Function, xs: Sequence[Tensor]) -> Any:
    out = []
    for n in range(len(xs)):
        given = [x.detach().clone().requires_grad_(n == m) for m, x in enumerate(xs)]
        ys = [y for y in f(*given) if y.requires_grad]
        out += torch.autograd.grad(ys, [given[n]], weights_of(ys))
    return out


@way(FIRST)
def twice_over_one_graph(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    loss = loss_of(f)(*leaves)
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad for x in leaves]


@way(FIRST)
def of_a_subset(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    loss_of(f)(*leaves).backward(inputs=leaves[1:2])
    assert all(x.grad is None for n, x in enumerate(leaves) if n != 1)
    return [leaves[1].grad]


@way(FIRST)
def odd_upstream(f: Function, xs: Sequence[Tensor]) -> Any:
    """Upstream gradients that are expanded, transposed, negated lazily, zero tensors, of a subclass."""
    out = []
    for make in (
        lambda y: torch.full((), 0.5, dtype=y.dtype).expand(y.shape),
        lambda y: like(y.mT.contiguous(), 5).mT,
        lambda y: torch._neg_view(like(y, 6)),
        lambda y: torch._efficientzerotensor(y.shape, dtype=y.dtype),
        lambda y: (
            torch.imag(torch.complex(like(y, 8), like(y, 7)).conj()) if y.dtype != torch.bfloat16 else -like(y, 7)
        ),
        lambda y: like(y, 9).as_subclass(torch.nn.Parameter),
    ):
        leaves = leaves_of(xs)
        ys = f(*leaves)
        out += torch.autograd.grad(ys, leaves, [make(y.detach()) for y in ys])
    return out


@way(FIRST)
def functorch_reverse(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    out = list(torch.func.grad(loss_of(f), argnums=every)(*xs))
    ys, pull = torch.func.vjp(f, *xs)
    return [*out, *pull(tuple(weights_of(ys)))]


@way(FIRST)
def jacobian_reverse(f: Function, xs: Sequence[Tensor]) -> Any:
    """Every way to the Jacobian of some numbers, in reverse mode."""
    every = tuple(range(len(xs)))
    ways = [torch.func.jacrev(some_of(f), argnums=every)(*xs)]
    ways += [functional.jacobian(some_of(f), tuple(xs), strict=strict) for strict in (False, True)]
    ways.append(functional.jacobian(some_of(f), tuple(xs), vectorize=True))
    return ways


@way(FIRST)
def batched_gradients(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    ys = f(*leaves)
    batch = [torch.stack([like(y.detach(), 1), like(y.detach(), 2)]) for y in ys]
    return torch.autograd.grad(ys, leaves, batch, is_grads_batched=True)


@way(FIRST)
def vmapped_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    every = tuple(range(len(xs)))
    stacked = [torch.stack([x, x / 2]) for x in xs]
    out = list(torch.func.vmap(torch.func.grad(loss_of(f), argnums=every))(*stacked))
    whole = torch.func.grad(lambda *ys: torch.func.vmap(loss_of(f))(*ys).sum(), argnums=every)
    return [*out, *whole(*stacked)]


@way(FIRST)
def functional_vjp(f: Function, xs: Sequence[Tensor]) -> Any:
    ys = f(*xs)
    return functional.vjp(f, tuple(xs), tuple(weights_of(ys)))[1], functional.vjp(
        f, tuple(xs), tuple(weights_of(ys)), strict=True
    )[1]


@way(FIRST)
def anomaly(f: Function, xs: Sequence[Tensor]) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return backward(f, xs)


@way(FIRST)
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


@way(FIRST)
def checkpointed(f: Function, xs: Sequence[Tensor]) -> Any:
    return [backward(lambda *ys, r=r: checkpoint(f, *ys, use_reentrant=r), xs) for r in (True, False)]


@way(FIRST)
def hooks(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    inner = [x * 1 for x in leaves]
    seen: list[Tensor] = []
    inner[0].register_hook(lambda g: g * 2)
    inner[1].retain_grad()
    ys = f(*inner)
    ys[0].register_hook(lambda g: seen.append(g) or g * 3)
    torch.autograd.backward(ys, weights_of(ys))
    return [*(x.grad for x in leaves), inner[1].grad, *seen]


@way(FIRST)
def in_another_thread(f: Function, xs: Sequence[Tensor]) -> Any:
    leaves = leaves_of(xs)
    loss = loss_of(f)(*leaves)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    return [x.grad for x in leaves]


@way(FIRST)
def under_no_grad(f: Function, xs: Sequence[Tensor]) -> Any:
    out = []
    for mode in (torch.no_grad, torch.enable_grad):
        leaves = leaves_of(xs)
        ys = f(*leaves)
        with mode():
            out += torch.autograd.grad(ys, leaves, weights_of(ys))
    return out


@way(FIRST)
def shared_inputs(f: Function, xs: Sequence[Tensor]) -> Any:
    """Inputs that depend on one another."""
    x = xs[1].detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(f)(xs[0], x, x * 2, *xs[3:]), x)


@way(FIRST)
def changed_result(f: Function, xs: Sequence[Tensor]) -> Any:
    """The result is changed in place before the backward pass, where torch can tell: else its error."""
    leaves = leaves_of(xs)
    ys = f(*leaves)
    total = sum(y.sum() for y in ys[1:])
    result = ys[0] * 1
    result += 1
    return torch.autograd.grad((result * result).sum() + total, leaves)
