"""The eager backend: the reference that runs everything the spec can say."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnreg import Hardware, Problem, SearchSpace
from attnreg_eager.run import attend

__all__ = ["Eager"]


class Eager:
    """Attention straight from its definition in plain torch, in tiles: O(N) memory, any device and dtype."""

    name = "eager"
    version = "1"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Nothing is refused."""
        return []

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """One point: the tile sizes follow from the sizes of each call."""
        return SearchSpace()

    def prepare(self, problem: Problem, config: Any) -> Any:
        """A callable for any sizes: nothing but the spec is bound."""
        spec = problem.spec

        def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
            return attend(spec, q, k, v, tensors)

        return run
