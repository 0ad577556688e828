"""Luong's general score: the queries times the weight, and then the kernels of a plain dot product."""

from __future__ import annotations

from collections.abc import Callable
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
    """run(q, k, v, score_weight=..., **tensors) by the run of the problem that `dotted` gave."""

    def __init__(self, problem: Problem, run: Callable[..., Any]) -> None:
        self._heads_first = problem.spec.layout == "bhsd"
        self._run = run

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, score_weight: Tensor, **tensors: Any) -> Any:
        rows = q if self._heads_first else q.transpose(-3, -2)
        wide = torch.promote_types(q.dtype, score_weight.dtype)
        weighted = (rows.to(wide) @ score_weight.to(wide)).to(q.dtype)
        return self._run(weighted if self._heads_first else weighted.transpose(-3, -2), k, v, **tensors)
