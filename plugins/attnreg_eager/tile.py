"""One tile of attention: scores of some rows and keys, mask, exponentials, and the product with the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg import AttentionSpec, scores
from attnreg_eager.frame import Frame
from attnreg_eager.keys import Scales

__all__ = ["Part", "Tile", "by_kv_head", "finish", "finite", "merge", "only_seen", "seen_keys"]

Keep = Callable[[tuple[int, ...]], Tensor]
Part = tuple[Tensor, Tensor, Tensor]
"""(acc [B, Hq, Sq, Dv], total [B, Hq, Sq], top [B, Hq, Sq]): sums of exp(s - top) v and of exp(s - top).

top carries no gradient."""


@dataclass(frozen=True)
class Tile:
    """What a tile needs besides its rows and keys.

    dtype: of the computation. dropout: draws the keep mask
    of a shape, or None.
    """

    spec: AttentionSpec
    scales: Scales
    dtype: torch.dtype
    factor: float
    dropout: Keep | None = None

    def part(
        self, at: Frame, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weight: Tensor | None,
        slopes: Tensor | None,
    ) -> Part:  # fmt: skip
        """The tile's share of the softmax, for q [B, Hq, sq, D], k and v [B, Hkv, skv, D].

        weight: the score's, [1 or Hq, ...]. slopes: of ALiBi, [1 or B, Hq].
        """
        dtype, spec = self.dtype, self.spec
        live = at.live()
        k, v = k.to(dtype), v.to(dtype)
        seen = None if live is None else seen_keys(live, at)
        if seen is not None:
            # A weight of 0 does not take away a NaN: what no row of the tile attends is not read at all.
            k, v = only_seen(k, seen, at), only_seen(v, seen, at)
        s, live = self.logits(at, self._scores(at, q.to(dtype), k, weight, seen), bias, slopes, live)
        top = s.detach().amax(-1) if s.shape[-1] else s.detach().new_full(s.shape[:-1], -torch.inf)
        p = torch.exp(s - finite(top).unsqueeze(-1))
        if live is not None:
            # By where, not by multiplying: dP of a masked key may be anything, even inf.
            p = torch.where(live, p, 0.0)
        total = p.sum(-1)
        if self.dropout is not None:
            p = torch.where(self.dropout(tuple(p.shape)), p / (1 - spec.dropout_p), 0.0)
        scale = self.scales.keys("v_descale", at, dtype)
        if scale is not None:
            p = p * (scale if seen is None else torch.where(seen, scale, 0.0))
        return by_kv_head(p, v), total, top

    def logits(
        self, at: Frame, s: Tensor, bias: Tensor | None, slopes: Tensor | None, live: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Softcap, bias, ALiBi and mask over raw scores s; and where a row may attend, None for everywhere.

        live: `at.live()`, to which a bias of -inf is added.
        """
        dtype, spec = self.dtype, self.spec
        if bias is not None:
            bias = bias.to(dtype)
            # A bias of -inf is a mask: as one, it leaves no inf - inf behind, whatever the key holds.
            said = bias != -torch.inf
            live = said if live is None else live & said
        if live is not None:
            # Before softcap: a masked overflow would come back as 0 * NaN in the backward of tanh.
            s = torch.where(live, s, 0.0)
        if spec.softcap:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        if bias is not None:
            s = s + torch.where(said, bias, 0.0)
        if slopes is not None:
            s = s - _slopes(at, slopes) * (at.p - at.j).abs().to(dtype)
        return s if live is None else torch.where(live, s, -torch.inf), live

    def _scores(self, at: Frame, q: Tensor, k: Tensor, weight: Tensor | None, seen: Tensor | None) -> Tensor:
        """Raw scores [B, Hq, sq, skv] of q [B, Hq, sq, Dq] and k [B, Hkv, skv, Dk], scaled.

        seen: see `seen_keys`; the scale of a key that is not seen is not read.
        """
        rows = self.scales.rows(at, self.dtype)
        if rows is not None:
            q = q * rows
        columns = self.scales.keys("k_descale", at, self.dtype)
        if columns is not None and seen is not None:
            columns = torch.where(seen, columns, 0.0)
        if isinstance(self.spec.score, scores.Additive):
            return _additive(at, q, k, columns, weight)
        if weight is not None:
            q = q @ weight
        if self.factor != 1.0:
            q = q * self.factor
        s = by_kv_head(q, k.mT)
        # On the scores, not on k: a stale scale times a stale key may overflow, and the scores get masked.
        return s if columns is None else s * columns


def _slopes(at: Frame, slopes: Tensor) -> Tensor:
    """The slopes [1 or B, Hq] of a tile's rows and heads, [B or 1, Hq, Sq or 1, 1]."""
    if slopes.shape[0] != 1:
        slopes = slopes.index_select(0, at.bq.flatten())
    # index_select, since the backward pass of an index by several tensors does not go through vmap.
    slopes = slopes.index_select(1, at.h.flatten())
    return slopes[..., None, None] if at.bq.shape[2] == 1 or slopes.shape[0] == 1 else slopes.mT[None, :, :, None]


def _additive(at: Frame, q: Tensor, k: Tensor, columns: Tensor | None, weight: Tensor | None) -> Tensor:
    """sum(w * tanh(q + k)): [B, Hq, sq, skv], by way of a hidden layer [B, Hq, sq, skv, D]."""
    if weight is None:
        raise AssertionError("an additive score has a weight")
    keys = k.repeat_interleave(at.group, 1) if at.group > 1 else k
    if columns is not None:
        keys = keys * columns.mT
    hidden = torch.tanh(q.unsqueeze(3) + keys.unsqueeze(2))
    return (hidden @ weight.view(1, -1, 1, hidden.shape[-1], 1)).squeeze(-1)


def seen_keys(live: Tensor, at: Frame) -> Tensor:
    """Bool [B or 1, Hq or 1, 1, Skv or 1]: keys that some row attends, in any query head of the same KV head."""
    seen = live[(None,) * (4 - live.dim())].any(2, keepdim=True)
    if at.group == 1 or seen.shape[1] == 1:
        return seen
    batch, heads, _, keys = seen.shape
    by_kv = seen.reshape(batch, heads // at.group, at.group, 1, keys).any(2, keepdim=True)
    return by_kv.expand(-1, -1, at.group, -1, -1).flatten(1, 2)


def only_seen(x: Tensor, seen: Tensor, at: Frame) -> Tensor:
    """Keys or values x [B, Hkv, Skv, ..] with zeros where `seen` (see `seen_keys`) says False."""
    return torch.where(seen[:, :: at.group if seen.shape[1] > 1 else 1].mT, x, 0.0)


def by_kv_head(x: Tensor, y: Tensor) -> Tensor:
    """x [B, Hq, n, m] @ y [B, Hkv, m, o] -> [B, Hq, n, o], where the heads of a group share one y unrepeated."""
    batch, q_heads, n, m = x.shape
    kv_heads = y.shape[1]
    if q_heads == kv_heads:
        return x @ y
    if isinstance(n, torch.SymInt) or isinstance(batch, torch.SymInt):
        # Rows of a symbolic number cannot be packed without a guard on it: keys are repeated instead.
        return x @ y.repeat_interleave(q_heads // kv_heads, 1)
    out = x.reshape(batch, kv_heads, (q_heads // kv_heads) * n, m) @ y
    return out.reshape(batch, q_heads, n, y.shape[-1])


def finite(top: Tensor) -> Tensor:
    """The shift of the exponentials: 0 for a row without keys, so that -inf - (-inf) never happens."""
    return torch.where(top == -torch.inf, 0.0, top)


def merge(a: Part, b: Part) -> Part:
    """The share of two disjoint sets of keys (Milakov and Gimelshein 2018, arXiv:1805.02867)."""
    top = torch.maximum(a[2], b[2])
    wa, wb = torch.exp(a[2] - finite(top)), torch.exp(b[2] - finite(top))
    return a[0] * wa.unsqueeze(-1) + b[0] * wb.unsqueeze(-1), a[1] * wa + b[1] * wb, top


def finish(part: Part, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, Dv] and lse [B, Hq, Sq] of a part that saw every key; sinks [1, Hq, 1] join the total."""
    acc, total, top = part
    if sinks is not None:
        new = torch.maximum(top, sinks.detach())
        shrink = torch.exp(top - finite(new))
        acc, total, top = acc * shrink.unsqueeze(-1), total * shrink + torch.exp(sinks - finite(new)), new
    none = total == 0
    safe = torch.where(none, 1.0, total)
    lse = torch.where(none, -torch.inf, finite(top) + torch.log(safe))
    return acc / safe.unsqueeze(-1), lse
