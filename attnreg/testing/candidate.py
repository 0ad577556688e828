"""Judge one prepared callable on one set of inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import error_text
from attnreg.testing.bounds import Limit, Truth, find_truths, lse_rows
from attnreg.testing.inputs import Inputs
from attnreg.testing.poison import filled_memory
from attnreg.testing.run_once import (
    Outcome,
    Refused,
    Watch,
    check_memory,
    heap_poison,
    poisoned_allocations,
    run_once,
)
from attnreg.testing.second import other_values
from attnreg.testing.sequences import pick_rows, shapes

__all__ = ["GateResult", "check_candidate", "sample_rows"]

Errors = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class GateResult:
    """The gate's verdict.

    reason: empty where ok. error, bound: the largest error of the output against the oracle and what was allowed;
    of all cases the one with the largest ratio. grad_error, grad_bound: the same of the gradients, None without
    any. case: the inputs that they belong to. checked: how many sets of inputs passed. skipped: what the backend
    refused to be tried on.
    """

    ok: bool
    reason: str = ""
    error: float = 0.0
    bound: float = 0.0
    grad_error: float | None = None
    grad_bound: float | None = None
    case: str = ""
    checked: int = 1
    skipped: tuple[str, ...] = ()


def check_candidate(
    run: Callable[..., Any],
    inputs: Inputs,
    *,
    rows: Mapping[int, Tensor] | None = None,
    poison: bool = True,
    truth: Truth | None = None,
    keep: Tensor | None = None,
    summed: bool = False,
) -> GateResult:
    """Run the candidate twice and compare it with the oracle: on the inputs, then on other values where they lie.

    rows: the query rows to compare (sequence -> int64 rows), all of them if None; NaN is looked for everywhere.
    poison: run once with every fresh allocation of torch filled with NaN; memory that was just freed is filled in
    any case. truth: the oracle's answer if it is known; one without `after` has the inputs hold the same values twice.
    summed: have the gradient that a sum gives instead of random ones, at all rows. Whatever the candidate raises is a
    failure with that text.
    """
    case = str(inputs)
    try:
        if truth is None:
            chosen = sample_rows(inputs) if rows is None or summed else rows
            truth = find_truths(inputs, chosen, keep, summed=summed)
        measured = _measured(run, inputs, truth, poison)
    except Refused as why:
        return GateResult(False, str(why), float("inf"), 0.0, case=case, checked=0)
    except (Exception, SystemExit) as error:
        return GateResult(False, f"raised {error_text(error)}", float("inf"), 0.0, case=case, checked=0)
    (off, bound), (grad_off, grad_bound) = measured[-1]
    grads = bool(inputs.leaves)
    return GateResult(True, "", off, bound, grad_off if grads else None, grad_bound if grads else None, case)


def _measured(run: Callable[..., Any], inputs: Inputs, truth: Truth, poison: bool) -> list[Errors]:
    """The errors of two runs, or Refused. The second one tells whether the candidate keeps something of the first."""
    watch = Watch(inputs)
    heap_poison(inputs, float("nan"))
    with filled_memory(), poisoned_allocations() if poison else contextlib.nullcontext():
        first = run_once(run, inputs, *truth.weights())
    watch.check()
    _clean(first)
    before = {name: x.clone() for name, x in first.tensors.items()}
    after = truth.after or truth
    with other_values(inputs, after.changed):
        watch = Watch(inputs)
        heap_poison(inputs, 7.0)
        second = run_once(run, inputs, *after.weights(again=True))
        watch.check()
        _clean(second)
        check_memory(inputs, second, first)
        for name, x in first.tensors.items():
            if not torch.equal(x, before[name]):
                raise Refused(f"{name} of one run was changed by the next")
        measured = [_compare(inputs, truth, first), _compare(inputs, after, second)]
        if inputs.problem.spec.deterministic:
            _repeats(second, run_once(run, inputs, *after.weights(again=True)))
    return measured


def sample_rows(inputs: Inputs, pairs: int = 1 << 62) -> dict[int, Tensor]:
    """Query rows of every sequence: all, or, where that makes more than `pairs` score entries, some.

    Sampled rows are the first, the last, those around multiples of 64, and others spread evenly.
    """
    p = inputs.problem
    every = shapes(p.spec, inputs.q, inputs.k, inputs.tensors)
    total = sum(one.sq * one.skv for one in every) * p.q_heads
    if total <= pairs:
        return {one.b: torch.arange(one.sq) for one in every}
    out: dict[int, Tensor] = {}
    left = pairs // max(p.q_heads, 1)
    for n, one in enumerate(sorted(every, key=lambda one: -one.sq * one.skv)):
        share = left // (len(every) - n)
        count = min(one.sq, max(share // max(one.skv, 1), 1 if n else 2))
        if not count or (share < one.skv and n):
            continue
        spread = torch.linspace(0, one.sq - 1, count).round().long()
        # Every other row moves to the end of its 64-row tile or the start of the next.
        moved = ((spread + 32) // 64 * 64 - torch.arange(count) % 4 // 3).clamp(0, one.sq - 1)
        picked = torch.where(torch.arange(count) % 2 == 1, moved, spread)
        picked[-1] = one.sq - 1
        out[one.b] = torch.unique(picked)
        left -= len(out[one.b]) * one.skv
    return out


def _clean(outcome: Outcome) -> None:
    what = "unwritten memory or NaN"  # in the second run too: memory that was used before may hold either
    for name, x in outcome.tensors.items():
        if name == "lse":
            if x.isnan().any() or (x == torch.inf).any():
                raise Refused(f"{what} in lse at {_where(x.isnan() | (x == torch.inf))}")
        elif not x.isfinite().all():
            nan = "" if x.isnan().any() else " (infinite)"
            raise Refused(f"{what} in {name}{nan} at {_where(~x.isfinite())}")


def _where(bad: Tensor) -> str:
    return f"{bad.nonzero()[0].tolist()} and {int(bad.sum()) - 1} other places"


def _compare(inputs: Inputs, truth: Truth, outcome: Outcome) -> Errors:
    """((error, bound) of the outputs, (error, bound) of the gradients): each the pair of the largest ratio."""
    spec = inputs.problem.spec
    pairs = []
    for part in truth.parts:
        mine = pick_rows(spec.layout, outcome.out, part.shape, part.rows).double()
        empty = part.empty
        if mine[empty].any():
            raise Refused(f"rows that attend nothing must be exactly 0, got {mine[empty].abs().max():.3g}")
        pairs.append((mine, part.out))
    forward = [_within("out", pairs, truth.limits["out"])]
    if outcome.lse is not None:
        pairs = []
        for part in truth.parts:
            mine = lse_rows(spec.layout, outcome.lse, part).double()
            nothing = part.lse == -torch.inf
            if not (mine[nothing] == -torch.inf).all():
                raise Refused("rows that attend nothing must have lse = -inf")
            if (mine[~nothing] == -torch.inf).any():
                raise Refused("lse is -inf in rows that attend something")
            pairs.append((mine[~nothing], part.lse[~nothing]))
        forward.append(_within("lse", pairs, truth.limits["lse"]))
    backward = [(0.0, 0.0)]
    for name, wanted in truth.grads.items():
        grad = outcome.grads[name]
        given = torch.zeros_like(wanted) if grad is None else grad.to(wanted.dtype)
        backward.append(_within(f"grad of {name}", [(given, wanted)], truth.limits[name]))
        if name == "q":
            _empty_grads(inputs, truth, given)
    return max(forward, key=_ratio), max(backward, key=_ratio)


def _empty_grads(inputs: Inputs, truth: Truth, grad: Tensor) -> None:
    for part in truth.parts:
        mine = pick_rows(inputs.problem.spec.layout, grad, part.shape, part.rows)
        if mine[part.empty].any():
            raise Refused("grad of q must be exactly 0 in rows that attend nothing")


def _ratio(pair: tuple[float, float]) -> float:
    error, bound = pair
    return error / bound if bound else (0.0 if not error else float("inf"))


def _within(name: str, pairs: list[tuple[Tensor, Tensor]], limit: Limit) -> tuple[float, float]:
    """(error, bound), or Refused where the error is larger."""
    errors = torch.cat([(mine - wanted).abs().flatten() for mine, wanted in pairs]) if pairs else torch.zeros(0)
    if not errors.numel():
        return 0.0, limit.most
    worst, mean = float(errors.max()), float(errors.mean())
    if not worst <= limit.most:
        for mine, wanted in pairs:
            gap = (mine - wanted).abs()
            if gap.numel() and not float(gap.max()) < worst:
                at = [int(n) for n in torch.unravel_index(gap.argmax(), gap.shape)]
                raise Refused(
                    f"{name}: error {worst:.3g} is above the bound {limit.most:.3g} (got {float(mine[tuple(at)]):.6g}, "
                    f"expected {float(wanted[tuple(at)]):.6g} at {at}; {int((errors > limit.most).sum())} of "
                    f"{errors.numel()} entries are off)"
                )
    if limit.mean is not None and not mean <= limit.mean:
        raise Refused(f"{name}: mean error {mean:.3g} is above the bound {limit.mean:.3g}")
    return worst, limit.most


def _repeats(one: Outcome, other: Outcome) -> None:
    for name, x in one.tensors.items():
        if not torch.equal(x, other.tensors[name]):
            raise Refused(f"deterministic=True, but {name} differs between two runs on the same inputs")
