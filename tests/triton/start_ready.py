"""Run by test_ready.py, without the interpreter: calls on a driver that compiles for a GPU and starts nothing.

What reaches the driver is told by value: each tensor by where it lies, each number as it is. The second call of the
same shapes takes the launches that are kept ready; it must hand over what the first way would.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnreg_triton import operators, ready
from attnreg_triton.launch import Inputs, Launch
from attnreg_triton.plan import Plan, Tile
from attnreg_triton.signatures import compile_spec

STARTED: list[tuple[Any, ...]] = []


class Started:
    """A launcher that notes what it was given; its first nine arguments are grid, stream, function and hooks."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *given: Any) -> None:
        STARTED.append((given[:3], _values(given[9:])))


def _values(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.data_ptr()
    return tuple(_values(x) for x in given) if isinstance(given, tuple) else given


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 100, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class NoGpu:
    """What Triton asks of a driver, for a Hopper card that is not here."""

    utils, launcher_cls = Utils(), Started

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def started(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    STARTED.clear()
    call()
    return list(STARTED)


MADE: list[torch.Tensor] = []
"""Tensors of calls, kept so that no two lie in the same place."""
SHAPE, ROW = (1, 2, 128, 64), (1, 2, 1, 64)
PLAN = Plan("bhsd", 0.125, right=0, forward=Tile(64, 64, 4, 2), backward_q=Tile(64, 64, 4, 2))
SPLIT = Plan("bhsd", 0.125, splits=4, forward=Tile(16, 64, 4, 2))


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    MADE.extend(torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    return MADE[-len(shapes) :]


def inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Inputs:
    return operators.make_inputs(PLAN, q, k, v, *[None] * (len(operators.FIELDS) - 3))


def forward(plan: Plan, *qkv: torch.Tensor) -> Any:
    return operators.forward(plan, inputs(*qkv))


def backward(lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *pair: torch.Tensor) -> Any:
    out, dout = pair
    saved = (out, lse, None)  # half precision without a bias has no second word of lse
    return operators.backward(PLAN, inputs(q, k, v), saved, (dout, None), [True, True, True, False, False])


def told(value: Any) -> Any:
    """An argument; outputs are made anew by each call, so where they lie says nothing."""
    if isinstance(value, tuple):
        return tuple(told(x) for x in value)
    places = {x.data_ptr() for x in MADE}
    return value if not isinstance(value, int) or value < 2**32 or value in places else "an output"


def kept_is_fresh(kind: str, call: Callable[..., Any], again: Callable[..., Any]) -> None:
    """`again` after `call` of the same looks hands over the same, kept ready or as if nothing were kept."""
    ready._ready.clear()
    started(call)
    assert len(ready._ready) == 1, kind
    kept = started(again)
    assert len(ready._ready) == 1, kind
    ready._ready.clear()
    fresh = started(again)
    assert [told(x) for x in kept] == [told(x) for x in fresh] != [], kind


def check_calls() -> None:
    x, y = tensors(SHAPE, SHAPE, SHAPE), tensors(SHAPE, SHAPE, SHAPE)
    kept_is_fresh("forward", lambda: forward(PLAN, *x), lambda: forward(PLAN, *y))
    # One tensor given three times, then three: each argument has a place of its own.
    kept_is_fresh("shared", lambda: forward(PLAN, x[0], x[0], x[0]), lambda: forward(PLAN, *y))
    a, b = tensors(ROW, SHAPE, SHAPE), tensors(ROW, SHAPE, SHAPE)
    kept_is_fresh("splits", lambda: forward(SPLIT, *a), lambda: forward(SPLIT, *b))
    lse = torch.randn(1, 2, 128)
    MADE.append(lse)
    c, d = tensors(*[SHAPE] * 5), tensors(*[SHAPE] * 5)
    kept_is_fresh("backward", lambda: backward(lse, *c), lambda: backward(lse, *d))


def check_what_is_kept() -> None:
    """Another length, place or plan is another call; no tensor of a call stays alive, nor more calls than KEPT."""
    ready._ready.clear()
    x, longer = tensors(SHAPE, SHAPE, SHAPE), tensors(SHAPE, (1, 2, 160, 64), (1, 2, 160, 64))
    odd = [x.as_strided(SHAPE, x.stride(), 1) for x in tensors(*[(1, 2, 129, 64)] * 3)]
    for plan, qkv in ((PLAN, x), (PLAN, longer), (PLAN, odd), (SPLIT, x)):
        started(lambda plan=plan, qkv=qkv: forward(plan, *qkv))
    assert len(ready._ready) == 4, len(ready._ready)

    mine = [torch.randn(1, 2, 192, 64, dtype=torch.bfloat16) for _ in range(3)]
    watched = [weakref.ref(x) for x in mine]
    forward(PLAN, *mine)
    mine.clear()
    STARTED.clear()
    gc.collect()
    assert all(ref() is None for ref in watched), "a call's tensors stay alive"

    ready._ready.clear()
    ready.KEPT = 3
    for n in range(1, 6):
        forward(PLAN, *tensors(SHAPE, (1, 2, 64 * n, 64), (1, 2, 64 * n, 64)))
    assert len(ready._ready) == 3


def check_signatures() -> None:
    """What is cross-compiled for a target is what a call compiles there: types, constants and alignment."""
    run, seen = Launch.run, []

    def compared(launch: Launch) -> Any:
        kernel, said = run(launch), compile_spec(launch)
        attrs = {path: what for path, what in kernel.src.attrs.items() if what}
        assert (kernel.src.signature, kernel.src.constants) == (said.signature, said.constexprs)
        assert attrs == said.attrs
        seen.append(said.name)
        return kernel

    Launch.run = compared  # type: ignore[method-assign]  # watched for this check alone
    ready._ready.clear()
    forward(SPLIT, *tensors(ROW, SHAPE, SHAPE))
    lse = torch.randn(1, 2, 128)
    MADE.append(lse)
    backward(lse, *tensors(*[SHAPE] * 5))
    Launch.run = run  # type: ignore[method-assign]
    assert len(seen) == 5, seen


if __name__ == "__main__":
    driver.set_active(NoGpu())
    check_calls()
    check_what_is_kept()
    check_signatures()
