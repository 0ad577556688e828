"""Problem.flops, bytes and density: what the definition says, and bounds where tensors decide."""

from __future__ import annotations

import pytest

from attnreg import AttentionSpec, scores
from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks import block_layout
from attnreg.problem import Problem, TensorInfo


def problem(spec: AttentionSpec | None = None, **change: object) -> Problem:
    sizes = {
        "batch": 2, "q_heads": 8, "kv_heads": 2, "sq": 128, "skv": 256, "head_dim": 64, "head_dim_k": 64,
        "head_dim_v": 32, **change,
    }  # fmt: skip
    return Problem(spec or AttentionSpec(), **sizes)  # type: ignore[arg-type]  # sizes of any name


def test_full_attention() -> None:
    p = problem()
    assert p.density == 1.0
    assert p.flops == 2 * 8 * 128 * 256 * 2 * (64 + 32)
    assert p.bytes == 4 * (2 * 8 * 128 * (64 + 32) + 2 * 2 * 256 * (64 + 32))


@pytest.mark.parametrize(
    ("mask", "sparsity"),
    [
        (m.Causal(), s.Dense()),
        (m.Causal() & m.SlidingWindow(20), s.Dense()),
        (m.longformer(30, (0, 40)), s.Dense()),
        (m.Causal(), s.Strided(16, 2, 3)),
        (~m.PrefixLM(30) | m.Chunked(7), s.BigBird(16, random_blocks=0)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_agrees_with_the_layout(mask: m.Mask, sparsity: s.Sparsity, align: str) -> None:
    p = problem(AttentionSpec(mask=mask, sparsity=sparsity, align=align))
    offset = 0 if align == "top_left" else None
    layout = block_layout(mask, sparsity, 128, 256, 32, 32, heads=8, batch=2, offset=offset)
    assert p.flops == layout.flops(64, 32)
    assert p.density == layout.density


def test_a_gradient_adds_the_backward() -> None:
    p, q = problem(), problem(grads=frozenset("qkv"))
    assert q.flops == 3.5 * p.flops
    assert q.bytes > 2.5 * p.bytes


def test_a_window_reads_only_its_keys() -> None:
    p = problem(AttentionSpec(mask=m.Causal() & m.SlidingWindow(99)), sq=1, skv=1 << 20)
    assert p.flops == 2 * 8 * 100 * 2 * (64 + 32)
    assert p.bytes == 4 * (2 * 8 * (64 + 32) + 2 * 2 * 100 * (64 + 32))


def test_scores_other_than_dot() -> None:
    assert problem(AttentionSpec(score=scores.Additive())).flops == 2 * 8 * 128 * 256 * (4 * 64 + 2 * 32)
    general = problem(AttentionSpec(score=scores.General()), head_dim_k=16)
    assert general.flops == 2 * 8 * (128 * 256 * 2 * (16 + 32) + 128 * 2 * 64 * 16)


def test_dtypes_and_tables() -> None:
    half = problem(AttentionSpec(return_lse=True), dtype="bfloat16", kv_dtype="int8")
    assert half.bytes == 2 * 8 * 128 * (2 * (64 + 32) + 4) + 2 * 2 * 256 * (64 + 32)
    eight = problem(dtype="float8_e4m3fn", kv_dtype="float8_e4m3fn")
    assert eight.bytes == 2 * 8 * 128 * (64 + 2 * 32) + 2 * 2 * 256 * (64 + 32)
    bias = TensorInfo("bias", "float32", (1, 0, 0, 0))
    mask = TensorInfo("attn_mask", "bool", (1, 0))
    assert problem(tensors=(bias, mask)).bytes - problem().bytes == 4 * 8 * 128 * 256 + 256


def test_packed_rows_bound_the_work() -> None:
    spec = AttentionSpec(mask=m.Causal() & m.Document(), layout="thd")
    p = problem(spec, batch=10, sq=128, skv=128, total_q=256, total_k=256)
    # No batch of 256 rows in sequences of at most 128 has more causal pairs than two full ones.
    assert p.flops == 2 * 8 * (128 * 129 // 2) * 2 * (64 + 32)


@pytest.mark.parametrize("mask", [m.Padding(), m.Dense(), m.Document(), m.Custom(lambda b, h, p, j: j <= p)])
def test_what_tensors_decide_counts_as_allowed(mask: m.Mask) -> None:
    assert problem(AttentionSpec(mask=mask & m.Causal())).flops == problem(AttentionSpec(mask=m.Causal())).flops
    assert problem(AttentionSpec(mask=~mask)).density == 1.0


def test_no_queries_cost_nothing() -> None:
    assert (problem(sq=0).flops, problem(sq=0).density) == (0, 0)
