"""Calls that are traced, by torch.compile, torch.export, a mode or torch.func: attnreg's operator runs the kernels.

A call that is not traced passes none of this: an operator in Python costs more than a short decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnreg import Problem, masks, recorded

__all__ = ["traced", "traced_reasons"]


def traced_reasons(problem: Problem) -> list[str]:
    """Every reason against a problem that lies in its being traced; empty if there is none, or it is not."""
    if problem.traced and any(isinstance(part, masks.Custom) for part in masks.walk(problem.spec.mask)):
        return ["traced: the operator carries the spec as JSON, which a Custom mask has not"]
    return []


def traced(problem: Problem, config: Mapping[str, int | str | float | bool]) -> Callable[..., Any]:
    """run(q, k, v, **tensors) of a traced problem, differentiable where the problem needs it."""
    return recorded(problem, "cpu", config)
