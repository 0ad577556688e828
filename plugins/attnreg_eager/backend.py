"""The eager backend: the reference that runs everything the spec can say."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnreg import Hardware, Problem, SearchSpace, scores
from attnreg_eager.run import attend

__all__ = ["Eager"]

FLOPS = {"cpu": 2e10, "cuda": 2e11, "hip": 2e11}
"""Float32 operations a second that a core or multiprocessor reaches in torch's products: a guess, to rank by."""

PASSES = 20
"""Times that a score is read or written on its way through the elementwise steps."""


class Eager:
    """Attention straight from its definition in plain torch, in tiles: O(N) memory, any device and dtype."""

    name = "eager"
    version = "2"
    derivatives = frozenset({"forward", "higher"})

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Nothing is refused but what the device itself cannot repeat."""
        spec, device = problem.spec, problem.device
        if spec.deterministic and device != "cpu" and spec.page_size is not None and problem.grads & {"k", "v"}:
            return [f"deterministic=True: gradients of a paged cache add up in no fixed order on {device}"]
        return []

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """One point: the tile sizes follow from the sizes of each call."""
        return SearchSpace()

    def estimate(self, problem: Problem, hardware: Hardware) -> float:
        """Seconds, roughly: every pair is computed, masked or not; a backward computes the forward again."""
        pairs = problem.batch * problem.q_heads * problem.sq * problem.skv
        wide = problem.head_dim + problem.head_dim_v
        # A tanh costs some ten operations; an additive score takes one an entry of its hidden layer.
        flops = 2 * pairs * wide + (
            10 * pairs * problem.head_dim if isinstance(problem.spec.score, scores.Additive) else 0
        )
        rate = FLOPS.get(hardware.kind, 2e10) * max(hardware.cores, 1)
        bandwidth = hardware.bandwidth or (1e10 if hardware.kind == "cpu" else 1e12)
        forward = flops / rate + pairs * 4 * PASSES / bandwidth
        return 5e-4 + forward * (4 if problem.needs_grad else 1)

    def prepare(self, problem: Problem, config: Any) -> Any:
        """A callable for any sizes: nothing is bound but the spec, and whether values may be read."""
        spec, traced = problem.spec, problem.traced

        def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
            return attend(spec, q, k, v, tensors, traced)

        return run
