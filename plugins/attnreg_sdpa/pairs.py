"""Which pairs attend and what is added to their scores, as the one dense mask that SDPA takes."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks, sparsity

__all__ = ["Pairs", "Place", "additive", "causal_form", "equal", "live", "sizes_only"]


@dataclass(frozen=True)
class Place:
    """Where one padded call stands: its sizes, its first batch index, and the named tensors it reads.

    `packed` is True for one sequence of a thd call; `first` is then its index, and sq, skv its own lengths.
    """

    batch: int
    heads: int
    sq: int
    skv: int
    device: torch.device
    tensors: Mapping[str, Any]
    first: int = 0
    packed: bool = False


def equal(a: Any, b: Any) -> bool:
    """Are two sizes the same for every value of their symbols? Adds no guard to a trace."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def causal_form(spec: AttentionSpec, sq: Any, skv: Any, packed: bool = False) -> str:
    """How the kernel itself can say the mask: "none" (every pair), "causal" (its is_causal), or "mask".

    torch's is_causal counts from the top left (j <= i), whatever the sizes.
    """
    if not isinstance(spec.sparsity, sparsity.Dense):
        return "mask"
    band = masks.as_band(spec.mask)
    if band is None or band.padding or (band.document and not packed):
        return "mask"
    if band.full and not band.prefix and not band.prefix_tensor:
        return "none"
    if not band.causal:
        return "mask"
    if spec.align == "top_left" or (spec.align == "bottom_right" and equal(sq, skv)):
        return "causal"
    if spec.align == "bottom_right" and equal(sq, 1):
        return "none"
    return "mask"


def sizes_only(spec: AttentionSpec, tensors: Mapping[str, Any]) -> bool:
    """Does the mask depend on nothing but sizes, and on what `masks.state` knows?"""
    if spec.mask.tensors() or spec.sparsity.tensors() or spec.align == "offset":
        return False
    return tensors.get("seqused_k") is None and masks.state(spec.mask) is not None


def _coords(spec: AttentionSpec, at: Place) -> masks.Coords:
    """Indices of all pairs: b [B, 1, 1, 1], h [1, Hq, 1, 1], i and p [B or 1, 1, Sq, 1], j [1, 1, 1, Skv]."""
    named = {"device": at.device, "dtype": torch.int64}
    b = torch.arange(at.first, at.first + at.batch, **named).view(-1, 1, 1, 1)  # type: ignore[call-overload]
    h = torch.arange(at.heads, **named).view(1, -1, 1, 1)  # type: ignore[call-overload]
    i = torch.arange(at.sq, **named).view(1, 1, -1, 1)  # type: ignore[call-overload]
    j = torch.arange(at.skv, **named).view(1, 1, 1, -1)  # type: ignore[call-overload]
    if spec.align == "top_left":
        p = i
    elif spec.align == "offset":
        p = i + at.tensors["query_offset"].long()[b]
    else:
        p = i + (at.skv - at.sq)
        for name in ("kv_lengths", "seqused_k"):  # keys that both leave
            if at.tensors.get(name) is not None:
                p = torch.minimum(p, i + (at.tensors[name].long()[b] - at.sq))
    return masks.Coords(b=b, h=h, i=i, p=p, j=j, tensors=at.tensors, packed=at.packed)


def live(spec: AttentionSpec, at: Place) -> Tensor | None:
    """Bool [B or 1, Hq or 1, Sq, Skv]: mask AND sparsity AND the keys in use; None where every pair attends."""
    coords = _coords(spec, at)
    out: Tensor | None = None
    if not isinstance(spec.mask, masks.Full):
        out = spec.mask.allows(coords)
    if not isinstance(spec.sparsity, sparsity.Dense):
        exists = spec.sparsity.allows(coords, at.skv)
        out = exists if out is None else out & exists
    used = at.tensors.get("seqused_k")
    if used is not None:
        inside = coords.j < used.long()[coords.b]
        out = inside if out is None else out & inside
    if out is None:
        return None
    out = out[(None,) * (4 - out.dim())]
    return out.expand(*out.shape[:2], at.sq, at.skv)


def _bias(spec: AttentionSpec, at: Place, dtype: torch.dtype) -> Tensor | None:
    """Bias plus ALiBi, [B or 1, Hq or 1, Sq or 1, Skv or 1]; None where the spec has neither."""
    out: Tensor | None = None
    if spec.bias:
        table = at.tensors["bias"]
        table = table[(None,) * (4 - table.dim())].to(dtype)
        if at.packed:
            table = _cut(table, at)
        out = table
    if spec.alibi:
        slopes = at.tensors["alibi_slopes"].to(dtype)
        if slopes.dim() == 2:
            slopes = slopes[at.first : at.first + at.batch] if slopes.shape[0] > 1 else slopes
        coords = _coords(spec, at)
        distance = (coords.p - coords.j).abs().to(dtype)
        slope = -slopes.reshape(-1, at.heads, 1, 1) * distance
        out = slope if out is None else out + slope
    return out


def _cut(table: Tensor, at: Place) -> Tensor:
    """The part of a [1 or B, 1 or Hq, 1 or Sq, 1 or Skv] table that belongs to one packed sequence."""
    if table.shape[0] > 1:
        table = table[at.first : at.first + at.batch]
    if table.shape[2] > 1:
        table = table[:, :, : at.sq]
    return table[..., : at.skv] if table.shape[3] > 1 else table


def additive(spec: AttentionSpec, at: Place, allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, [B or 1, Hq or 1, Sq, Skv] in `dtype`: bias, and -inf where not allowed."""
    bias = _bias(spec, at, dtype)
    if allowed is None:
        return bias if bias is None else bias.expand(*bias.shape[:2], at.sq, at.skv)
    if bias is None:
        # Out of place: under vmap `allowed` may be one of many, and a plain tensor cannot take them.
        return torch.where(allowed, torch.zeros((), dtype=dtype, device=at.device), -math.inf)
    # where, not a sum: whatever a bias holds at a masked pair leaves no trace.
    return torch.where(allowed, bias, -math.inf)


class Pairs:
    """The additive mask of calls of one spec; kept for the last sizes where nothing but sizes decides it."""

    KEPT = 4
    KEPT_BYTES = 1 << 28

    def __init__(self, spec: AttentionSpec, traced: bool) -> None:
        self.spec = spec
        self.traced = traced
        self._kept: dict[Any, Tensor | None] = {}
        self._lock = threading.Lock()

    def mask(self, at: Place, dtype: torch.dtype) -> Tensor | None:
        """The mask of a call (see `additive`). Never written to: a kept one is shared by later calls."""
        spec = self.spec
        if self.traced or spec.bias or spec.alibi or not sizes_only(spec, at.tensors):
            return additive(spec, at, live(spec, at), dtype)
        key = (at.batch, at.heads, at.sq, at.skv, at.device, dtype, masks.state(spec.mask))
        kept = self._kept
        if key in kept:
            return kept[key]
        made = additive(spec, at, live(spec, at), dtype)
        if made is None or made.nbytes <= self.KEPT_BYTES // self.KEPT:
            with self._lock:
                while len(self._kept) >= self.KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = made
        return made
