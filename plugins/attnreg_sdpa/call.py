"""One prepared SDPA call: from the tensors as the user gave them to output and lse in the user's layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnreg import Problem, scores, sparsity
from attnreg_sdpa import exact
from attnreg_sdpa.guard import Guarded
from attnreg_sdpa.pairs import Pairs, Place, causal_form
from attnreg_sdpa.tensors import dequantised, heads_first, paged, weighted, with_sink_key

__all__ = ["Call", "prepared"]


def prepared(problem: Problem, config: Mapping[str, Any]) -> Callable[..., Any]:
    """SDPA itself where nothing has to come before or after it, else a `Call`."""
    general = Call(problem, config)
    spec = problem.spec
    says_more = (
        spec.bias or spec.alibi or spec.sinks or spec.dropout_p or spec.return_lse or spec.page_size is not None
        or spec.layout == "thd" or general.guarded.folds or general.quantised or config.get("upcast")
        or config["kernel"] != "auto"
        or not isinstance(spec.score, (scores.ScaledDot, scores.Dot)) or not isinstance(spec.sparsity, sparsity.Dense)
    )  # fmt: skip
    form = causal_form(spec, problem.sq, problem.skv)
    causal = form == "causal"
    # Under a trace equal sizes may stand for symbols that differ later.
    assumed = causal and spec.align != "top_left" and not problem.square
    if says_more or form == "mask" or assumed or (causal and problem.head_dim != problem.head_dim_v):
        return general
    grouping = config.get("grouping", "")
    if grouping == "expand" or (grouping == "pack" and causal):
        return general
    run = _packed_rows(problem) if grouping == "pack" else _plain(problem, causal)
    if causal and problem.needs_grad and general.guarded.hosted:
        run = _watched(run, general)
    run = _heads_last(run) if spec.layout == "bshd" else run
    run = _unread(run) if spec.tensors() else run
    few = general.guarded.hosted and problem.skv <= exact.FEW
    return _keeping_nan(run, general, 1 if spec.layout == "bshd" else 2) if few else run


def _plain(problem: Problem, causal: bool) -> Callable[..., Any]:
    scale, gqa = problem.scale, problem.group > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)

    return run


def _packed_rows(problem: Problem) -> Callable[..., Any]:
    """The query heads of a KV head as further rows of it, so that its keys are read once."""
    scale = problem.scale

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, sq, dim = q.shape
        kv_heads = k.shape[1]
        rows = q.reshape(batch, kv_heads, heads // kv_heads * sq, dim)
        out = scaled_dot_product_attention(rows, k, v, scale=scale)
        return out.reshape(batch, heads, sq, v.shape[-1])

    return run


def _watched(run: Callable[..., Any], general: Call) -> Callable[..., Any]:
    """`run`, unless k or v hold values with which a masked pair could reach a gradient."""

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return general.guarded(q, k, v, None, True)[0].to(q.dtype) if exact.too_large(k, v) else run(q, k, v)

    return watched


def _keeping_nan(run: Callable[..., Any], general: Call, axis: int) -> Callable[..., Any]:
    """`run`, unless there are few keys, along `axis`, and a NaN that it would drop; see exact.loses_nan."""

    def kept(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        if exact.loses_nan(q, k, axis):
            return general(q, k, v, **tensors)
        return run(q, k, v, **tensors)

    return kept


def _unread(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` where the rest of the mask makes what a call tensor says redundant: prefixes under Causal()."""

    def run_named(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        return run(q, k, v)

    return run_named


def _heads_last(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_bshd(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return run_bshd


class Call:
    """Any call. Holds what the problem and the configuration fix; sizes are read at each call."""

    def __init__(self, problem: Problem, config: Mapping[str, Any]) -> None:
        self.spec = problem.spec
        self.out_dtype = problem.out_dtype
        self.quantised = problem.dtype != problem.kv_dtype or problem.dtype.startswith("float8")
        own: torch.dtype = getattr(torch, problem.dtype)
        widened = (self.quantised or config.get("upcast")) and own != torch.float64
        self.compute = torch.float32 if widened else own
        # CPU kernels take a float32 mask beside half-precision q: a bias must not be rounded to half.
        on_cpu = problem.device == "cpu"
        self.mask_dtype = torch.promote_types(self.compute, torch.float32) if on_cpu else self.compute
        self.pairs = Pairs(self.spec, problem.traced)
        self.guarded = Guarded(problem, config)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        spec = self.spec
        if spec.layout == "thd":
            return self._packed(q, k, v, tensors)
        q = heads_first(spec, q)
        if spec.page_size is None:
            k, v = heads_first(spec, k), heads_first(spec, v)
        else:
            k, v = paged(k, tensors["block_table"]), paged(v, tensors["block_table"])
        at = Place(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device, tensors)
        out, lse = self._attend(q, k, v, at, k.shape[2])
        out = heads_first(spec, out)
        return (out, lse) if spec.return_lse else out

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Any:
        """Sequence by sequence: the lengths lie on the CPU, where reading them costs nothing."""
        spec = self.spec
        starts_q = tensors["cu_seqlens_q"].tolist()
        starts_k = None if spec.page_size is not None else tensors["cu_seqlens_k"].tolist()
        bound = _longest(spec.page_size, tensors, starts_k)
        out = q.new_zeros(0, q.shape[1], v.shape[-1], dtype=self.out_dtype)
        lse = q.new_zeros(q.shape[1], 0, dtype=torch.float32)
        outs, lses = [out], [lse]
        for b in range(len(starts_q) - 1):
            rows = q[starts_q[b] : starts_q[b + 1]].transpose(0, 1).unsqueeze(0)
            if rows.shape[2] == 0:
                continue
            if starts_k is None:
                table = tensors["block_table"][b : b + 1]
                keys, values = paged(k, table), paged(v, table)
            else:
                keys, values = (x[starts_k[b] : starts_k[b + 1]].transpose(0, 1).unsqueeze(0) for x in (k, v))
            at = Place(1, q.shape[1], rows.shape[2], keys.shape[2], q.device, tensors, first=b, packed=True)
            part, part_lse = self._attend(rows, keys, values, at, bound)
            outs.append(part.squeeze(0).transpose(0, 1))
            if part_lse is not None:
                lses.append(part_lse.squeeze(0))
        return (torch.cat(outs), torch.cat(lses, 1)) if spec.return_lse else torch.cat(outs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, at: Place, bound: int) -> tuple[Tensor, Tensor | None]:
        """Output [B, Hq, Sq, Dv] and float32 lse [B, Hq, Sq] of one padded call, sinks counted."""
        spec, named = self.spec, at.tensors
        if self.quantised:
            q, k, v = (
                dequantised(spec, x, named.get(name), at.first, at.batch, bound, self.compute)
                for x, name in ((q, "q_descale"), (k, "k_descale"), (v, "v_descale"))
            )
        elif q.dtype != self.compute:
            q, k, v = q.to(self.compute), k.to(self.compute), v.to(self.compute)
        q = weighted(spec, q, named)
        form = causal_form(spec, at.sq, at.skv, at.packed)
        mask = None
        if form == "mask" or spec.bias or spec.alibi or named.get("seqused_k") is not None:
            form, mask = "mask", self.pairs.mask(at, self.mask_dtype)
        as_key = spec.sinks and mask is not None and spec.bias
        if as_key and mask is not None:
            # By the lse they could not join a row whose bias is at its lowest: in float32 it holds no sum there.
            k, v, mask = with_sink_key(k, v, mask, named["sinks"])
        run = self.guarded if named.get("generator") is None else self.guarded.seeded(named["generator"])
        out, lse = run(q, k, v, mask, form == "causal")
        if lse is None:
            return out.to(self.out_dtype), None
        if spec.sinks and not as_key:
            sinks = named["sinks"].to(lse.dtype).view(1, -1, 1)
            out = out.to(lse.dtype) * torch.sigmoid(lse - sinks).unsqueeze(-1)
            lse = torch.logaddexp(lse, sinks.expand_as(lse))
        return out.to(self.out_dtype), lse.float()


def _longest(page_size: int | None, tensors: Mapping[str, Any], starts_k: list[int] | None) -> int:
    """Keys of the longest packed sequence, which block-wise descales are cut from."""
    if starts_k is None:
        return int(tensors["block_table"].shape[1]) * (page_size or 1)
    given = tensors.get("max_seqlen_k")
    return int(given) if given is not None else max((b - a for a, b in itertools.pairwise(starts_k)), default=0)
