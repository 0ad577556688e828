"""Do the derivatives that a backend says it has, beyond the first, agree with the oracle's?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from attnreg.problem import GRADS, Problem
from attnreg.testing.inputs import Inputs
from attnreg.testing.oracle import attend
from attnreg.testing.sequences import put_together

__all__ = ["asking", "check_forward", "check_higher"]

Run = Callable[..., Any]
make_dual: Callable[..., Any] = forward_ad.make_dual
unpack_dual: Callable[..., Any] = forward_ad.unpack_dual
BOUND = {"float64": 1e-5, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Of the largest entry: such a derivative is there or missing, and the gate judges rounding by the first ones."""


def asking(problem: Problem, kind: str) -> Problem:
    """The problem where tangents of all that is smooth are asked for ("forward"), or gradients of gradients."""
    smooth = {"q", "k", "v", *(t.name for t in problem.tensors if t.name in GRADS)}
    if kind == "forward":
        return replace(problem, tangents=frozenset(smooth))
    return replace(problem, order=2)


def check_forward(run: Run, inputs: Inputs) -> str:
    """Why the tangents of `run` are wrong; empty where they are right."""
    found = []
    for compute, dtype in ((run, None), (_oracle(inputs.problem), torch.float64)):
        with forward_ad.dual_level(), torch.no_grad():
            given = {n: x.detach() if dtype is None else x.detach().to(dtype) for n, x in _smooth(inputs).items()}
            duals = {n: make_dual(x, _direction(x)) for n, x in given.items()}
            results = _call(compute, inputs, duals)
            found.append([unpack_dual(y).tangent for y in results])
    return _differs("tangent", found[0], found[1], inputs.problem)


def check_higher(run: Run, inputs: Inputs) -> str:
    """Why the gradients of gradients of `run` are wrong; empty where they are right."""
    found: list[list[Tensor | None]] = []
    for compute, dtype in ((run, None), (_oracle(inputs.problem), torch.float64)):
        leaves = {n: x.detach().clone() if dtype is None else x.detach().to(dtype) for n, x in _smooth(inputs).items()}
        leaves = {n: x.requires_grad_(n in inputs.problem.grads) for n, x in leaves.items()}
        wanted = [x for x in leaves.values() if x.requires_grad]
        out = _call(compute, inputs, leaves)[0]
        first = torch.autograd.grad((out * out).sum(), wanted, create_graph=True)
        pairs = [(g, _direction(g)) for g in first if g.requires_grad]
        if not pairs:
            found.append([None] * len(wanted))
            continue
        grads, directions = zip(*pairs, strict=True)
        found.append(list(torch.autograd.grad(grads, wanted, directions, allow_unused=True)))
    return _differs("gradient of the gradient", found[0], found[1], inputs.problem)


def _smooth(inputs: Inputs) -> dict[str, Tensor]:
    return {"q": inputs.q, "k": inputs.k, "v": inputs.v, **{n: x for n, x in inputs.tensors.items() if n in GRADS}}


def _direction(x: Tensor) -> Tensor:
    return torch.sin(torch.arange(x.numel(), device=x.device) * 1.7 + 1).reshape(x.shape).to(x.dtype)


def _call(run: Run, inputs: Inputs, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    rest = {**inputs.tensors, **given}
    out = run(rest.pop("q"), rest.pop("k"), rest.pop("v"), **rest)
    return out if isinstance(out, tuple) else (out,)


def _oracle(problem: Problem) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        parts = attend(problem.spec, q, k, v, tensors, dtype=torch.float64, keep=None)
        out, lse = put_together(problem.spec.layout, q, [(part.out, part.lse) for part in parts], v.shape[-1])
        return (out, lse) if problem.spec.return_lse else out

    return run


def _differs(what: str, mine: list[Tensor | None], right: list[Tensor | None], problem: Problem) -> str:
    bound = BOUND.get(problem.dtype, 1e-1)
    for n, (x, y) in enumerate(zip(mine, right, strict=True)):
        wanted = torch.zeros(()) if y is None else y.nan_to_num(0, 0, 0)
        if x is None:
            if bool(wanted.any()):
                return f"{what} {n}: none, expected one of up to {float(wanted.abs().max()):.3g}"
            continue
        off = float((x.double().nan_to_num(0, 0, 0) - wanted).abs().max()) if x.numel() else 0.0
        most = bound * (1 + float(wanted.abs().max())) if wanted.numel() else bound
        if not off <= most:
            return f"{what} {n}: error {off:.3g} is above the bound {most:.3g}"
    return ""
