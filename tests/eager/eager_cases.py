"""The table of problems that the eager tests share: one line a feature, and the tensors that each asks for."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, Precision, masks, scores, sparsity

S = AttentionSpec
M = masks
HUGE = {torch.float16: 65504.0, torch.bfloat16: 3e38, torch.float32: 3e38, torch.float64: 3e38}


@dataclass(frozen=True)
class Case:
    """One problem. sq and skv are per sequence under thd (lists), else numbers. bias: its shape."""

    name: str
    spec: AttentionSpec
    sq: Any = 37
    skv: Any = 53
    b: int = 2
    hq: int = 4
    hkv: int = 2
    d: int = 16
    dv: int = 16
    dk: int = 0
    bias: tuple[int, ...] = ()
    seqused: bool = True
    float8: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def lse(spec: AttentionSpec) -> AttentionSpec:
    return spec.model_copy(update={"return_lse": True})


CASES = [
    Case("full", S()),
    Case("mha", S(), hkv=4),
    Case("mqa", S(), hkv=1),
    Case("dv", S(mask=M.Causal()), dv=24),
    Case("scale", S(score=scores.ScaledDot(scale=-0.3))),
    Case("scale-0", S(score=scores.ScaledDot(scale=0.0))),
    Case("dot", S(score=scores.Dot(), mask=M.Causal())),
    Case("general", S(score=scores.General(), mask=M.Causal()), dk=12),
    Case("general-shared", S(score=scores.General()), extra={"score_weight": 1}),
    Case("additive", S(score=scores.Additive(), mask=M.SlidingWindow(9, 3)), dv=8),
    Case("additive-shared", S(score=scores.Additive()), extra={"score_weight": 1}),
    Case("causal", S(mask=M.Causal())),
    Case("causal-more-rows", S(mask=M.Causal()), sq=61, skv=40),
    Case("causal-top-left", S(mask=M.Causal(), align="top_left"), sq=61, skv=40),
    Case("causal-offset", S(mask=M.Causal(), align="offset")),
    Case("window", S(mask=M.SlidingWindow(left=7, right=2))),
    Case("window-causal", S(mask=M.SlidingWindow(left=0))),
    Case("prefix", S(mask=M.PrefixLM(20))),
    Case("prefix-tensor", S(mask=M.PrefixLM())),
    Case("chunked", S(mask=M.Chunked(8) & M.Causal()), sq=61),
    Case("dilated", S(mask=M.Dilated(7, 3))),
    Case("global", S(mask=M.Global((0, 1, 2, 40)))),
    Case("global-tensor", S(mask=M.Global())),
    Case("longformer", S(mask=M.longformer(8, (0, 30)))),
    Case("document", S(mask=M.Document() & M.Causal())),
    Case("padding", S(mask=M.Padding())),
    Case("padding-causal", S(mask=M.Padding() & M.Causal())),
    Case("padding-causal-top-left", S(mask=M.Padding() & M.Causal(), align="top_left"), sq=53),
    Case("not-padding", S(mask=~M.Padding() | M.Causal())),
    Case("dense", S(mask=M.Dense())),
    Case("dense-row", S(mask=M.Dense()), extra={"attn_mask": (1, 1, 1, 53)}),
    Case("dense-2d", S(mask=M.Dense() & ~M.Chunked(5)), extra={"attn_mask": (37, 53)}),
    Case("custom", S(mask=M.Custom(lambda b, h, p, j: (p + j + h + b) % 3 != 0))),
    Case("algebra", S(mask=~(M.Causal() & ~M.Global((3,))) | (M.Dilated(3, 4) & M.Padding()))),
    Case("blocks", S(sparsity=sparsity.Blocks(8, 16), mask=M.Causal())),
    Case("bigbird", S(sparsity=sparsity.BigBird(4, window=3, global_blocks=1, random_blocks=2, seed=5))),
    Case("bigbird-causal", S(sparsity=sparsity.BigBird(4, random_blocks=1), mask=M.Causal()), sq=53),
    Case("strided", S(sparsity=sparsity.Strided(4, local=2, stride=3), mask=M.Causal())),
    Case("softcap", S(softcap=2.0, mask=M.Causal())),
    Case("bias", S(bias=True), bias=(2, 4, 37, 53)),
    Case("bias-head", S(bias=True, mask=M.Causal()), bias=(1, 4, 37, 53)),
    Case("bias-batch", S(bias=True), bias=(2, 1, 1, 53)),
    Case("bias-row", S(bias=True, softcap=3.0), bias=(37, 53)),
    Case("bias-key", S(bias=True), bias=(53,)),
    Case("bias-column", S(bias=True), bias=(1, 4, 37, 1)),
    Case("alibi", S(alibi=True)),
    Case("alibi-batch", S(alibi=True, mask=M.Causal()), sq=61, extra={"alibi_slopes": 2}),
    Case("sinks", S(sinks=True, mask=M.Causal()), sq=61),
    Case("everything", S(sinks=True, mask=M.SlidingWindow(11), bias=True, alibi=True, softcap=5.0), bias=(1, 4, 1, 53)),
    Case("bshd", S(layout="bshd", mask=M.Causal(), bias=True), bias=(1, 4, 37, 53)),
    Case("one-row", S(mask=M.Causal()), sq=1),
    Case("no-keys", S(), skv=0),
    Case("no-rows", S(), sq=0),
    Case("no-keys-sinks", S(sinks=True), skv=0),
    Case("thd", S(layout="thd", mask=M.Causal()), sq=[7, 0, 20, 1, 5], skv=[9, 5, 20, 0, 3], b=5),
    Case("thd-full", S(layout="thd", sinks=True), sq=[7, 0, 20, 1], skv=[9, 5, 0, 30], b=4),
    Case("thd-document", S(layout="thd", mask=M.Document() & M.SlidingWindow(3, 1)), sq=[7, 11], skv=[9, 11]),
    Case("thd-bias", S(layout="thd", bias=True), sq=[7, 3], skv=[9, 14], bias=(2, 4, 7, 14)),
    Case("thd-bias-row", S(layout="thd", bias=True, alibi=True), sq=[7, 3], skv=[9, 14], bias=(1, 1, 1, 14)),
    Case("thd-dense", S(layout="thd", mask=M.Dense() & M.Padding()), sq=[7, 3], skv=[9, 14]),
    Case("thd-offset", S(layout="thd", mask=M.Causal(), align="offset"), sq=[7, 3], skv=[9, 14]),
    Case("thd-prefix", S(layout="thd", mask=M.PrefixLM()), sq=[7, 3], skv=[9, 14]),
    Case("thd-global", S(layout="thd", mask=M.Global()), sq=[7, 3], skv=[9, 14]),
    Case("thd-blocks", S(layout="thd", sparsity=sparsity.Blocks(2, 4)), sq=[7, 3], skv=[9, 14]),
    Case("thd-bigbird", S(layout="thd", sparsity=sparsity.BigBird(2, random_blocks=1)), sq=[17, 3], skv=[19, 14]),
    Case("thd-general", S(layout="thd", score=scores.General()), sq=[7, 3], skv=[9, 14]),
    Case("thd-additive", S(layout="thd", score=scores.Additive(), mask=M.Causal()), sq=[7, 3], skv=[9, 14]),
    Case("paged", S(page_size=8, mask=M.Causal()), skv=56),
    Case("paged-whole", S(page_size=8, mask=M.Causal()), skv=56, seqused=False),
    Case("paged-full", S(page_size=8)),
    Case("paged-padding", S(page_size=4, mask=M.Padding() & M.SlidingWindow(9)), skv=56, seqused=False),
    Case("paged-bshd", S(page_size=16, layout="bshd", alibi=True), skv=64),
    Case("paged-thd", S(page_size=4, layout="thd", mask=M.Causal()), sq=[7, 0, 20, 1], skv=24, b=4),
    Case("paged-thd-bias", S(page_size=4, layout="thd", bias=True), sq=[7, 3], skv=24, bias=(2, 4, 7, 24)),
    Case("kv-int8", S(dtype=Precision(kv="int8"), mask=M.Causal())),
    Case("kv-e4m3-head", S(dtype=Precision(kv="float8_e4m3fn", scaling="head"))),
    Case("kv-e5m2-block", S(dtype=Precision(kv="float8_e5m2", scaling="block"), softcap=9.0)),
    Case("kv-int8-paged", S(dtype=Precision(kv="int8", scaling="block"), page_size=8, mask=M.Causal()), skv=56),
    Case("kv-int8-additive", S(dtype=Precision(kv="int8", scaling="block"), score=scores.Additive())),
    Case("kv-int8-thd", S(dtype=Precision(kv="int8", scaling="block"), layout="thd"), sq=[7, 3], skv=[9, 14]),
    Case("q-e4m3", S(mask=M.Causal()), float8=True),
    Case("q-e4m3-head", S(dtype=Precision(scaling="head", compute="float8_e4m3fn")), float8=True),
]


def make(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, k, v and the named tensors of a case; the same each time."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    spec, b = case.spec, case.b
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731  # short on purpose
    ints = lambda low, high, *shape: torch.randint(low, high, shape, generator=g)  # noqa: E731  # as above
    dk, wq, wk = case.dk or case.d, _longest(case.sq), _longest(case.skv)
    t: dict[str, Any] = {}
    if spec.layout == "thd":
        q = randn(sum(case.sq), case.hq, case.d)
        t["cu_seqlens_q"] = torch.tensor([0, *torch.tensor(case.sq).cumsum(0).tolist()], dtype=torch.int32)
    else:
        q = randn(b, case.hq, case.sq, case.d) if spec.layout == "bhsd" else randn(b, case.sq, case.hq, case.d)
    if spec.page_size is not None:
        width = -(-wk // spec.page_size)
        k = randn(b * width + 3, case.hkv, spec.page_size, dk)
        v = randn(b * width + 3, case.hkv, spec.page_size, case.dv)
        t["block_table"] = torch.randperm(b * width + 3, generator=g)[: b * width].reshape(b, width).to(torch.int32)
        if case.seqused:
            used = ints(0, width * spec.page_size + 1, b)
            t["seqused_k"] = used
            beyond = torch.arange(width) * spec.page_size >= used[:, None]
            t["block_table"] = torch.where(beyond, -ints(0, 2, b, width), t["block_table"]).to(torch.int32)
    elif spec.layout == "thd":
        k, v = randn(sum(case.skv), case.hkv, dk), randn(sum(case.skv), case.hkv, case.dv)
        t["cu_seqlens_k"] = torch.tensor([0, *torch.tensor(case.skv).cumsum(0).tolist()])
    elif spec.layout == "bhsd":
        k, v = randn(b, case.hkv, case.skv, dk), randn(b, case.hkv, case.skv, case.dv)
    else:
        k, v = randn(b, case.skv, case.hkv, dk), randn(b, case.skv, case.hkv, case.dv)
    if spec.bias:
        bias = randn(*case.bias)
        odd = torch.rand(case.bias, generator=g)
        bias = bias.where(odd > 0.1, -torch.inf).where(odd < 0.96, -1e4).where(odd < 0.99, 1e4)
        t["bias"] = bias.to(dtype)
    named = {
        "attn_mask": lambda: torch.rand(case.extra.get("attn_mask", (b, 4, wq, wk)), generator=g) > 0.6,
        "alibi_slopes": lambda: randn(*((b,) if "alibi_slopes" in case.extra else ()), case.hq).abs().to(dtype),
        "sinks": lambda: randn(case.hq).to(dtype),
        "score_weight": lambda: (
            randn(
                case.extra.get("score_weight", case.hq),
                case.d,
                *((dk,) if isinstance(spec.score, scores.General) else ()),
            ).to(dtype)
            * 0.5
        ),
        "prefix_lengths": lambda: ints(0, wk, b).to(torch.int32),
        "global_mask": lambda: torch.rand(b, wk, generator=g) > 0.9,
        "document_ids": lambda: ints(0, 4, b, wk) - 1,
        "kv_lengths": lambda: torch.tensor([0, *ints(0, wk + 1, b - 1).tolist()]),
        "query_offset": lambda: ints(-5, wk, b),
        "block_mask": lambda: (
            torch.rand(1, 4, -(-wq // _blocks(spec)[0]), -(-wk // _blocks(spec)[1]), generator=g) > 0.5
        ),
    }
    for name in sorted(spec.tensors() - set(t) - {"cu_seqlens_k", "k_descale", "v_descale"}):
        t[name] = named[name]()
    if spec.sinks:
        t["sinks"][0] = -torch.inf
    if spec.dtype.kv != "same" or case.float8:
        kind = getattr(torch, spec.dtype.kv if spec.dtype.kv != "same" else "float8_e4m3fn")
        count = -(-wk // (spec.page_size or 16))
        shape = {"tensor": (1,), "head": (b, case.hkv), "block": (b, case.hkv, count)}[spec.dtype.scaling]
        t["k_descale"], t["v_descale"] = randn(*shape).abs().float() * 0.05, randn(*shape).abs().float() * 0.05
        k, v = (k * 20).round().clamp(-127, 127).to(kind), (v * 20).round().clamp(-127, 127).to(kind)
    if case.float8:
        t["q_descale"] = randn(*((b, case.hkv) if spec.dtype.scaling != "tensor" else (1,))).abs().float()
        return q.to(torch.float8_e4m3fn), k, v, t
    return q.to(dtype), _to(k, dtype), _to(v, dtype), t


def _longest(n: Any) -> int:
    return max(n) if isinstance(n, list) else n


def _blocks(spec: AttentionSpec) -> tuple[int, int]:
    assert isinstance(spec.sparsity, sparsity.Blocks)
    return spec.sparsity.block_q, spec.sparsity.block_kv


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype == torch.float64 else x
