"""Tensors without memory of their own, or whose memory holds their negative: what a backend meets besides plain ones.

A call hands a backend plain tensors, or, where `problem.traced`, tensors on which only torch's operators may run. In a
backward pass gradients of any kind arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from attnreg.problem import Problem
from attnreg.testing.inputs import Inputs

__all__ = ["Wrapped", "traced_fault", "traced_problem", "upstream_fault"]

Run = Callable[..., Any]


class Wrapped(Tensor):
    """A wrapper without memory of its own: torch's operators run on the tensor that it wraps."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub names its arguments otherwise
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


def traced_problem(problem: Problem) -> Problem:
    """The same problem as a tracer or a wrapper meets it: without gradients, and without values to read."""
    return replace(problem, traced=True, grads=frozenset())


def traced_fault(plain: Run, traced: Run, inputs: Inputs) -> str:
    """What is wrong with a callable that was prepared for a traced problem; empty if nothing is.

    plain: the callable of the same problem untraced, which the results are compared with.
    """
    named = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.tensors.items()}
    given = [x.detach() for x in (inputs.q, inputs.k, inputs.v)]
    with torch.no_grad():
        want = _parts(plain(*given, **named))
        got = _parts(traced(*map(Wrapped, given), **{n: _wrapped(x) for n, x in named.items()}))
        if not all(isinstance(x, Wrapped) for x in got):
            return (
                f"of tensor subclasses it gave {', '.join(type(x).__name__ for x in got)}: it read past their operators"
            )
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.held, other, rtol=1e-2, atol=1e-2, equal_nan=True)
        with FakeTensorMode() as mode:
            fakes = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in named.items()}
            shapes = _parts(traced(*map(mode.from_tensor, given), **fakes))
    for fake, other in zip(shapes, want, strict=True):
        if type(fake).__name__ != "FakeTensor" or (fake.shape, fake.dtype) != (other.shape, other.dtype):
            return (
                f"of FakeTensors it gave {type(fake).__name__} {list(fake.shape)} {fake.dtype}, expected a FakeTensor "
                f"{list(other.shape)} {other.dtype}"
            )
    return ""


def upstream_fault(run: Run, inputs: Inputs) -> str:
    """What is wrong with gradients where the upstream gradient's memory holds its negative; empty if nothing is."""
    if not inputs.leaves:
        return ""
    out = _parts(run(inputs.q, inputs.k, inputs.v, **inputs.tensors))[0]
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).to(out).reshape(out.shape)
    leaves = list(inputs.leaves.values())
    found = [
        torch.autograd.grad([out], leaves, [given], retain_graph=True, allow_unused=True)
        for given in (upstream, torch._neg_view(-upstream))
    ]
    for one, other in zip(*found, strict=True):
        if one is not None and not torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
            return "an upstream gradient whose negative bit is not resolved is read as it lies in memory"
    return ""


def _wrapped(x: Any) -> Any:
    return Wrapped(x) if isinstance(x, Tensor) else x


def _parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
