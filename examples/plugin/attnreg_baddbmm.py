"""An attnreg backend in one file: full and causal attention by two batched products and a softmax.

It shows everything that a plugin needs: reasons for each refusal, a search space of one parameter, a callable that
serves its whole bucket, and a line for `attnreg doctor`. It imports nothing of attnreg but `attnreg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import attnreg
from attnreg import Finding, Hardware, Problem, SearchSpace, masks, scores, sparsity


class Baddbmm:
    """softmax(scale * Q K^T + causal) V, `rows` queries at a time."""

    name = "baddbmm"
    version = "1"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason why this backend cannot compute the problem exactly as said."""
        spec = problem.spec
        checks = {
            f"mask {spec.mask!r}: only Full() and Causal()": not isinstance(spec.mask, (masks.Full, masks.Causal)),
            f"sparsity {spec.sparsity!r}: only Dense()": not isinstance(spec.sparsity, sparsity.Dense),
            f"score {spec.score!r}: only dot products": not isinstance(spec.score, (scores.ScaledDot, scores.Dot)),
            f"layout {spec.layout!r}: only bhsd": spec.layout != "bhsd",
            f"align {spec.align!r}: only bottom_right": spec.align != "bottom_right",
            f"{problem.heads.kind}: only as many KV heads as query heads": problem.heads.kind != "mha",
            f"{problem.dtype}: only float32 and float64": problem.dtype not in ("float32", "float64"),
            f"kv {problem.kv_dtype}: a quantised cache": problem.kv_dtype != problem.dtype,
            "more queries than keys: rows with nothing to attend": not self._every_row_sees_a_key(problem),
            "return_lse: the softmax keeps no lse": spec.return_lse,
        }
        reasons = [reason for reason, holds in checks.items() if holds]
        absent = ("bias", "alibi", "sinks", "softcap", "dropout_p", "page_size")
        return reasons + [f"{name}: no place for it" for name in absent if getattr(spec, name)]

    @staticmethod
    def _every_row_sees_a_key(problem: Problem) -> bool:
        # The bucket's sizes are rounded up, so only what holds for all of its members may be relied on.
        if isinstance(problem.spec.mask, masks.Full):
            return problem.skv > 0
        return problem.skv > 0 and (problem.square or problem.sq == 1)

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """One parameter: how many query rows a pass; a row block of scores should stay in the cache."""
        return SearchSpace({"rows": (16, 64, 256, 1024)}, default={"rows": 256})

    def prepare(self, problem: Problem, config: Mapping[str, Any]) -> Callable[..., Tensor]:
        """A closure over what does not change within the bucket; sizes are read at each call."""
        rows, scale = int(config["rows"]), problem.scale
        causal = isinstance(problem.spec.mask, masks.Causal)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sq, skv = q.shape[-2], k.shape[-2]
            parts = []
            for start in range(0, max(sq, 1), rows):
                block = q[:, :, start : start + rows]
                score = torch.matmul(block, k.transpose(-1, -2)) * scale
                if causal:
                    p = torch.arange(start, start + block.shape[-2], device=q.device) + skv - sq
                    score = score.masked_fill(torch.arange(skv, device=q.device) > p[:, None], -torch.inf)
                # Masked keys must leave no trace even in 0 * inf of the backward, hence the second fill.
                weights = score.softmax(-1).masked_fill(score == -torch.inf, 0.0)
                parts.append(torch.matmul(weights, v))
            return torch.cat(parts, dim=-2)

        return run


@attnreg.hookimpl
def attnreg_backends() -> Iterable[Baddbmm]:
    """The backends of this plugin."""
    return [Baddbmm()]


@attnreg.hookimpl
def attnreg_doctor(hardware: Hardware) -> Iterable[Finding]:
    """What `attnreg doctor` says of this plugin."""
    return [Finding("baddbmm", True, "needs nothing but torch")]
