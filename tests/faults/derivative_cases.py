"""Calls of many specs, each with a float64 computation in torch's plain operators, which have all derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks, scores

__all__ = ["CASES", "Case", "attend", "reference"]


@dataclass(frozen=True)
class Case:
    """One spec with its sizes.

    named: makes the call's other tensors. live: pairs that attend, [B or 1, 1, Sq, Skv] of sizes. smooth: which named
    tensors are differentiated. sequences: lengths of packed ones, under thd.
    """

    spec: AttentionSpec
    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    sq: int = 7
    skv: int = 7
    dim: int = 8
    named: Callable[[torch.Generator], dict[str, Tensor]] = lambda g: {}
    live: Callable[[Tensor, Tensor], Tensor] = lambda i, j: (i >= j)[None, None]
    smooth: tuple[str, ...] = ()
    sequences: tuple[int, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """The call's tensors; floats of that dtype hold the same values in all of them."""
        g = torch.Generator().manual_seed(seed)
        b, q_rows, k_rows = self.batch, self.sq, self.skv

        def drawn(heads: int, rows: int) -> Tensor:
            shape = {"bhsd": (b, heads, rows), "bshd": (b, rows, heads), "thd": (sum(self.sequences), heads)}
            return torch.randn(*shape[self.spec.layout], self.dim, generator=g, dtype=torch.float64)

        made = {"q": drawn(self.q_heads, q_rows), "k": drawn(self.kv_heads, k_rows), "v": drawn(self.kv_heads, k_rows)}
        made |= self.named(g)
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return {n: x.to(exact).to(dtype) if x.is_floating_point() else x for n, x in made.items()}


def attend(case: Case, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What is tested: attnreg's (out,) or (out, lse)."""
    import attnreg

    rest = dict(inputs)
    out = attnreg.attention(case.spec, rest.pop("q"), rest.pop("k"), rest.pop("v"), **rest, **case.values)
    return out if isinstance(out, tuple) else (out,)


def reference(case: Case, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The same from the definition."""
    rest = dict(inputs)
    q, k, v = rest.pop("q"), rest.pop("k"), rest.pop("v")
    if case.spec.layout == "thd":
        parts = []
        for b, (x, y, z) in enumerate(zip(*(t.split(case.sequences) for t in (q, k, v)), strict=True)):
            parts.append(_dense(case, *(t.transpose(0, 1)[None] for t in (x, y, z)), rest, b))
        out = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
        lse = torch.cat([s[0] for _, s in parts], -1)
    elif case.spec.layout == "bshd":
        out, lse = _dense(case, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rest)
        out = out.transpose(1, 2)
    else:
        out, lse = _dense(case, q, k, v, rest)
    return (out, lse) if case.spec.return_lse else (out,)


def _dense(
    case: Case, q: Tensor, k: Tensor, v: Tensor, named: Mapping[str, Tensor], b: int = 0
) -> tuple[Tensor, Tensor]:
    spec, group = case.spec, q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    i = i + k.shape[2] - q.shape[2]
    if isinstance(spec.score, scores.Additive):
        s = (torch.tanh(q[:, :, :, None] + k[:, :, None]) * named["score_weight"].view(1, -1, 1, 1, q.shape[-1])).sum(
            -1
        )
    else:
        x = q @ named["score_weight"] if isinstance(spec.score, scores.General) else q
        s = x @ k.mT
        s = s / math.sqrt(q.shape[-1]) if isinstance(spec.score, scores.ScaledDot) else s
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if "bias" in named:
        s = s + named["bias"]
    if "alibi_slopes" in named:
        s = s - named["alibi_slopes"].view(-1, 1, 1) * (i - j).abs()
    live = case.live(i, j)
    if "kv_lengths" in named:
        live = live & (j < named["kv_lengths"][:, None, None, None])
    if "document_ids" in named:
        ids = named["document_ids"]
        live = live & (ids[:, None, :, None] == ids[:, None, None, :])
    s = torch.where(live, s, -torch.inf)
    if "sinks" in named:
        sink = named["sinks"].view(1, -1, 1, 1).expand(*s.shape[:3], 1)
        s, v = torch.cat([s, sink], -1), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    # Not logsumexp: torch's forward mode of it changes what its backward reads.
    top = s.detach().amax(-1, keepdim=True)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    return p @ v / total, (torch.log(total) + top).squeeze(-1)


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, generator=g, dtype=torch.float64)


def _with(**makers: Any) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda g: {n: make(g) if callable(make) else torch.tensor(make) for n, make in makers.items()}


def _edges(g: torch.Generator) -> Tensor:
    return torch.tensor([0, 3, 9, 11], dtype=torch.int32)


def _full(i: Tensor, j: Tensor) -> Tensor:
    return torch.ones_like(i >= j)[None, None]


CAUSAL = masks.Causal()
CASES: dict[str, Case] = {
    "causal": Case(AttentionSpec(mask=CAUSAL)),
    "full": Case(AttentionSpec(), live=_full),
    "lse": Case(AttentionSpec(mask=CAUSAL, return_lse=True)),
    "window": Case(
        AttentionSpec(mask=masks.SlidingWindow(2, 0), return_lse=True),
        live=lambda i, j: ((i >= j) & (i - j <= 2))[None, None],
    ),
    "bshd": Case(AttentionSpec(mask=CAUSAL, layout="bshd", return_lse=True)),
    "bias": Case(AttentionSpec(mask=CAUSAL, bias=True), named=_with(bias=_normal(1, 4, 7, 7)), smooth=("bias",)),
    "bias lse": Case(
        AttentionSpec(bias=True, return_lse=True), named=_with(bias=_normal(2, 1, 7, 7)), smooth=("bias",), live=_full
    ),
    "sinks": Case(
        AttentionSpec(mask=CAUSAL, sinks=True, return_lse=True), named=_with(sinks=_normal(4)), smooth=("sinks",)
    ),
    "softcap": Case(AttentionSpec(mask=CAUSAL, softcap=2.0)),
    "additive": Case(
        AttentionSpec(mask=CAUSAL, score=scores.Additive(), return_lse=True),
        named=_with(score_weight=_normal(1, 8)),
        smooth=("score_weight",),
    ),
    "general": Case(
        AttentionSpec(mask=CAUSAL, score=scores.General(), return_lse=True),
        named=_with(score_weight=_normal(4, 8, 8)),
        smooth=("score_weight",),
    ),
    "alibi": Case(
        AttentionSpec(mask=CAUSAL, alibi=True), named=_with(alibi_slopes=_normal(4)), smooth=("alibi_slopes",)
    ),
    "padding": Case(AttentionSpec(mask=masks.Padding(), return_lse=True), named=_with(kv_lengths=[7, 5]), live=_full),
    "documents": Case(
        AttentionSpec(mask=masks.Document() & CAUSAL),
        named=_with(document_ids=[[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2]]),
    ),
    "packed": Case(
        AttentionSpec(mask=CAUSAL, layout="thd", return_lse=True),
        sequences=(3, 6, 2),
        named=_with(cu_seqlens_q=_edges, cu_seqlens_k=_edges),
        values={"max_seqlen_q": 6, "max_seqlen_k": 6},
    ),
    "grouped one head": Case(AttentionSpec(return_lse=True), q_heads=3, kv_heads=1, sq=5, skv=9, live=_full),
}
