"""Exact merging of attention states over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from attnreg.errors import DeviceError, DtypeError, InputError, ShapeError
from attnreg.operands import settled

__all__ = ["merge_states"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LSE = {"bhsd": (0, 1, 2), "bshd": (0, 2, 1), "thd": (1, 0)}
"""Where each dimension of lse lies in out, apart from Dv."""


def merge_states(states: Sequence[tuple[Tensor, Tensor]], *, layout: str = "bhsd") -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from `(out, lse)` over each: what split-KV decoding, ring
    attention and prefix caching need.

    states: one or more pairs as `attention` returns them under `return_lse=True`: out is [B, H, Sq, Dv] under bhsd,
    [B, Sq, H, Dv] under bshd and [T, H, Dv] under thd, in float16, bfloat16, float32 or float64, all of one shape and
    dtype; lse is [B, H, Sq] (thd: [H, T]), float32 or float64, the natural logarithm, -inf for a row that attends
    nothing. Returns out of the same shape and dtype, and lse in the widest dtype of the given ones:

        lse = log(sum_n exp(lse_n)),    out = sum_n exp(lse_n - lse) * out_n

    computed in float32, or float64 where a part is. The result does not depend on how keys were split, but for
    rounding. A row that attends nothing in any state gives out 0 and lse -inf; what `out` holds beside lse -inf is
    never read. Differentiable in every out and lse, to any order; gradients are finite where the inputs are, and 0
    through empty rows. A float32 lse holds log(sum) only beside a small maximum: with a bias near -1e9 it is a multiple
    of 64, and near the lowest numbers every part that is not empty counts the same, however many keys it has. Give such
    lses in float64, or leave such rows in one part. A sink counts in one state's lse only: give it to one of the calls.

    Raises ShapeError, DtypeError or DeviceError naming the state that does not fit, InputError for no states or an
    unknown layout. Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    given = _flat(states)
    if not torch.compiler.is_compiling() and has_torch_function(given):
        return handle_torch_function(merge_states, given, states, layout=layout)
    if layout not in LSE:
        raise InputError("layout", f"expected one of {', '.join(LSE)}, got {layout!r}")
    pairs = _checked(states, layout)
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    for _, lse in pairs:
        dtype = torch.promote_types(dtype, lse.dtype)
    lses = torch.stack([lse.to(dtype) for _, lse in pairs])
    # Rows that attend nothing in every state are moved to 0 first: -inf - -inf would be NaN, in gradients too.
    alive = lses != -torch.inf
    some = alive.any(0)
    top = torch.where(some, lses.detach().amax(0), 0.0)
    weights = torch.where(alive, torch.exp(torch.where(alive, lses - top, 0.0)), 0.0)
    total = weights.sum(0)
    safe = torch.where(some, total, 1.0)
    lse = torch.where(some, torch.log(safe) + top, -torch.inf)
    shares = weights / safe
    places = [LSE[layout].index(n) for n in range(lse.dim())]
    out: Any = 0
    for n, (part, _) in enumerate(pairs):
        share = shares[n].permute(places).unsqueeze(-1)
        kept = torch.where(alive[n].permute(places).unsqueeze(-1), part.to(dtype), 0.0)
        out = out + share * kept
    widest = torch.float64 if any(x.dtype == torch.float64 for _, x in pairs) else torch.float32
    return out.to(pairs[0][0].dtype), lse.to(widest)


def _flat(states: Any) -> tuple[Any, ...]:
    """All that may be a tensor, or stand for one in a trace of torch.fx: a state, or all of them."""
    if not isinstance(states, (tuple, list)):
        return (states,)
    return tuple(x for state in states for x in (state if isinstance(state, (tuple, list)) else (state,)))


def _checked(states: Any, layout: str) -> list[tuple[Tensor, Tensor]]:
    if isinstance(states, Tensor) or not isinstance(states, Sequence) or not states:
        raise InputError("states", f"expected one or more (out, lse) pairs, got {_said(states)}")
    first: Tensor | None = None
    checked: list[tuple[Tensor, Tensor]] = []
    order = LSE[layout]
    for n, state in enumerate(states):
        name = f"states[{n}]"
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise InputError(name, f"expected a pair (out, lse), got {_said(state)}")
        out, lse = state
        if not torch.compiler.is_compiling():  # a graph's tensors are what Dynamo says
            out, lse = (settled(name, x) if isinstance(x, Tensor) else x for x in state)
        checked.append((out, lse))
        for what, x, kinds in (("out", out, FLOATS), ("lse", lse, (torch.float32, torch.float64))):
            if not isinstance(x, Tensor) or x.dtype not in kinds:
                wanted = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
                got = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else _said(x)
                raise DtypeError(name, f"{what}: expected a tensor of {wanted}, got {got}")
        first = out if first is None else first
        if out.dim() != len(order) + 1 or out.shape != first.shape:
            wanted = f"{len(order) + 1} dimensions under layout {layout!r}" if out is first else str(tuple(first.shape))
            raise ShapeError(name, f"out: expected {wanted}, got shape {tuple(out.shape)}")
        wanted_lse = tuple(out.shape[at] for at in order)
        if tuple(lse.shape) != wanted_lse:
            raise ShapeError(name, f"lse: expected {wanted_lse} beside out {tuple(out.shape)}, got {tuple(lse.shape)}")
        if out.dtype != first.dtype:
            raise DtypeError(name, f"out: expected {first.dtype} like states[0], got {out.dtype}")
        for what, x in (("out", out), ("lse", lse)):
            if x.device != first.device:
                raise DeviceError(name, f"{what}: expected device {first.device} like states[0], got {x.device}")
    return checked


def _said(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
