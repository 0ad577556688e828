"""What the sdpa backend refuses, and what it offers to choose from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense import problem_of

from attnreg import AttentionSpec, Hardware, Precision, Problem, masks, scores, sparsity
from attnreg.hardware import detect
from attnreg_sdpa import Sdpa

SDPA = Sdpa()
CPU = detect("cpu")
GPU = Hardware(kind="cuda", vendor="nvidia", model="x", arch="sm_90", cores=132, memory=80 << 30)


def problem(
    spec: AttentionSpec, *, device: str = "cpu", traced: bool = False, grads: str = "", **sizes: int
) -> Problem:
    """A problem of plain sizes; no tensor is made, so that a GPU's can be asked about."""
    sizes = {"batch": 2, "q_heads": 4, "kv_heads": 2, "sq": 8, "skv": 16, "head_dim": 16, **sizes}
    sizes = {"head_dim_k": sizes["head_dim"], "head_dim_v": sizes["head_dim"], **sizes}
    named = frozenset(grads.split(",")) if grads else frozenset()
    return Problem(spec=spec, device=device, traced=traced, grads=named, square=sizes["sq"] == sizes["skv"], **sizes)  # type: ignore[arg-type]  # sizes are ints


REFUSED = [
    (problem(AttentionSpec(score=scores.Additive())), "score Additive()"),
    (problem(AttentionSpec(softcap=30.0)), "softcap=30.0"),
    (problem(AttentionSpec(sinks=True, dropout_p=0.1)), "sinks with dropout_p"),
    (problem(AttentionSpec(return_lse=True, dropout_p=0.1)), "return_lse with dropout_p"),
    (problem(AttentionSpec(return_lse=True, bias=True), grads="q,bias"), "return_lse with a gradient of the bias"),
    (problem(AttentionSpec(sinks=True, alibi=True), grads="alibi_slopes"), "sinks with a gradient of alibi_slopes"),
    (problem(AttentionSpec(sinks=True, return_lse=True), device="cuda"), "return_lse and sinks: SDPA returns no lse"),
    (problem(AttentionSpec(layout="thd"), device="cuda"), "read cu_seqlens back"),
    (problem(AttentionSpec(layout="thd"), traced=True), "layout 'thd' under a trace"),
    (problem(AttentionSpec(sparsity=sparsity.BigBird(4)), traced=True), "BigBird under a trace"),
    (problem(AttentionSpec(deterministic=True), device="cuda", grads="q"), "deterministic"),
    (problem(AttentionSpec(mask=masks.SlidingWindow(4096)), sq=2**20, skv=2**20), "dense tensor it takes 4096.0 GiB"),
    (problem(AttentionSpec(), device="xpu"), "device 'xpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_refusal_says_why(asked: Problem, words: str) -> None:
    reasons = SDPA.supports(asked, GPU if asked.device == "cuda" else CPU)
    assert len(reasons) == 1
    assert words in reasons[0]


def test_every_reason_is_given() -> None:
    spec = AttentionSpec(score=scores.Additive(), softcap=5.0, return_lse=True)
    assert len(SDPA.supports(problem(spec, device="cuda"), GPU)) == 3


@pytest.mark.parametrize("spec", [
    AttentionSpec(), AttentionSpec(mask=masks.Causal()), AttentionSpec(sparsity=sparsity.BigBird(4)),
    AttentionSpec(dropout_p=0.5), AttentionSpec(dtype=Precision(compute="int8", rotate=True)),
], ids=str)  # fmt: skip
def test_what_is_not_refused(spec: AttentionSpec) -> None:
    assert SDPA.supports(problem(spec), CPU) == []


def test_choices_follow_the_problem() -> None:
    """Each kernel where it applies; a way to share keys only where heads share them."""
    plain = problem(AttentionSpec(), q_heads=2)
    assert SDPA.space(plain, CPU).choices == {"kernel": ("auto", "flash", "math")}
    assert SDPA.space(replace(plain, spec=AttentionSpec(sinks=True)), CPU).choices["kernel"] == ("flash",)
    assert SDPA.space(problem(AttentionSpec(bias=True), grads="bias"), CPU).choices["kernel"] == ("auto",)
    assert SDPA.space(problem(AttentionSpec(alibi=True), grads="alibi_slopes"), CPU).choices["kernel"] == ("auto",)
    decode = problem(AttentionSpec(mask=masks.Causal()), sq=1)
    assert SDPA.space(decode, CPU).default["grouping"] == "pack"
    square = problem(AttentionSpec(mask=masks.Causal()), sq=16)
    assert "pack" not in SDPA.space(square, CPU).choices["grouping"]
    half = replace(plain, dtype="bfloat16", kv_dtype="bfloat16")
    assert SDPA.space(half, CPU).choices["upcast"] == (True, False)
    gpu = SDPA.space(replace(half, device="cuda"), GPU)
    assert gpu.choices["kernel"] == ("auto", "flash", "efficient", "cudnn", "math")
    masked = replace(half, device="cuda", spec=AttentionSpec(mask=masks.SlidingWindow(3)))
    assert "flash" not in SDPA.space(masked, GPU).choices["kernel"]
    grouped = SDPA.space(replace(half, device="cuda", q_heads=4), GPU)
    assert all(c["kernel"] != "efficient" or c["grouping"] != "enable_gqa" for c in grouped.points())


def test_the_estimate_ranks_what_is_known() -> None:
    """More work costs more; a dense mask never costs less than the kernel's own causal mask."""
    seconds = [SDPA.estimate(problem(AttentionSpec(mask=masks.Causal()), sq=n, skv=n), CPU) for n in (64, 512, 4096)]
    assert seconds == sorted(seconds)
    window = SDPA.estimate(problem(AttentionSpec(mask=masks.SlidingWindow(64)), sq=4096, skv=4096), CPU)
    assert window > seconds[-1]
    assert SDPA.estimate(problem(AttentionSpec(), grads="q"), CPU) > SDPA.estimate(problem(AttentionSpec()), CPU)


def test_the_plain_call_is_torchs_function_and_no_more() -> None:
    """No object stands between the caller and SDPA where the spec needs nothing else."""
    q = torch.randn(1, 2, 20, 8)
    few = q[:, :, :5]  # of few keys torch's kernel loses a NaN, so that something has to look for one
    lost = few.clone()
    lost[0, 0, 0, 0] = torch.nan
    assert (
        SDPA.prepare(problem_of(AttentionSpec(), few, few, few), {"kernel": "auto"})(lost, few, few)[0, 0, 0]
        .isnan()
        .all()
    )
    for spec in (AttentionSpec(), AttentionSpec(mask=masks.Causal()), AttentionSpec(score=scores.Dot())):
        call = SDPA.prepare(problem_of(spec, q, q, q), {"kernel": "auto"})
        assert type(call).__name__ == "function"
