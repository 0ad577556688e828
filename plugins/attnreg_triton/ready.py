"""Launches kept ready: a call whose tensors look like an earlier one's starts its kernels with new tensors alone.

Binding names, and Triton's look at every leaf of every argument, cost the host more than a short kernel takes: two
launches of a decoding step about 100 us. All of it follows from shapes, strides, dtypes and alignment, so it is done
once for each of those, and later calls put their tensors into arguments that are otherwise complete.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .launch import Launch

Tensors = Sequence[Tensor | None]
Fill = Callable[[Tensors], Any]
KEPT = 256
"""Calls kept ready, the oldest dropped first: a growing cache passes a new length at every step."""

_ready: dict[Hashable, list[Bound]] = {}
_adding = threading.Lock()
_is_hip = torch.version.hip is not None


def start(what: Hashable, given: Tensors, made: Tensors, make: Callable[[Sequence[Any]], list[Launch]]) -> None:
    """Run the launches that `make` makes of (*given, *made), on the first one's device, or the same ones made earlier.

    `what` and the looks of the `given` tensors must decide how those look that were `made` for them and all that
    `make` does, and the launches read and write no other tensor.
    """
    first = given[0]
    assert first is not None, "the first tensor says where the launches run"
    key = (what, first.device, *map(_looks, given))
    tensors = (*given, *made)
    with _on(first.device):
        bound = _ready.get(key)
        if bound is not None:
            for one in bound:
                one.run(tensors)
            return
        # Tensors of their own, so that each is known by its identity although a caller may give one twice.
        own = [None if tensor is None else tensor.detach() for tensor in tensors]
        launches = make(own)
        kernels = [launch.run() for launch in launches]
        if all(kernel is not None for kernel in kernels):
            places = {id(tensor): n for n, tensor in enumerate(own) if tensor is not None}
            started = [(x, kernel) for x, kernel in zip(launches, kernels, strict=True) if x.grid > 0]
            bound = [Bound(launch, kernel, places) for launch, kernel in started]
            with _adding:
                _ready[key] = bound
                if len(_ready) > KEPT:
                    del _ready[next(iter(_ready))]


def once(launches: list[Launch], device: torch.device) -> None:
    """Run launches in order on a device, and keep nothing."""
    with _on(device):
        for launch in launches:
            launch.run()


def _on(device: torch.device) -> Any:
    """The device made current, where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _looks(tensor: Tensor | None) -> Hashable:
    """All of a tensor that a compiled kernel or its arguments depend on; None for one that is absent."""
    if tensor is None:
        return None
    large = _is_hip and tensor.untyped_storage().nbytes() >= 2**31
    aligned = tensor.data_ptr() % 16 == 0
    return tensor.shape, tensor.stride(), tensor.dtype, aligned, large


class Bound:
    """A compiled kernel with its grid and arguments, in which only the tensors are missing."""

    def __init__(self, launch: Launch, kernel: Any, places: Mapping[int, int]) -> None:
        given = {**launch.arguments, **launch.constants}
        values = [given[name] for name in launch.kernel().arg_names]
        fills = [filler(value, places) for value in values]
        self._start = kernel[(launch.grid, 1, 1)]
        self._values = [value if fill is None else None for value, fill in zip(values, fills, strict=True)]
        self._fills = [(n, fill) for n, fill in enumerate(fills) if fill is not None]

    def run(self, tensors: Tensors) -> None:
        """Start the kernel on the current stream."""
        values = self._values.copy()
        for n, fill in self._fills:
            values[n] = fill(tensors)
        self._start(*values)


def filler(value: Any, places: Mapping[int, int]) -> Fill | None:
    """How to make an argument anew of a call's tensors; None where it holds no tensor. `places`: by `id`."""
    if isinstance(value, Tensor):
        return operator.itemgetter(places[id(value)])
    if not isinstance(value, tuple):
        return None
    fills = [filler(leaf, places) for leaf in value]
    if not any(fills):
        return None
    kind, make, head, rest = type(value), tuple.__new__, fills[0], value[1:]
    if head is not None and not any(fills[1:]):
        return lambda tensors: make(kind, (head(tensors), *rest))
    leaves = [(leaf if fill is None else None, fill) for leaf, fill in zip(value, fills, strict=True)]
    return lambda tensors: make(kind, [leaf if fill is None else fill(tensors) for leaf, fill in leaves])
