"""One prepared FlexAttention call: from the tensors as the user gave them to output and lse in the user's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, masks, scores
from attnreg_flex import cpu_faults, mods
from attnreg_flex.compiled import Attend, compiled, sized
from attnreg_flex.layout import Tables, heads_first, paged

__all__ = ["Call"]


class Call:
    """run(q, k, v, **tensors). Holds what the problem and the configuration fix; sizes are read at each call."""

    def __init__(self, problem: Problem, config: Mapping[str, Any]) -> None:
        spec = problem.spec
        self.spec = spec
        self.scale = problem.scale
        self.block = (int(config["block_q"]), int(config["block_kv"]))
        self.group = problem.group
        self.grad = problem.needs_grad
        self.wants_lse = spec.return_lse or spec.sinks
        self.on_cpu = problem.device == "cpu"
        self.lengths = [name for name in ("kv_lengths",) if masks.within_lengths(spec.mask)] + ["seqused_k"]
        self.out_dtype = problem.out_dtype
        own: torch.dtype = getattr(torch, problem.dtype)
        self.compute = torch.float32 if config.get("upcast") else own
        self.tables = Tables(spec, self.block, problem.q_heads)
        # What the generated code takes as fixed, beside what its sizes say.
        self.key = (
            problem.device, self.compute, problem.q_heads, problem.kv_heads, problem.head_dim_k, problem.head_dim_v,
            problem.strides, problem.tensors,
        )  # fmt: skip

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        spec = self.spec
        if not self.grad:
            # torch refuses what requires a gradient even where none is recorded.
            q, k, v = q.detach(), k.detach(), v.detach()
        q = heads_first(spec, q)
        if spec.page_size is None:
            k, v = heads_first(spec, k), heads_first(spec, v)
        else:
            k, v = paged(k, tensors["block_table"]), paged(v, tensors["block_table"])
        out, lse = self._attend(q, k, v, tensors)
        if lse is not None:
            lse = lse.float()
            if spec.sinks:
                sinks = tensors["sinks"].float().view(1, -1, 1)
                out = out.float() * torch.sigmoid(lse - sinks).unsqueeze(-1)
                lse = torch.logaddexp(lse, sinks.expand_as(lse))
        out = heads_first(spec, out.to(self.out_dtype))
        return (out, lse) if spec.return_lse else out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Output [B, Hq, Sq, Dv] and natural-log lse [B, Hq, Sq] without sinks."""
        batch, heads, sq, _ = q.shape
        skv = k.shape[2]
        if not (batch and sq and skv):
            # Still functions of all three, so that their gradients are 0 and not missing.
            held = 0 * (q.sum() + k.sum() + v.sum())
            lse = (held - torch.inf).expand(batch, heads, sq) if self.wants_lse else None
            return held.expand(batch, heads, sq, v.shape[3]), lse
        q, k, v = q.to(self.compute), k.to(self.compute), v.to(self.compute)
        if isinstance(self.spec.score, scores.General):
            weight = tensors["score_weight"]
            wide = torch.promote_types(q.dtype, weight.dtype)
            q = (q.to(wide) @ weight.to(wide)).to(k.dtype)
        blocks, named = self.tables.of(batch, sq, skv, q.device, tensors)
        if not self.on_cpu:
            k, v = self._used(k, v, tensors)
        elif not cpu_faults.ordinary(q, k, v, self.scale):
            k, v = self._used(k, v, tensors)
            if not cpu_faults.ordinary(q, k, v, self.scale):
                return self._exactly(q, k, v, tensors, named), None
        if self.on_cpu:
            q, k = cpu_faults.widened(q), cpu_faults.widened(k)
        q, k, v = (sized(x, 0, 2) for x in (q, k, v))
        got = self._compiled(batch, sq, skv, named)(q, k, v, blocks, named)
        return got if self.wants_lse else (got, None)

    def _used(self, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """k and v with zeros behind each sequence's length: a weight of 0 would not take away a NaN."""
        for name in self.lengths:
            if tensors.get(name) is not None:
                used = torch.arange(k.shape[2], device=k.device) < tensors[name].view(-1, 1)
                k, v = (torch.where(used[:, None, :, None], x, 0) for x in (k, v))
        return k, v

    def _exactly(self, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any], named: dict[str, Tensor]) -> Tensor:
        spec = self.spec

        def score_mod(*at: Tensor) -> Tensor:
            return mods.score_mod(spec, named, *at)

        def mask_mod(*at: Tensor) -> Tensor:
            return mods.mask_mod(spec, named, *at)

        restricted = mods.restricts(spec, tensors)
        return cpu_faults.exact(q, k, v, self.scale, score_mod, mask_mod if restricted else None)

    def _compiled(self, batch: int, sq: int, skv: int, named: dict[str, Tensor]) -> Attend:
        """Code for what stays fixed: sizes of 1, the named tensors' sizes, and the threads, which size its buffers."""
        ones = (batch == 1, sq == 1, skv == 1, sq <= self.block[0], skv <= self.block[1])
        shapes = tuple((name, x.shape) for name, x in named.items())
        return compiled(
            self.spec, self.scale, self.block, grouped=self.group > 1, lse=self.wants_lse, grad=self.grad,
            key=(self.key, ones, shapes, torch.get_num_threads()),
        )  # fmt: skip
