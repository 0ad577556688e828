"""Timing: one sample of a call, warm or cold, by the CPU's clock or by device events around a recorded graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from attnreg.backend import Prepared
from attnreg.hardware import Hardware
from attnreg.testing import Inputs

__all__ = ["Clock", "bind"]

Thunk = Callable[[], Any]
# Above this a warm-up call before each sample costs more than a cache that is not yet warm.
LONG = 20e-3
MAX_CALLS = 4096
RECORDED_SECONDS = 1e-3
"""A graph holds as many calls as take this long, so that starting it does not count."""
MAX_RECORDED = 64


def bind(run: Prepared, inputs: Inputs) -> Thunk:
    """A call without arguments: forward, and backward through every leaf where the problem has any.

    The gradient of the output is drawn once; gradients are returned and dropped, never accumulated.
    """
    q, k, v, tensors = inputs.q, inputs.k, inputs.v, inputs.tensors
    leaves = list(inputs.leaves.values())
    if not leaves:
        return lambda: run(q, k, v, **tensors)
    weights: list[torch.Tensor] = []

    def both() -> Any:
        result = run(q, k, v, **tensors)
        outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
        if not weights:
            generator = torch.Generator(q.device).manual_seed(1)
            weights.extend(torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs)
        return torch.autograd.grad(outputs, leaves, weights, allow_unused=True)

    return both


class Recorded:
    """`count` calls recorded into a CUDA graph: a replay takes what the device takes, whatever the host does."""

    def __init__(self, call: Thunk, count: int) -> None:
        self.count = count
        self._call = call  # a graph reads where the call's tensors lie: they must stay, whoever else forgets the call
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # what a first call on a stream sets up is no part of the recording
            call()
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(count):
                call()

    def __call__(self) -> None:
        self._graph.replay()


class Clock:
    """Takes samples in seconds a call. Device events on a GPU, with its caches flushed where the policy is cold."""

    def __init__(self, hardware: Hardware, cache: Literal["warm", "cold"], sample_seconds: float) -> None:
        self.device = "cpu" if hardware.kind == "cpu" else "cuda"
        self.cold = cache == "cold"
        self.sample_seconds = sample_seconds
        self.name = "perf_counter" if self.device == "cpu" else "cuda_graphs"
        self._flush: torch.Tensor | None = None
        if self.cold:
            last = hardware.caches[2] if self.device == "cpu" else 1 << 27  # no GPU has a larger L2 than 128 MiB
            size = min(max(2 * last, 1 << 25), 1 << 29)
            self._flush = torch.zeros(size // 4, device=self.device)

    def recorded(self, call: Thunk, seconds: float) -> tuple[Thunk, float]:
        """The call as samples are best taken of it, and its seconds.

        On a GPU it is recorded where it can be: short kernels are timed as they run inside a graph, not as the host
        starts them, which depends on the host and on what else it does. What cannot be recorded stays as it is.
        """
        if self.device == "cpu":
            return call, seconds
        count = 1 if self.cold else min(max(math.ceil(RECORDED_SECONDS / max(seconds, 1e-9)), 1), MAX_RECORDED)
        try:
            graph = Recorded(call, count)
            return graph, min(self._timed(graph, 1) for _ in range(3)) / count
        except Exception:  # a call that synchronises, or allocates outside of torch: whatever it raises, time it as is
            torch.cuda.synchronize()
            return call, seconds

    def once(self, call: Thunk) -> float:
        """Seconds of one call, as it comes."""
        return self._timed(call, 1)

    def calls(self, seconds: float) -> int:
        """How often a call of that length is repeated in one sample."""
        return min(max(math.ceil(self.sample_seconds / max(seconds, 1e-9)), 1), MAX_CALLS)

    def sample(self, call: Thunk, seconds: float) -> float:
        """Seconds a call, over as many calls as fill a sample. `seconds`: roughly what one takes."""
        each = call.count if isinstance(call, Recorded) else 1
        count = -(-self.calls(seconds) // each)
        if self._flush is not None:
            total = 0.0
            for _ in range(count):
                self._flush.add_(1.0)
                total += self._timed(call, 1)
            return total / (count * each)
        if seconds < LONG:
            call()
        return self._timed(call, count) / (count * each)

    def _timed(self, call: Thunk, count: int) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            for _ in range(count):
                call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3
