"""The kernel call itself, guarded: grouped heads, rows that attend nothing, and what masked keys may hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem
from attnreg_sdpa import exact, kernels
from attnreg_sdpa.pairs import equal

__all__ = ["Guarded"]

TINY = 1e-30  # a scale that stays above 0 in float32, with room to spare
Result = tuple[Tensor, "Tensor | None"]


class Guarded:
    """guarded(q, k, v, mask, causal) -> (output, lse or None), for q [B, Hq, Sq, D] and k, v [B, Hkv, Skv, ..].

    mask: additive [B or 1, Hq or 1, Sq, Skv] or None; causal counts from the top left. A row without a key
    gives 0 and lse -inf, and gradient 0. torch's kernels add the mask to the score, so a score that overflows
    at a masked pair (inf - inf) makes a NaN: on the CPU that is seen and computed again, without the keys that no
    row attends or, where that does not help, in float64; in a trace and on a GPU, where no value can be read, k and
    v are made harmless first. Gradients of rows whose bias is far from 0 are computed in float64 too, see `_repaired`.
    """

    def __init__(self, problem: Problem, config: Mapping[str, Any]) -> None:
        # The CPU kernel scales what it has masked: -inf times a scale of 0 or below would be NaN or +inf.
        self.folds = not problem.scale > TINY
        self.factor = problem.scale
        self.scale = 1.0 if self.folds else problem.scale
        self.dropout_p = problem.spec.dropout_p
        self.group = problem.group
        self.grouping = config.get("grouping", "enable_gqa")
        self.grad = problem.needs_grad
        self.on_cpu = problem.device == "cpu"
        self.hosted = self.on_cpu and not problem.traced
        self.biased = problem.spec.bias or problem.spec.alibi
        self.wants_lse = problem.spec.return_lse or problem.spec.sinks
        name = str(config["kernel"])
        if self.on_cpu and problem.traced and problem.grads & {"bias", "alibi_slopes"}:
            # Under vmap torch does not see that the mask needs a gradient, which its other kernel has not.
            name = "math"
        self.flat = kernels.kernel(name, problem.device, grouped=False)
        self.grouped = kernels.kernel(name, problem.device, grouped=True)
        # torch's math path adds its causal mask too; it is what runs under dropout and unequal head dimensions.
        falls = self.dropout_p > 0 or problem.head_dim_k != problem.head_dim_v
        self.adds_causal = not self.wants_lse and (name == "math" or (name == "auto" and falls))

    def seeded(self, generator: torch.Generator) -> Guarded:
        """The same, with dropout drawn from `generator`."""
        other = copy(self)
        other.flat = kernels.seeded(self.flat, generator)
        other.grouped = kernels.seeded(self.grouped, generator)
        return other

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Result:
        if self.folds:
            q = q * self.factor
        fragile = mask is not None or (causal and (self.grad or self.adds_causal))
        if not fragile:
            if self.hosted and not self.dropout_p and exact.loses_nan(q, k):
                return self.exactly(q, k, v, None, causal)
            return self._grouped(q, k, v, None, causal)
        if not self.hosted or self.dropout_p:  # dropout cannot be computed again; its probabilities are gone
            return self._harmless(q, k, v, mask, causal)
        if self.grad and exact.too_large(k, v):
            k, v = exact.seen_alone(q, k, v, mask)
            if exact.too_large(k, v):
                return self.exactly(q, k, v, mask, causal)
        out, lse = self._grouped(q, k, v, mask, causal)
        if exact.has_nan(out):
            k, v = exact.seen_alone(q, k, v, mask)
            out, lse = self._grouped(q, k, v, mask, causal)
        if self.grad and self.biased and mask is not None:
            out, lse = self._repaired(out, lse, q, k, v, mask)
        if exact.has_nan(out) or exact.loses_nan(q, k):
            return self.exactly(q, k, v, mask, causal)
        return out, lse

    def exactly(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Result:
        """In float64, with every masked pair cut out on both sides of the softmax."""
        out, lse = exact.attend(q, k, v, mask, causal, self.scale)
        return out.to(q.dtype), lse if self.wants_lse else None

    def _repaired(
        self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """out and lse with the rows computed again whose bias is so far from 0 that lse loses the log of the sum.

        The flash kernel's backward makes its weights of lse alone, so in such rows they would not sum to 1.
        """
        rows = exact.far_rows(mask)
        if rows.numel() == 0:
            return out, lse
        again, again_lse = exact.attend(
            q.index_select(2, rows), k, v, mask.index_select(2, rows), False, self.scale, rounded=True
        )
        out = out.index_copy(2, rows, again.to(out.dtype))
        return out, None if lse is None else lse.index_copy(2, rows, again_lse.to(lse.dtype))

    def _harmless(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Result:
        if mask is None:
            return self._grouped(q, k, v, mask, causal)
        k, v = exact.clamped(q, k, v, mask, self.scale)
        if self.on_cpu:
            return self._grouped(q, k, v, mask, causal)
        # GPU kernels disagree on rows that attend nothing: let those attend all, and cut them out after.
        any_key = (mask.detach() > -math.inf).any(-1, keepdim=True)
        out, lse = self._grouped(q, k, v, torch.where(any_key, mask, 0.0), causal)
        return torch.where(any_key, out, 0.0), lse

    def _grouped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Result:
        """One kernel call, with the query heads of a KV head packed as rows, or k and v repeated, or by torch."""
        if self.group == 1:
            return self._run(self.flat, q, k, v, mask, causal)
        batch, heads, sq, dim = q.shape
        kv_heads = k.shape[1]
        if self.grouping == "pack" and not causal:
            rows = q.reshape(batch, kv_heads, self.group * sq, dim)
            out, lse = self._run(self.flat, rows, k, v, None if mask is None else self._repeated(mask), False)
            lse = None if lse is None else lse.reshape(batch, heads, sq)
            return out.reshape(batch, heads, sq, v.shape[-1]), lse
        if self.grouping == "expand":
            k, v = (x.repeat_interleave(self.group, 1) for x in (k, v))
            return self._run(self.flat, q, k, v, mask, causal)
        return self._run(self.grouped, q, k, v, mask, causal)

    def _repeated(self, mask: Tensor) -> Tensor:
        """The mask of packed rows: [B or 1, Hkv or 1, group * Sq, Skv]."""
        batch, heads, sq, skv = mask.shape
        if heads > 1:
            return mask.reshape(batch, heads // self.group, self.group * sq, skv)
        # One row stays one row of strides; repeat would copy it.
        return mask.expand(batch, 1, self.group, skv) if equal(sq, 1) else mask.repeat(1, 1, self.group, 1)

    def _run(
        self, kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Result:
        if self.wants_lse:
            return kernels.with_lse(q, k, v, mask, causal, self.scale, self.grad)
        return kernel(q, k, v, mask, causal, self.scale, self.dropout_p), None
