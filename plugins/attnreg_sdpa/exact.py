"""Attention in float64 by plain products: for masked values that overflow torch's kernels, and rows whose lse does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attend", "clamped", "far_rows", "has_nan", "loses_nan", "seen_alone", "too_large"]

LARGE = 1e15  # products of two values below this, summed over any head_dim, stay finite in float32
FAR = 1024.0  # a row's lse beyond it, rounded to float32, is off by 2**-14 at least, and so is each weight made of it
PAIRS = 1 << 24  # scores held at once
FEW = 16  # a vector of float32 where vectors are longest


def has_nan(out: Tensor) -> bool:
    """Does the output hold a NaN? One sum, since NaN survives it; infinities of both signs count as one too."""
    total = float(out.detach().sum())
    return total != total


def too_large(k: Tensor, v: Tensor) -> bool:
    """May products with k or v overflow float32? Reads both once; of float16, NaN and infinity alone."""
    if k.numel() == 0 or v.numel() == 0:
        return False
    for x in (k, v):
        low, high = torch.aminmax(x.detach())
        if not (float(low) > -LARGE and float(high) < LARGE):
            return True
    return False


def far_rows(mask: Tensor) -> Tensor:
    """Rows, of any batch and head, whose largest allowed value of an additive mask [.., Sq, Skv] is beyond FAR."""
    if mask.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=mask.device)
    top = mask.detach().amax(-1)
    far = (top.abs() > FAR) & (top > -math.inf)
    return far.flatten(0, 1).any(0).nonzero().squeeze(1)


def loses_nan(q: Tensor, k: Tensor, axis: int = 2) -> bool:
    """Is there a NaN that torch's flash kernel for the CPU drops? axis: the keys' in k.

    It compares scores one by one where there are fewer than a vector holds, and a NaN loses each comparison: a row of
    nothing but NaN counts as a row that attends nothing. Seen in torch 2.13 for up to 15 keys.
    """
    return 0 < k.shape[axis] < FEW and (has_nan(q) or has_nan(k))


def seen_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v with zeros for keys that no row attends, whose weight of 0 would not take away a NaN.

    mask: additive [B or 1, Hq or 1, Sq, Skv]; None for a causal one that counts from the top left.
    """
    if mask is None:
        alive = torch.arange(k.shape[2], device=k.device).view(1, 1, -1) < q.shape[2]
    else:
        alive = (mask.detach() > -math.inf).any(-2)
    if alive.shape[1] not in (1, k.shape[1]):
        alive = alive.reshape(alive.shape[0], k.shape[1], -1, alive.shape[2]).any(2)
    return torch.where(alive.unsqueeze(-1), k, 0), torch.where(alive.unsqueeze(-1), v, 0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and natural-log lse [B, Hq, Sq], both float64, differentiable, in chunks of rows.

    q [B, Hq, Sq, D], k and v [B, Hkv, Skv, ...]; mask additive [B or 1, Hq or 1, Sq, Skv]; causal counts from
    the top left. Masked pairs leave no trace, forward or backward, whatever finite values k and v hold. `rounded`:
    scores as float32 holds them, which is all that a mask of 1e9 leaves of q and k.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    sq, skv = q.shape[2], k.shape[2]
    step = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * skv))
    outs, lses = [], []
    for first in range(0, max(sq, 1), step):
        rows = q[:, :, first : first + step].double()
        scores = (rows @ keys.mT) * scale
        allowed = torch.ones(rows.shape[2], skv, dtype=torch.bool, device=q.device)
        if causal:
            allowed = allowed.tril(first)
        if mask is not None:
            part = mask[:, :, first : first + step].double()
            allowed = allowed & (part > -math.inf)
            scores = scores + torch.where(allowed, part, 0.0)
        if rounded:
            scores = scores.float().double()
        any_key = allowed.any(-1, keepdim=True)
        # A row without a key attends all of them here, so that its softmax has a gradient, and is cut below.
        reached = scores.masked_fill(~allowed & any_key, -math.inf)
        # The maximum and the log of the sum stay apart: at the lowest float32 number even float64 adds nothing to it.
        top = reached.detach().amax(-1, keepdim=True) if skv else reached.new_zeros(*reached.shape[:-1], 1)
        log_sum = (reached - top).logsumexp(-1, keepdim=True)
        # Both fills, before and after the exponential, keep inf * 0 out of the gradient.
        p = torch.where(allowed, (scores.masked_fill(~allowed, -math.inf) - top - log_sum).exp(), 0.0)
        outs.append(p @ values)
        lses.append(torch.where(any_key, top + log_sum, -math.inf).squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def clamped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """k and v made harmless without reading a value on the host: for traces and GPUs.

    Keys that no query attends become 0. What is left of k is clamped where its product with the largest query
    would overflow float32, which no finite result can need.
    """
    k, v = seen_alone(q, k, v, mask)
    if k.dtype == torch.float16:
        return k, v
    most = torch.finfo(torch.float32).max / (4 * q.shape[-1] * max(abs(scale), 1.0))
    # A NaN in one row of q is that row's alone.
    limit = (most / q.detach().abs().nan_to_num(1.0).amax().float().clamp(min=1.0)).to(k.dtype)
    return k.clamp(-limit, limit), v
