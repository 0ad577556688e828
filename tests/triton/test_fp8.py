"""The FP8 backend: against its emulation step by step, and against the oracle under the fp8 rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from flash_cases import ROTATED, core, taken

from attnreg import AttentionSpec, Hardware, Precision, Problem, masks
from attnreg.hardware import detect
from attnreg.testing import BackendConformance, Case, cases, make_inputs, oracle
from attnreg_eager.fp8 import hadamard, quantise
from attnreg_eager.fp8_backend import EagerFp8
from attnreg_triton.fp8 import TritonFp8
from attnreg_triton.fp8_launch import Quantiser
from attnreg_triton.ready import once

HARDWARE = detect("cpu")
FP8 = TritonFp8()
TAKEN = tuple(case for case in taken(FP8, (case.bare() for case in cases() if case.name.count("/") == 2)))


def problem(spec: AttentionSpec, **sizes: object) -> Problem:
    """A small bfloat16 problem of the spec; sizes override."""
    plain = {"batch": 2, "q_heads": 4, "kv_heads": 2, "sq": 70, "skv": 90, "head_dim": 32, "dtype": "bfloat16"}
    merged = plain | sizes
    width = merged["head_dim"]
    merged = {"head_dim_k": width, "head_dim_v": width, "kv_dtype": merged["dtype"]} | merged
    merged["square"] = merged["sq"] == merged["skv"]
    return Problem(spec=spec, **merged)  # type: ignore[arg-type]  # sizes come by name


def in_turn(chosen: Sequence[Case]) -> tuple[Case, ...]:
    """Each feature as normal noise in bfloat16 or float8, and with one flavour that breaks weak kernels, in turn."""
    features = list(dict.fromkeys(case.name.split("/")[0] for case in chosen))
    out = []
    for case in chosen:
        turn = features.index(case.name.split("/")[0])
        plain = case.flavour == "normal" and case.problem.dtype != "float32" and "length" not in case.name
        if plain or (case.flavour == ROTATED[turn % len(ROTATED)] and case.problem.dtype != "float16"):
            out.append(case)
    return tuple(out)


class TestTritonFp8(BackendConformance):
    backend = FP8
    cases = core(in_turn(TAKEN), "compute_float8_e4m3fn_rotated", "kv_decode")
    configurations = 2


@pytest.mark.slow
class TestTritonFp8Whole(BackendConformance):
    backend = FP8
    cases = TAKEN


@pytest.mark.parametrize("compute", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scaling", ["tensor", "head", "block"])
@pytest.mark.parametrize("rotate", [False, True])
def test_quantisation_is_the_emulation_bit_for_bit(compute: str, scaling: Any, rotate: bool) -> None:
    """The kernels' 8-bit values and factors are those of the emulation, odd lengths and head sizes included."""
    torch.manual_seed(1)
    dtype = getattr(torch, compute)
    x = torch.randn(2, 4, 45, 24) * torch.exp(3 * torch.randn(2, 4, 45, 1))
    made, factor = Quantiser(dtype, scaling, 16, group=2, rotate=rotate)(
        x, "bhsd", None, lambda launches: once(launches, x.device)
    )
    wide = hadamard(x) if rotate else x
    exact, descale = quantise(wide, dtype, scaling, 16, 2)
    torch.testing.assert_close(made.float()[..., : wide.shape[-1]], exact, rtol=0, atol=0)
    assert not made.float()[..., wide.shape[-1] :].any()
    torch.testing.assert_close(factor.data, descale.value, rtol=0, atol=0)
    assert factor.block == (16 if scaling == "block" else factor.block)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("scaling", ["tensor", "block"])
@pytest.mark.parametrize("rotate", [False, True])
def test_what_is_not_finite_shows(name: str, value: float, scaling: Any, rotate: bool) -> None:
    """A NaN or inf makes its scale's values NaN as in the emulation, and with them each row that attends one."""
    precision = Precision(compute="float8_e4m3fn", scaling=scaling, rotate=rotate)
    inputs = make_inputs(problem(AttentionSpec(mask=masks.Causal(), dtype=precision, return_lse=True)))
    given = {x: getattr(inputs, x).clone() for x in "qkv"}
    given[name][1, 1, 50, 3] = value
    config = FP8.space(inputs.problem, HARDWARE).check({"block_m": 32, "block_n": 32, "block_q": 16})
    emulation = EagerFp8().prepare(inputs.problem, {"block_q": 16, "block_kv": 32})
    found = FP8.prepare(inputs.problem, config)(**given)
    for x, expected in zip(found, emulation(**given), strict=True):
        assert (x.isfinite() == expected.isfinite()).all()
    exact, _ = oracle(AttentionSpec(mask=masks.Causal()), **given)
    assert not exact.isfinite().all()
    assert not found[0][~exact.isfinite()].isfinite().any()


def test_versions_tell_what_changed() -> None:
    """Records of caches that come as FP8 stand: version 5 changed quantisation alone."""
    quantised, cached = (AttentionSpec(dtype=Precision(**{x: "float8_e4m3fn"})) for x in ("compute", "kv"))  # type: ignore[arg-type]  # by name
    biased = AttentionSpec(dtype=cached.dtype, bias=True)
    stored = {"kv_dtype": "float8_e4m3fn"}
    asked = (
        problem(quantised),
        problem(quantised, dtype="float8_e4m3fn"),
        problem(cached, **stored),
        problem(biased, **stored),
        problem(cached, dtype="float32", **stored),
    )
    assert [FP8.version_for(p, HARDWARE) for p in asked] == ["5", "4", "3", "4", "4"]


@pytest.mark.parametrize(
    ("compute", "scaling", "rotate", "fields"),
    [
        ("float8_e4m3fn", "block", True, {"mask": masks.Causal()}),
        ("float8_e4m3fn", "head", False, {"mask": masks.Causal() & masks.SlidingWindow(20), "softcap": 20.0}),
        ("float8_e5m2", "tensor", False, {"mask": masks.Padding(), "sinks": True}),
        ("float8_e4m3fn", "block", False, {"mask": masks.PrefixLM(), "alibi": True, "layout": "bshd"}),
    ],
)
def test_attention_is_the_emulation(compute: str, scaling: Any, rotate: bool, fields: dict[str, Any]) -> None:
    """Kernel and emulation differ by the order of float32 sums alone, which seldom turns the last bit of a weight.

    The bound: a weight's last bit (2**-4 of it in e4m3, 2**-3 in e5m2) on a few weights of a row moves the output by
    far less than FP8's own error, of which 1/8 at the most is allowed here.
    """
    precision = Precision(compute=compute, scaling=scaling, rotate=rotate)  # type: ignore[arg-type]  # parametrised
    spec = AttentionSpec(dtype=precision, return_lse=True, **fields)
    inputs = make_inputs(problem(spec, dtype="float32"))
    config = FP8.space(inputs.problem, HARDWARE).check({"block_m": 32, "block_n": 32, "block_q": 16})
    out, lse = FP8.prepare(inputs.problem, config)(inputs.q, inputs.k, inputs.v, **inputs.tensors)
    emulation = EagerFp8().prepare(inputs.problem, {"block_q": 16, "block_kv": 32})
    expected, expected_lse = emulation(inputs.q, inputs.k, inputs.v, **inputs.tensors)
    plain = AttentionSpec(return_lse=True, **fields)
    exact, _ = oracle(plain, inputs.q, inputs.k, inputs.v, **inputs.tensors)
    own_error = (expected - exact).abs().max()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert (out - expected).abs().max() <= own_error / 8
    assert (out - expected).abs().mean() <= (expected - exact).abs().mean() / 32


def test_keys_that_no_row_attends_have_no_say_in_a_scale() -> None:
    """Huge values in masked keys change nothing, bit for bit."""
    spec = AttentionSpec(
        mask=masks.Causal() & masks.SlidingWindow(9) & masks.Padding(), dtype=Precision(compute="float8_e4m3fn")
    )
    inputs = make_inputs(problem(spec, sq=5))
    run = FP8.prepare(inputs.problem, FP8.space(inputs.problem, HARDWARE).default)
    lengths = torch.tensor([40, 90])
    before = run(inputs.q, inputs.k, inputs.v, kv_lengths=lengths)
    k, v = inputs.k.clone(), inputs.v.clone()
    for x in (k, v):
        x[0, :, 40:] = 3e38
        x[:, :, :20] = -3e38
    torch.testing.assert_close(run(inputs.q, k, v, kv_lengths=lengths), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arch", "kind", "words"),
    [("sm_80", "cuda", "sm_89"), ("gfx942", "hip", "fnuz"), ("gfx1100", "hip", "fnuz")],
)
def test_old_hardware_is_refused(arch: str, kind: Any, words: str) -> None:
    spec = AttentionSpec(dtype=Precision(compute="float8_e4m3fn"))
    asked = replace(problem(spec), device="cuda")
    reasons = FP8.supports(asked, Hardware(kind, "", "", arch, 100))
    assert any(words in reason for reason in reasons), reasons
    assert FP8.supports(asked, Hardware("cuda", "", "", "sm_90", 132)) == []
    assert any("nothing here is FP8" in r for r in FP8.supports(problem(AttentionSpec()), HARDWARE))
