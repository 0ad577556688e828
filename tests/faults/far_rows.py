"""Rows whose bias lies far from 0, and what attention of them is: float64 throughout but for the logits.

float32 holds nothing of q and k beside a bias of 1e30, and multiples of 64 beside 1e9: the logits are rounded so, and
the rest is exact. q and k are small integers and the scale is a power of 2, so every right kernel rounds them alike.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks

LOWEST = torch.finfo(torch.float32).min
VALUES = (LOWEST, -1e30, -1e9, -1e6, -1e4, 1e9, 1e30)
BATCH, HEADS, KV_HEADS, SQ, SKV, DIM = 2, 4, 2, 37, 45, 16


@dataclass(frozen=True)
class Row:
    """A line of the table. parts: how the bias of the far rows is made; see `bias_of`. grads: of the named tensors."""

    spec: AttentionSpec = field(default_factory=lambda: AttentionSpec(bias=True))
    parts: str = "all"
    dtype: str = "float32"
    bias_dtype: str = "float32"
    grads: tuple[str, ...] = ()


def _spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(bias=True, **fields)


CAUSAL = masks.Causal()
HALF = {"float32": 1.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""What one rounding of the result costs, but for float32."""
ROWS: dict[str, Row] = {
    "plain": Row(),
    "lse": Row(_spec(return_lse=True)),
    "causal": Row(_spec(mask=CAUSAL)),
    "causal_lse_bias": Row(_spec(mask=CAUSAL, return_lse=True), grads=("bias",)),
    "padding": Row(_spec(mask=masks.Padding() & CAUSAL, align="top_left"), grads=("bias",)),
    "sinks": Row(_spec(sinks=True, return_lse=True), grads=("sinks",)),
    "far_sinks": Row(_spec(sinks=True), "far_sinks", grads=("bias", "sinks")),
    "bias": Row(grads=("bias",)),
    "partly": Row(_spec(return_lse=True), "partly"),
    "mixed": Row(_spec(mask=CAUSAL), "mixed", grads=("bias",)),
    "near_too": Row(_spec(), "near_too"),
    "softcap_alibi": Row(_spec(softcap=4.0, alibi=True, mask=CAUSAL)),
    "bshd": Row(_spec(layout="bshd", mask=CAUSAL, return_lse=True)),
    "thd": Row(_spec(layout="thd", mask=CAUSAL), grads=("bias",)),
    "thd_lse": Row(_spec(layout="thd", return_lse=True)),
    "bfloat16": Row(_spec(mask=CAUSAL), dtype="bfloat16", grads=("bias",)),
    "bfloat16_bias": Row(_spec(), dtype="bfloat16", bias_dtype="bfloat16", grads=("bias",)),
    "float16": Row(_spec(mask=CAUSAL), dtype="float16", grads=("bias",)),
}


@dataclass
class Call:
    """A call's tensors, as leaves where a gradient is wanted; `bounds` are where packed sequences begin."""

    spec: AttentionSpec
    leaves: dict[str, Tensor]
    tensors: dict[str, Any]
    bounds: tuple[list[int], list[int]]


def make(row: Row, value: float) -> Call:
    """The call of a row of the table with this bias."""
    spec, g = row.spec, torch.Generator().manual_seed(0)
    kind: torch.dtype = getattr(torch, row.dtype)

    def integers(heads: int, rows: int) -> Tensor:
        return torch.randint(-2, 3, (BATCH, heads, rows, DIM), generator=g).to(kind)

    q, k = integers(HEADS, SQ), integers(KV_HEADS, SKV)
    v = torch.randn(BATCH, KV_HEADS, SKV, DIM, generator=g).to(kind)
    bounds = ([0, SQ, 2 * SQ], [0, SKV, 2 * SKV])
    if spec.layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    elif spec.layout == "thd":
        bounds = ([0, SQ, 2 * SQ - 6], [0, SKV, 2 * SKV - 6])
        ends = (bounds[0][-1], bounds[1][-1], bounds[1][-1])
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[:end] for x, end in zip((q, k, v), ends, strict=True))
    bias = bias_of(row, max(value, torch.finfo(getattr(torch, row.bias_dtype)).min))
    leaves = {"q": q, "k": k, "v": v}
    tensors: dict[str, Any] = {"bias": bias.to(getattr(torch, row.bias_dtype))}
    if spec.sinks:
        tensors["sinks"] = torch.full((HEADS,), value) if row.parts == "far_sinks" else torch.zeros(HEADS)
    if spec.alibi:
        tensors["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.25, 0.125])
    if "kv_lengths" in spec.tensors():
        tensors["kv_lengths"] = torch.tensor([SKV, SKV - 9])
    if spec.layout == "thd":
        tensors |= {f"cu_seqlens_{n}": torch.tensor(x, dtype=torch.int32) for n, x in zip("qk", bounds, strict=True)}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    for name in row.grads:
        tensors[name].requires_grad_()
    return Call(spec, leaves | {name: tensors[name] for name in row.grads}, tensors, bounds)


def bias_of(row: Row, value: float) -> Tensor:
    """[1, HEADS, SQ, SKV]: near 0, but for every third row.

    all: every key of a far row at the value. partly: half of its keys masked by -inf. mixed: half of them at the lowest
    number of all. near_too: a single key of it near 0, which then has all the weight.
    """
    bias = torch.zeros(1, HEADS, SQ, SKV)
    bias[:, :, 1::3] = value
    if row.parts == "partly":
        bias[:, :, 1::3, ::2] = -torch.inf
    elif row.parts == "mixed":
        bias[:, :, 1::3, 1::2] = LOWEST
    elif row.parts == "near_too":
        bias[:, :, 1::3, 7] = 0.0
    return bias


def exact(call: Call) -> tuple[Tensor, Tensor]:
    """out in the call's layout and lse [B, Hq, Sq] or [Hq, T], float64, functions of the leaves."""
    spec, t = call.spec, call.tensors
    q, k, v = (call.leaves[n].double() for n in ("q", "k", "v"))
    if spec.layout != "thd":
        if spec.layout == "bshd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        each = [_sequence(spec, q[b], k[b], v[b], t, b) for b in range(q.shape[0])]
        out, lse = (torch.stack(x) for x in zip(*each, strict=True))
        return (out.transpose(1, 2) if spec.layout == "bshd" else out), lse
    each = []
    for b, (q_at, k_at) in enumerate(zip(*(list(itertools.pairwise(x)) for x in call.bounds), strict=True)):
        rows, keys, values = (x[slice(*at)].transpose(0, 1) for x, at in ((q, q_at), (k, k_at), (v, k_at)))
        each.append(_sequence(spec, rows, keys, values, t, b))
    return torch.cat([out.transpose(0, 1) for out, _ in each]), torch.cat([lse for _, lse in each], 1)


def _sequence(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, t: dict[str, Any], b: int) -> tuple[Tensor, Tensor]:
    """The same of one sequence, q [Hq, Sq, D] and k, v [Hkv, Skv, D]."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    sq, skv = q.shape[1], k.shape[1]
    length = int(t["kv_lengths"][b]) if "kv_lengths" in t else skv
    at = torch.arange(sq)[:, None] + (0 if spec.align == "top_left" else length - sq)
    keys = torch.arange(skv)[None, :]
    allowed = (keys < length) & ((keys <= at) if CAUSAL in masks.walk(spec.mask) else True)
    s = (q @ k.mT) * DIM**-0.5
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    s = s + t["bias"].double()[0, :, :sq, :skv]
    if spec.alibi:
        s = s - t["alibi_slopes"].double()[:, None, None] * (at - keys).abs()
    allowed = allowed & (s > -torch.inf)
    s = torch.where(allowed, s, 0.0).float().double()
    s = torch.where(allowed, s, -torch.inf)
    v = torch.cat([v, v.new_zeros(q.shape[0], 1, v.shape[2])], 1)
    none = s.new_full((q.shape[0], sq, 1), -torch.inf)
    sinks = t["sinks"].double()[:, None, None].expand(-1, sq, 1) if spec.sinks else none
    s = torch.cat([s, sinks], -1)
    top = s.detach().amax(-1, keepdim=True)
    shifted = s - torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(shifted)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, top + torch.log(safe)).squeeze(-1)
    return torch.where(empty, 0.0, weights / safe) @ v, lse


def upstream(x: Tensor, seed: int) -> Tensor:
    return torch.randint(-2, 3, x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def check(run: Any, row: Row, value: float) -> None:
    """out, lse, and the gradients of every leaf through both, against float64."""
    call = make(row, value)
    wanted = exact(call)[: 1 + row.spec.return_lse]
    given = run(call)
    found = given if isinstance(given, tuple) else (given,)
    finite = [torch.where(x.isfinite(), x, 0.0) for x in wanted]
    weights = [upstream(x, n) for n, x in enumerate(wanted)]
    want = torch.autograd.grad(finite, list(call.leaves.values()), weights)
    some = [torch.where(x.isfinite(), x, 0.0) for x in found]
    mine = [w.to(x.dtype) for w, x in zip(weights, found, strict=True)]
    got = torch.autograd.grad(some, list(call.leaves.values()), mine)
    named = [("out", found[0], wanted[0]), *zip(call.leaves, got, want, strict=True)]
    for name, there, right in named:
        unit = max(float(right.abs().max()), 1.0)
        bound = (3e-5 if row.dtype == "float32" else 4 * HALF[row.dtype]) * unit
        error = float((there.double() - right).abs().max())
        assert error <= bound, f"{name}: {error:.3g} above {bound:.3g}"
    if row.spec.return_lse:
        torch.testing.assert_close(found[1].double(), wanted[1], rtol=2e-7, atol=4e-6)
