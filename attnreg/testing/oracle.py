"""The oracle: attention in float64, straight from the definition, in query chunks, independent of every backend.

The same code in a lower dtype is the plain eager computation whose error the gate allows twice of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnreg import scores
from attnreg.spec import AttentionSpec
from attnreg.testing.meaning import Place, allowed
from attnreg.testing.quantised import Rounding, descaled, grouped
from attnreg.testing.sequences import Shape, put_together, shapes, take_apart
from attnreg.testing.unused import keys_used

__all__ = ["Part", "attend", "oracle"]

CHUNK = 1 << 22
"""Scores held at a time: 32 MiB in float64."""


@dataclass(frozen=True)
class Part:
    """What one sequence gives. out: [Hq, n, Dv]; lse: [Hq, n]; empty: bool [Hq, n], rows that attend nothing."""

    shape: Shape
    rows: Tensor
    out: Tensor
    lse: Tensor
    empty: Tensor


@dataclass(frozen=True)
class Options:
    """How `attend` computes: see its arguments."""

    dtype: torch.dtype
    rounding: Rounding | None
    keep: Tensor | None
    tremble: float


BOTTOM = 1e30


class Tremble(torch.autograd.Function):
    """The identity, whose gradient is only what rounding does to it.

    A flash backward pass computes the weights again from logits that are rounded to eps of their size, so each
    weight, and with it each logit's gradient, is off by a part of eps * (4 + abs(logit)), with any sign. The
    gradients that come out of this node's graph are those errors, carried to the inputs.
    """

    @staticmethod
    def forward(ctx: Any, score: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(score)
        ctx.eps = eps
        return score.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (score,) = ctx.saved_tensors
        return grad * shake(score, ctx.eps), None


def shake(score: Tensor, eps: float) -> Tensor:
    """Relative errors of exp(score), of either sign without a pattern, the same at every call.

    A score beyond BOTTOM is its bias, to the last bit: nothing that is added to it changes it in any dtype.
    """
    size = torch.where(score.isfinite(), torch.where(score.abs() < BOTTOM, score.abs(), 0.0) + 4, 0.0) * eps
    index = torch.arange(score.numel(), device=score.device).reshape(score.shape)
    return size * (1 - 2 * ((index * 2654435761 >> 13) & 1))


def oracle(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None = None, **tensors: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 of any spec, differentiable in every float tensor.

    q, k, v and `tensors` are what `attnreg.attention` takes, in the spec's layout. `out` has that layout; `lse`
    is [B, Hq, Sq] (thd: [Hq, T]). Memory grows with Sq + Skv, not with their product: chunks of queries are
    recomputed in the backward pass. A row that attends nothing gives 0 and -inf (with a sink: lse = sink).

    Dropout is no part of a definition that repeats: it is left out unless `keep` says which weights stay (bool,
    [B, Hq, Sq, Skv]); those are divided by 1 - dropout_p.
    """
    parts = attend(spec, q, k, v, tensors, keep=keep)
    return put_together(spec.layout, q, [(part.out, part.lse) for part in parts], v.shape[-1])


def attend(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    rounding: Rounding | None = None,
    rows: Mapping[int, Tensor] | None = None,
    keep: Tensor | None = None,
    tremble: float = 0.0,
) -> list[Part]:
    """Every sequence's result, computed in `dtype`; softmax statistics never below float32.

    rows: sequence -> the query rows wanted (int64); a sequence that is not named gives none. rounding: what a
    quantised computation rounds on its way. tremble: see `Tremble`; 0 is off.
    """
    out = []
    for one in shapes(spec, q, k, tensors):
        picked = torch.arange(one.sq) if rows is None else rows.get(one.b, torch.arange(0))
        how = Options(dtype, rounding, keep, tremble)
        out.append(_sequence(spec, one, picked.to(q.device), q, k, v, tensors, how))
    return out


def _sequence(
    spec: AttentionSpec,
    one: Shape,
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Mapping[str, Any],
    how: Options,
) -> Part:
    q_one, k_one, v_one = take_apart(spec, one, q, k, v, tensors)
    q_one, k_one, v_one = descaled(spec, one, q_one[:, rows], k_one, v_one, tensors, how.dtype)
    # What is not used is no part of the call, whatever it holds: not of a scale that rounding takes, either.
    there = torch.arange(one.skv, device=q.device)[:, None] < keys_used(spec, one, tensors)
    k_one, v_one = (torch.where(there, x, torch.zeros((), dtype=x.dtype, device=x.device)) for x in (k_one, v_one))
    if how.rounding is not None:
        q_one, k_one, v_one = how.rounding.inputs(q_one, k_one, v_one)
    heads, width = q_one.shape[0], q_one.shape[-1] if isinstance(spec.score, scores.Additive) else 1
    step = max(1, CHUNK // max(heads * one.skv * width, 1))
    outs, lses, empties = [], [], []
    graph = torch.is_grad_enabled() and len(rows) > step
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        arguments = (spec, one, chunk, q_one[:, start : start + step], k_one, v_one, tensors, how)
        done = checkpoint(_chunk, *arguments, use_reentrant=False) if graph else _chunk(*arguments)
        outs.append(done[0])
        lses.append(done[1])
        empties.append(done[2])
    if not outs:
        work = _statistics(how.dtype)
        return Part(
            one,
            rows,
            q_one.new_zeros(heads, 0, v_one.shape[-1]),
            torch.zeros(heads, 0, dtype=work, device=q.device),
            torch.zeros(heads, 0, dtype=torch.bool, device=q.device),
        )
    return Part(one, rows, torch.cat(outs, 1), torch.cat(lses, 1), torch.cat(empties, 1))


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk(
    spec: AttentionSpec,
    one: Shape,
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Mapping[str, Any],
    how: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some queries of one sequence against all its keys. q: [Hq, n, Dq]; k, v: [Hkv, Skv, D]."""
    heads, group = q.shape[0], q.shape[0] // k.shape[0]
    positions = rows + one.offset
    place = Place(one.b, rows, positions, heads, one.skv, spec.layout == "thd")
    may = allowed(spec, place, tensors).expand(heads, len(rows), one.skv)
    may = may & (torch.arange(one.skv, device=q.device) < one.used)
    # A key that none of these rows may attend leaves no trace, even where its products would overflow.
    seen = grouped(may, group).any(1).any(1)[..., None]
    k, v = (torch.where(seen, x, torch.zeros((), dtype=x.dtype, device=x.device)) for x in (k, v))
    score = _score(spec, q, k, tensors).to(_statistics(q.dtype))
    score = torch.where(may, score, torch.zeros((), dtype=score.dtype, device=q.device))
    if spec.softcap:
        raw, score = score, spec.softcap * torch.tanh(score / spec.softcap)
        if how.tremble:  # where tanh is saturated, 1 - tanh ** 2 is off by eps, not by eps of itself
            score = score + (2 / (4 + score.abs())).detach() * (raw - raw.detach())
    if spec.bias:
        score = score + _part_of(tensors["bias"], one, rows).to(score.dtype)
    if spec.alibi:
        slopes = tensors["alibi_slopes"].to(score.dtype)
        slopes = slopes[one.b if slopes.shape[0] > 1 else 0] if slopes.dim() == 2 else slopes
        distance = (positions[:, None] - torch.arange(one.skv, device=q.device)).abs()
        score = score - slopes[:, None, None] * distance.to(score.dtype)
    if how.tremble:
        score = Tremble.apply(score, how.tremble)  # type: ignore[no-untyped-call]  # torch has no types for it
    score = score.masked_fill(~may, -torch.inf)
    sink = tensors["sinks"].to(score.dtype)[:, None, None].expand(-1, len(rows), 1) if spec.sinks else None
    if how.tremble and sink is not None:
        sink = Tremble.apply(sink, how.tremble)  # type: ignore[no-untyped-call]  # as above
    weights, lse, empty = _softmax(score, sink)
    if how.keep is not None:
        keep = how.keep
        kept = keep.expand(-1, heads, -1, -1)[one.b if keep.shape[0] > 1 else 0][:, rows, : one.skv]
        weights = weights * kept / (1 - spec.dropout_p)
    if how.rounding is not None:
        return how.rounding.product(weights, v, group).to(q.dtype), lse, empty
    weights = grouped(weights.to(q.dtype), group)
    if how.tremble:
        # What v gets through weights that are off: their error alone, in the place of the weights.
        off = weights.detach() * grouped(shake(score.detach(), how.tremble), group)
        fixed = v.detach()[:, None]
        # What the output gets: softmax takes off what all weights of a row have in common.
        change = (off - weights.detach() * off.sum(-1, keepdim=True)) @ fixed
        return (weights @ fixed + change + off @ (v[:, None] - fixed)).flatten(0, 1), lse, empty
    return (weights @ v[:, None]).flatten(0, 1), lse, empty


def _score(spec: AttentionSpec, q: Tensor, k: Tensor, tensors: Mapping[str, Any]) -> Tensor:
    """Raw scores [Hq, n, Skv], scaled."""
    group = q.shape[0] // k.shape[0]
    if isinstance(spec.score, scores.Additive):
        weight: Tensor = tensors["score_weight"].to(q.dtype).expand(q.shape[0], -1)
        hidden = torch.tanh(q[:, :, None] + k.repeat_interleave(group, 0)[:, None])
        return (hidden @ weight[:, None, :, None]).squeeze(-1)
    factor = 1.0
    if isinstance(spec.score, scores.General):
        q = q @ tensors["score_weight"].to(q.dtype)
    elif isinstance(spec.score, scores.ScaledDot):
        factor = spec.score.scale if spec.score.scale is not None else 1 / q.shape[-1] ** 0.5
    elif not isinstance(spec.score, scores.Dot):
        raise TypeError(f"oracle: no meaning written down for {spec.score!r}")
    return (grouped(q, group) @ k[:, None].transpose(-1, -2)).flatten(0, 1) * factor


def _part_of(table: Tensor, one: Shape, rows: Tensor) -> Tensor:
    """The sequence's rows and keys of something that broadcasts to [B, Hq, Sq, Skv]."""
    table = table.reshape((1,) * (4 - table.dim()) + tuple(table.shape))
    table = table[one.b if table.shape[0] > 1 else 0]
    table = table[:, rows] if table.shape[1] > 1 else table
    return table[:, :, : one.skv] if table.shape[2] > 1 else table


def _softmax(score: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, lse, empty). score: [Hq, n, Skv], -inf where masked; sink: [Hq, n, 1] or None."""
    none = score.new_full((*score.shape[:-1], 1), -torch.inf)  # of size 1 even where there are no keys
    top = torch.cat([score, none if sink is None else sink], -1).detach().amax(-1, keepdim=True)
    empty = (score.detach() == -torch.inf).all(-1, keepdim=True)
    nothing = top == -torch.inf
    top = top.masked_fill(nothing, 0.0)
    mass = torch.exp(score - top)
    total = mass.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    total = torch.where(nothing, torch.ones_like(total), total)
    lse = torch.where(nothing, torch.full_like(total, -torch.inf), top + torch.log(total))
    return mass / total, lse.squeeze(-1), empty.squeeze(-1)
