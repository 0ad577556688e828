"""Luong's general score: the queries times the weight, and then the kernels of a plain dot product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, scores
from attnreg_cpu.variant import ELEMENTS

__all__ = ["Weighted", "dotted"]


def dotted(problem: Problem) -> Problem:
    """The problem that is left of a general score's once the queries carry the weight; any other as it is."""
    if not isinstance(problem.spec.score, scores.General) or problem.dtype not in ELEMENTS:
        return problem
    grads = problem.grads - {"score_weight"} | ({"q"} if "score_weight" in problem.grads else set())
    return replace(
        problem,
        spec=problem.spec.model_copy(update={"score": scores.Dot()}),
        head_dim=problem.head_dim_k,
        tensors=tuple(x for x in problem.tensors if x.name != "score_weight"),
        grads=frozenset(grads),
    )


class Weighted:
    """The kernels of a general score, by those of the problem that `dotted` gave; also run(q, k, v, **tensors)."""

    def __init__(self, problem: Problem, kernels: Any) -> None:
        self._heads_first = problem.spec.layout == "bhsd"
        self._kernels = kernels

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, score_weight: Tensor, **tensors: Any) -> Any:
        return self._kernels(self._weighted(q, score_weight), k, v, **tensors)

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse, low); see attnreg's Kernels."""
        weighted, rest = self._weighted(q, tensors["score_weight"]), _without_weight(tensors)
        found: tuple[Tensor, Tensor | None, Tensor | None] = self._kernels.compute(weighted, k, v, rest, for_backward)
        return found

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor | None],
        upstream: tuple[Tensor, Tensor | None],
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        """The kernels' gradients; those of q and the weight through their product, which torch differentiates."""
        q, k, v = inputs
        own = {"q": q, "score_weight": tensors["score_weight"]}
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in own.items()}
        with torch.enable_grad():
            weighted = self._weighted(leaves["q"], leaves["score_weight"])
        through = [x for x in leaves.values() if x.requires_grad]
        inner = wanted - set(own) | ({"q"} if through else set())
        rest = _without_weight(tensors)
        found: dict[str, Tensor] = self._kernels.gradients((weighted.detach(), k, v), rest, results, upstream, inner)
        if through:
            d_weighted = found.pop("q")
            parts = torch.autograd.grad([weighted], through, [d_weighted])
            found |= dict(zip((n for n, x in leaves.items() if x.requires_grad), parts, strict=True))
        return found

    def _weighted(self, q: Tensor, weight: Tensor) -> Tensor:
        rows = q if self._heads_first else q.transpose(-3, -2)
        wide = torch.promote_types(q.dtype, weight.dtype)
        weighted = (rows.to(wide) @ weight.to(wide)).to(q.dtype)
        return weighted if self._heads_first else weighted.transpose(-3, -2)


def _without_weight(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in tensors.items() if name != "score_weight"}
