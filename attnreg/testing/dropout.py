"""Check dropout exactly: read the kept weights off the candidate itself, then hold it to the oracle with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnreg.testing.bounds import rounding_of
from attnreg.testing.candidate import GateResult, check_candidate
from attnreg.testing.inputs import Inputs
from attnreg.testing.oracle import attend
from attnreg.testing.quantised import largest, stored
from attnreg.testing.sequences import Shape, as_rows, from_rows, key_rows, pick_rows, shapes

__all__ = ["check_dropout", "kept_weights"]

VISIBLE = {torch.float16: 1e-6}
"""Weights below this may round to 0 in the output and count as kept; 1e-30 in dtypes of float32's range."""
ROUNDED = {torch.float8_e4m3fn: 2.0**-17, torch.float8_e5m2: 2.0**-30}
"""The same where weights may be rounded to 8 bits: the formats' smallest values at a scale of 2**8 or 2**14."""


def check_dropout(run: Callable[..., Any], inputs: Inputs, *, poison: bool = True, summed: bool = False) -> GateResult:
    """The candidate is linear in v, so one-hot values read off which weights it kept under one generator seed.

    It must keep the same ones again under the same seed, others under another, a share of 1 - dropout_p of them
    (within six standard deviations), and its output and gradients must be the oracle's for those. summed: see
    `check_candidate`.
    """
    case = str(inputs)
    try:
        keep, allowed = kept_weights(run, inputs)
        again, _ = kept_weights(run, inputs)
        other, _ = kept_weights(run, replace(inputs, seed=inputs.seed + 1))
    except Exception as error:
        return GateResult(False, f"raised {type(error).__name__}: {error}", float("inf"), case=case, checked=0)
    reason = _reason(inputs.problem.spec.dropout_p, keep, again, other, allowed)
    if reason:
        return GateResult(False, reason, float("inf"), case=case, checked=0)
    return check_candidate(run, inputs, poison=poison, keep=keep, summed=summed)


def _reason(p: float, keep: Tensor, again: Tensor, other: Tensor, allowed: Tensor) -> str:
    if not torch.equal(keep, again):
        return "dropout does not repeat from the same generator seed"
    count = int(allowed.sum())
    if not count:
        return ""
    share = float(keep[allowed].double().mean())
    deviation = (p * (1 - p) / count) ** 0.5
    if abs(share - (1 - p)) > 6 * deviation:
        return f"dropout_p={p}: kept {share:.4f} of {count} weights, expected {1 - p:.4f} +- {6 * deviation:.4f}"
    if count * p * (1 - p) > 64 and torch.equal(keep, other):
        return "dropout drops the same weights under another generator seed"
    return ""


@torch.no_grad()
def kept_weights(run: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(keep, visible): bool [B, Hq, Sq, Skv] each, padded with False; keep is True where nothing can be seen."""
    p, spec = inputs.problem, inputs.problem.spec
    q, k, v = inputs.q.detach(), inputs.k.detach(), inputs.v.detach()
    plain = {n: x.detach() if isinstance(x, Tensor) else x for n, x in inputs.tensors.items()}
    every = shapes(spec, q, k, plain)
    sq, skv = max((s.sq for s in every), default=0), max((s.skv for s in every), default=0)
    weights = torch.zeros(len(every), p.q_heads, sq, skv, dtype=torch.float64, device=q.device)
    true = torch.zeros_like(weights)
    for start in range(0, skv, p.head_dim_v):
        probe = _one_hot(inputs, every, v, plain, start)
        inputs.tensors["generator"].manual_seed(inputs.seed)
        out = run(q, k, probe, **plain)
        out = out[0] if isinstance(out, tuple) else out
        exact = attend(spec, q, k, probe, plain)
        for one, part in zip(every, exact, strict=True):
            width = min(p.head_dim_v, max(one.skv - start, 0))
            rows = torch.arange(one.sq, device=q.device)
            mine = pick_rows(spec.layout, out, one, rows)[..., :width]
            weights[one.b, :, : one.sq, start : start + width] = mine.double()
            true[one.b, :, : one.sq, start : start + width] = part.out[..., :width]
    rounding = rounding_of(p)
    least = ROUNDED.get(rounding.dtype, 0.0) if rounding is not None else 0.0
    visible = true > max(VISIBLE.get(p.out_dtype, 1e-30), least)
    return (weights != 0) | ~visible, visible


def _one_hot(inputs: Inputs, every: list[Shape], v: Tensor, tensors: Mapping[str, Any], start: int) -> Tensor:
    """v whose key `start + d` is the d-th unit vector and all else 0; pages that sequences share agree on it.

    A stored v holds its largest value instead of 1: its descale would make 1 too small to be seen.
    """
    spec = inputs.problem.spec
    rows = torch.zeros_like(as_rows(spec, v))
    one_hot = torch.tensor(largest(v.dtype) if stored(v.dtype) else 1.0, device=v.device).to(v.dtype)
    for one in every:
        # Table entries behind what a sequence uses name pages that others do use.
        at = key_rows(spec, one, v, tensors)[start : min(start + v.shape[-1], one.used)]
        column = torch.arange(len(at), device=v.device)
        rows[at, :, column] = one_hot
    return from_rows(spec, rows, v).contiguous()
