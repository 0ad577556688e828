"""Timing: one sample of a call, warm or cold, by the CPU's clock or by device events."""

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


class Clock:
    """Takes samples in seconds a call. Device events on a GPU, with its caches flushed where the policy is cold."""

    def __init__(self, hardware: Hardware, cache: Literal["warm", "cold"], sample_seconds: float) -> None:
        self.device = "cpu" if hardware.kind == "cpu" else "cuda"
        self.cold = cache == "cold"
        self.sample_seconds = sample_seconds
        self.name = "perf_counter" if self.device == "cpu" else "cuda_events"
        self._flush: torch.Tensor | None = None
        if self.cold:
            last = hardware.caches[2] if self.device == "cpu" else 1 << 27  # no GPU has a larger L2 than 128 MiB
            size = min(max(2 * last, 1 << 25), 1 << 29)
            self._flush = torch.zeros(size // 4, device=self.device)

    def once(self, call: Thunk) -> float:
        """Seconds of one call, as it comes."""
        return self._timed(call, 1)

    def calls(self, seconds: float) -> int:
        """How often a call of that length is repeated in one sample."""
        return min(max(math.ceil(self.sample_seconds / max(seconds, 1e-9)), 1), MAX_CALLS)

    def sample(self, call: Thunk, seconds: float) -> float:
        """Seconds a call, over as many calls as fill a sample. `seconds`: roughly what one takes."""
        count = self.calls(seconds)
        if self._flush is not None:
            total = 0.0
            for _ in range(count):
                self._flush.add_(1.0)
                total += self._timed(call, 1)
            return total / count
        if seconds < LONG:
            call()
        return self._timed(call, count) / count

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
