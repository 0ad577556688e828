"""Overhead: what a hit costs over calling the same op directly, and what a growing cache costs a step."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from attnreg import dispatch, hot
from attnreg.masks import Causal
from attnreg.spec import AttentionSpec

__all__ = ["Overhead", "measure_overhead"]

CALLS, ROUNDS, STEPS = 2000, 25, 2000


@dataclass(frozen=True)
class Overhead:
    """Microseconds, medians over interleaved rounds on one thread; a step is one of 2,000 with a growing cache.

    direct: torch's op itself. hit: attention() on the same op. prepared: the callable of prepare(). step,
    direct_step: a decode step, and the op alone. misses: of the steps.
    """

    direct: float
    hit: float
    prepared: float
    step: float
    direct_step: float
    misses: int

    @property
    def over(self) -> float:
        """What a hit costs over the op."""
        return self.hit - self.direct


def measure_overhead() -> Overhead:
    """Time calls so tiny that nothing but overhead is left, attnreg forced to the op that the direct call makes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), dispatch.use_backend("sdpa", {"kernel": "auto"}):
            return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> Overhead:
    spec = AttentionSpec(mask=Causal())
    q = torch.randn(1, 1, 16, 16)
    run = dispatch.prepare(spec, q, q, q)
    scale = 16**-0.5
    calls: dict[str, Callable[[], Any]] = {
        "direct": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale),
        "hit": lambda: dispatch.attention(spec, q, q, q),
        "prepared": lambda: run(q, q, q),
    }
    times = _interleaved(calls)
    one, cache = torch.randn(1, 1, 1, 16), torch.randn(1, 1, STEPS + 1, 16)

    def grow(step: Callable[[torch.Tensor], Any]) -> float:
        start = timeit.default_timer()
        for n in range(1, STEPS + 1):
            step(cache[:, :, :n])
        return (timeit.default_timer() - start) / STEPS * 1e6

    steps, directs, misses = [], [], 0
    for _ in range(5):
        with hot.fresh_table() as table:
            steps.append(grow(lambda kv: dispatch.attention(spec, one, kv, kv)))
            misses = table.misses
        directs.append(grow(lambda kv: F.scaled_dot_product_attention(one, kv, kv, scale=scale)))
    return Overhead(
        direct=times["direct"],
        hit=times["hit"],
        prepared=times["prepared"],
        step=statistics.median(steps),
        direct_step=statistics.median(directs),
        misses=misses,
    )


def _interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}
