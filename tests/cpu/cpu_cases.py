"""One table of calls for every native CPU kernel: spec, tensors, and what makes each of them hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks, scores, sparsity

Make = Callable[[torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A spec at one size. `make` draws the named tensors; `scale_q` makes logits large."""

    name: str
    spec: AttentionSpec
    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    sq: int = 67
    skv: int = 130
    dim: int = 64
    dim_v: int = 64
    make: Make = field(default=lambda g: {})
    scale_q: float = 1.0
    lengths: tuple[tuple[int, int], ...] = ()  # thd: (rows, keys) of each sequence
    pages: int = 0

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v and the named tensors."""
        g = torch.Generator().manual_seed(seed)
        hq, hkv = self.heads

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        named: dict[str, Any] = dict(self.make(g))
        rows, keys = sum(r for r, _ in self.lengths), sum(n for _, n in self.lengths)
        if self.spec.layout == "thd":
            q = randn(rows, hq, self.dim) * self.scale_q
            cu = torch.tensor([(0, 0), *self.lengths]).cumsum(0)
            named["cu_seqlens_q"] = cu[:, 0].to(torch.int32)
            if self.pages == 0:
                named["cu_seqlens_k"] = cu[:, 1].contiguous()
        elif self.spec.layout == "bshd":
            q = randn(self.batch, self.sq, hq, self.dim) * self.scale_q
        else:
            q = randn(self.batch, hq, self.sq, self.dim) * self.scale_q
        if self.pages:
            shape: tuple[int, ...] = (self.pages, hkv, self.spec.page_size or 0)
        elif self.spec.layout == "thd":
            shape = (keys, hkv)
        elif self.spec.layout == "bshd":
            shape = (self.batch, self.skv, hkv)
        else:
            shape = (self.batch, hkv, self.skv)
        return q, randn(*shape, self.dim), randn(*shape, self.dim_v), named


def _lengths(*values: int, dtype: torch.dtype = torch.int64) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.tensor(values, dtype=dtype)


def _spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(return_lse=True, **fields)


def _weight(*shape: int) -> Make:
    """Of a general or additive score, with logits of a few units."""
    return lambda g: {"score_weight": torch.randn(*shape, generator=g) * shape[-1] ** -0.5}


def _mask(*shape: int, keep: float = 0.6) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(*shape, generator=g) < keep


def _documents(*counts: tuple[int, ...]) -> Callable[[torch.Generator], Tensor]:
    rows = [torch.cat([torch.full((n,), (7 * d) % 5 - 2) for d, n in enumerate(row)]) for row in counts]
    return lambda g: torch.stack(rows)


def _named(**makers: Callable[[torch.Generator], Tensor]) -> Make:
    return lambda g: {name: make(g) for name, make in makers.items()}


CAUSAL = masks.Causal()

CASES = [
    Case("full", _spec()),
    Case("causal", _spec(mask=CAUSAL)),
    Case("causal_square", _spec(mask=CAUSAL), sq=129, skv=129),
    Case("more_queries_than_keys", _spec(mask=CAUSAL), sq=130, skv=63),
    Case("one_query", _spec(mask=CAUSAL), sq=1, skv=65),
    Case("one_key", _spec(), sq=65, skv=1),
    Case("top_left", _spec(mask=CAUSAL, align="top_left"), sq=127, skv=65),
    Case("offset", _spec(mask=CAUSAL, align="offset"), make=_named(query_offset=_lengths(5, -40)), sq=70, skv=70),
    Case("mqa_wide_values", _spec(mask=CAUSAL), heads=(6, 1), dim=40, dim_v=72),
    Case("odd_head_dims", _spec(), heads=(3, 3), dim=33, dim_v=7),
    Case("head_dim_1", _spec(), heads=(2, 1), dim=1, dim_v=1, sq=20, skv=40),
    Case("head_dim_256", _spec(mask=CAUSAL), heads=(2, 1), dim=256, dim_v=256, sq=50, skv=50),
    Case("window", _spec(mask=masks.SlidingWindow(30, 5)), sq=200, skv=260),
    Case("window_causal", _spec(mask=CAUSAL & masks.SlidingWindow(16)), sq=300, skv=300),
    Case("prefix", _spec(mask=masks.PrefixLM(50)), sq=129, skv=129),
    Case("prefix_tensor", _spec(mask=masks.PrefixLM()), make=_named(prefix_lengths=_lengths(0, 77)), sq=129, skv=129),
    Case("chunked", _spec(mask=CAUSAL & masks.Chunked(33)), sq=150, skv=190),
    Case("padding", _spec(mask=CAUSAL & masks.Padding()), make=_named(kv_lengths=_lengths(100, 0)), sq=90, skv=130),
    Case(
        "padding_top_left",
        _spec(mask=CAUSAL & masks.Padding(), align="top_left"),
        make=_named(kv_lengths=_lengths(129, 3, dtype=torch.int32)),
        sq=130,
        skv=130,
    ),
    Case(
        "documents",
        _spec(mask=CAUSAL & masks.Document()),
        make=_named(document_ids=_documents((40, 1, 60, 29), (130,))),
        sq=130,
        skv=130,
    ),
    Case(
        "scattered_documents",
        _spec(mask=masks.Document()),
        make=_named(document_ids=_documents((20, 30, 10, 5, 15, 20, 30), (9, 9, 9, 9, 9, 85))),
        sq=100,
        skv=130,
    ),
    Case("dense_mask", _spec(mask=masks.Dense()), make=_named(attn_mask=_mask(2, 4, 67, 130))),
    Case("dense_mask_broadcast", _spec(mask=CAUSAL & masks.Dense()), make=_named(attn_mask=_mask(67, 1, keep=0.8))),
    Case("dense_mask_empty", _spec(mask=masks.Dense()), make=_named(attn_mask=_mask(2, 1, 1, 130, keep=0.0))),
    Case("bias", _spec(mask=CAUSAL, bias=True), make=lambda g: {"bias": torch.randn(1, 4, 67, 130, generator=g)}),
    Case("bias_keys", _spec(bias=True), make=lambda g: {"bias": torch.randn(2, 1, 1, 130, generator=g)}),
    Case("alibi", _spec(mask=CAUSAL, alibi=True), make=lambda g: {"alibi_slopes": torch.rand(4, generator=g)}),
    Case("alibi_batch", _spec(alibi=True), make=lambda g: {"alibi_slopes": torch.rand(2, 4, generator=g)}),
    Case("sinks", _spec(mask=CAUSAL, sinks=True), make=lambda g: {"sinks": torch.randn(4, generator=g)}),
    Case(
        "sinks_empty_rows",
        _spec(mask=CAUSAL, sinks=True),
        make=lambda g: {"sinks": torch.tensor([0.5, -torch.inf, 3.0, -200.0])},
        sq=130,
        skv=60,
    ),
    Case("softcap", _spec(mask=CAUSAL, softcap=2.5), scale_q=4.0),
    Case("dot", _spec(score=scores.Dot()), dim=16, dim_v=16),
    Case("additive", _spec(mask=CAUSAL, score=scores.Additive()), make=_weight(4, 64)),
    Case(
        "additive_shared",
        _spec(score=scores.Additive(), softcap=2.0, layout="bshd"),
        dim=33,
        dim_v=7,
        make=_weight(1, 33),
    ),
    Case("general", _spec(mask=CAUSAL, score=scores.General()), dim=24, dim_v=24, make=_weight(4, 24, 24)),
    Case("general_shared", _spec(score=scores.General(), layout="bshd"), dim=40, dim_v=40, make=_weight(1, 40, 40)),
    Case("negative_scale", _spec(mask=CAUSAL, score=scores.ScaledDot(-0.3))),
    Case("zero_scale", _spec(score=scores.ScaledDot(0.0))),
    Case("large_logits", _spec(mask=CAUSAL), scale_q=60.0),
    Case("bshd", _spec(mask=CAUSAL, layout="bshd")),
    Case("thd", _spec(mask=CAUSAL, layout="thd"), lengths=((5, 9), (0, 4), (129, 140), (3, 0), (1, 1))),
    Case("thd_window", _spec(mask=masks.SlidingWindow(20, 3), layout="thd"), lengths=((70, 70), (33, 60))),
    Case(
        "paged",
        _spec(mask=CAUSAL, page_size=16),
        make=_named(
            block_table=lambda g: torch.tensor([[3, 0, 7, 1, 9, 2, 11, 5, 8], [6, 4, 10, -1, 0, 0, 0, 0, 0]]),
            seqused_k=_lengths(140, 41),
        ),
        pages=12,
        skv=144,
    ),
    Case(
        "paged_thd",
        _spec(mask=CAUSAL, page_size=8, layout="thd"),
        make=_named(
            block_table=lambda g: torch.tensor([[3, 0, 2], [1, 5, 4]], dtype=torch.int32), seqused_k=_lengths(20, 9)
        ),
        lengths=((7, 20), (30, 9)),
        pages=6,
    ),
    # What follows is no conjunction of intervals and goes through block layouts.
    Case("longformer", _spec(mask=masks.longformer(40, (0, 77, 150))), sq=200, skv=200),
    Case("dilated", _spec(mask=CAUSAL & masks.Dilated(21, 3)), sq=129, skv=190),
    Case("not_window", _spec(mask=CAUSAL & ~masks.SlidingWindow(20)), sq=150, skv=150),
    Case("custom", _spec(mask=CAUSAL & masks.Custom(lambda b, h, p, j: (p + j + h + b) % 3 != 0)), sq=100, skv=130),
    Case("bigbird", _spec(sparsity=sparsity.BigBird(32, random_blocks=2, seed=3)), sq=300, skv=300),
    Case("strided_causal", _spec(mask=CAUSAL, sparsity=sparsity.Strided(16, 2, 3)), heads=(4, 4), sq=210, skv=260),
    Case(
        "blocks",
        _spec(mask=CAUSAL, sparsity=sparsity.Blocks(48, 32)),
        make=lambda g: {"block_mask": torch.rand(2, 4, 5, 7, generator=g) < 0.5},
        sq=200,
        skv=210,
    ),
    Case(
        "blocks_empty",
        _spec(sparsity=sparsity.Blocks(64, 64)),
        make=lambda g: {"block_mask": torch.zeros(1, 1, 2, 3, dtype=torch.bool)},
        sq=100,
        skv=130,
    ),
    Case(
        "union_padding_alibi",
        _spec(mask=masks.Padding() & (CAUSAL | masks.Chunked(64)), alibi=True, softcap=8.0),
        make=lambda g: {"kv_lengths": torch.tensor([130, 90]), "alibi_slopes": torch.rand(4, generator=g)},
        sq=130,
        skv=170,
    ),
    Case(
        "global_tensor",
        _spec(mask=masks.SlidingWindow(10, 10) | masks.Global()),
        make=lambda g: {"global_mask": torch.rand(2, 130, generator=g) < 0.03},
        sq=130,
        skv=130,
    ),
    Case(
        "thd_union",
        _spec(mask=masks.SlidingWindow(8) | masks.Dilated(90, 5), layout="thd"),
        lengths=((70, 70), (0, 5), (90, 130)),
    ),
    Case(
        "thd_additive",
        _spec(mask=CAUSAL, score=scores.Additive(), layout="thd"),
        lengths=((70, 70), (0, 5), (90, 130)),
        make=_weight(4, 64),
    ),
    Case(
        "thd_general",
        _spec(mask=CAUSAL, score=scores.General(), layout="thd"),
        lengths=((70, 70), (0, 5), (90, 130)),
        make=_weight(4, 64, 64),
    ),
    Case(
        "additive_longformer",
        _spec(mask=masks.longformer(20, (0, 77)), score=scores.Additive()),
        make=_weight(4, 64),
        sq=130,
        skv=130,
    ),
    Case(
        "thd_bigbird",
        _spec(sparsity=sparsity.BigBird(16, random_blocks=2), layout="thd"),
        lengths=((130, 130), (50, 90), (0, 20)),
    ),
    Case(
        "paged_union",
        _spec(mask=CAUSAL & ~masks.Dilated(60, 4), page_size=16),
        make=_named(block_table=lambda g: torch.tensor([[3, 0, 7], [6, 4, -1]]), seqused_k=_lengths(48, 20)),
        pages=8,
        sq=40,
        skv=48,
    ),
    Case(
        "union_bias_sinks",
        _spec(mask=masks.Chunked(50) | masks.Dilated(40, 7), bias=True, sinks=True, layout="bshd"),
        make=lambda g: {"bias": torch.randn(4, 67, 130, generator=g), "sinks": torch.randn(4, generator=g)},
    ),
    Case("mqa_union", _spec(mask=CAUSAL & ~masks.Dilated(80, 9)), heads=(40, 1), sq=80, skv=80, batch=1),
]
