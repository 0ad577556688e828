"""What the flex backend refuses, what it offers, and that it compiles nothing to say so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._inductor.config

import attnreg_flex.backend as backend
from attnreg import AttentionSpec, Hardware, Precision, Problem, masks, scores
from attnreg.hardware import detect
from attnreg_flex import Flex, attnreg_doctor

FLEX = Flex()
CPU = detect("cpu")
GPU = Hardware(kind="cuda", vendor="nvidia", model="x", arch="sm_90", cores=132, memory=80 << 30)


def problem(spec: AttentionSpec, **fields: object) -> Problem:
    sizes = {
        "batch": 2,
        "q_heads": 4,
        "kv_heads": 2,
        "sq": 8,
        "skv": 16,
        "head_dim": 16,
        "head_dim_k": 16,
        "head_dim_v": 16,
    }
    return Problem(spec=spec, **{**sizes, **fields})  # type: ignore[arg-type]  # a table of field values


REFUSED = [
    (problem(AttentionSpec(score=scores.Additive())), "score Additive()"),
    (problem(AttentionSpec(dropout_p=0.1)), "dropout_p"),
    (problem(AttentionSpec(layout="thd")), "layout 'thd'"),
    (problem(AttentionSpec(), dtype="float64", kv_dtype="float64"), "dtype float64"),
    (problem(AttentionSpec(dtype=Precision(kv="int8")), kv_dtype="int8"), "stored as int8"),
    (problem(AttentionSpec(), traced=True), "under a trace"),
    (problem(AttentionSpec(), grads=frozenset("q")), "gradients on the CPU"),
    (problem(AttentionSpec(return_lse=True)), "return_lse on the CPU"),
    (problem(AttentionSpec(sinks=True)), "sinks on the CPU"),
    (problem(AttentionSpec(deterministic=True), grads=frozenset("q"), device="cuda"), "deterministic"),
    (problem(AttentionSpec(alibi=True), grads=frozenset({"alibi_slopes"}), device="cuda"), "gradient of alibi_slopes"),
    (problem(AttentionSpec(), device="xpu"), "device 'xpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_refusal_says_why(asked: Problem, words: str) -> None:
    reasons = FLEX.supports(asked, GPU if asked.device == "cuda" else CPU)
    assert len(reasons) == 1
    assert words in reasons[0]


def test_a_gpu_is_asked_for_lse_and_gradients() -> None:
    spec = AttentionSpec(return_lse=True, sinks=True, mask=masks.Causal())
    assert FLEX.supports(problem(spec, device="cuda", grads=frozenset("qkv")), GPU) == []


def test_a_missing_compiler_is_a_reason_and_a_finding() -> None:
    backend.compiler_missing.cache_clear()
    try:
        with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
            said = backend.compiler_missing()
            assert "C++ compiler" in said
            assert said in FLEX.supports(problem(AttentionSpec()), CPU)
            (finding,) = attnreg_doctor(CPU)
            assert not finding.ok
            assert finding.detail == said
    finally:
        backend.compiler_missing.cache_clear()


def test_an_unused_instruction_set_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    backend.compiler_missing.cache_clear()
    try:
        assert "ATEN_CPU_CAPABILITY" in backend.compiler_missing()
    finally:
        backend.compiler_missing.cache_clear()


def test_choices_are_block_sizes() -> None:
    plain = problem(AttentionSpec())
    assert set(FLEX.space(plain, CPU).choices) == {"block_q", "block_kv"}
    assert "upcast" in FLEX.space(replace(plain, dtype="float16", kv_dtype="float16"), CPU).choices
    assert FLEX.space(replace(plain, device="cuda"), GPU).default["block_q"] == 128


def test_the_estimate_follows_the_live_pairs() -> None:
    """A window costs what it attends, not what the sequence could."""

    def seconds(mask: masks.Mask, n: int) -> float:
        return FLEX.estimate(problem(AttentionSpec(mask=mask), sq=n, skv=n), CPU)

    assert seconds(masks.SlidingWindow(256), 8192) < seconds(masks.Causal(), 8192) / 4
    assert seconds(masks.Causal(), 8192) < seconds(masks.Full(), 8192)


def test_prepare_compiles_nothing() -> None:
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    asked = problem(AttentionSpec(mask=masks.Causal()))
    FLEX.prepare(asked, FLEX.space(asked, CPU).default)
    assert counters["stats"]["unique_graphs"] == before
    assert torch.__version__ in FLEX.version
