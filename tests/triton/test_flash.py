"""The flash backend against the oracle: every feature it takes, forward and backward, at small shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flash_cases import quick, taken, without_gradients

import attnreg
from attnreg import AttentionSpec, Problem, TensorInfo, errors, masks
from attnreg.hardware import detect
from attnreg.testing import BackendConformance, Case, cases, make_inputs, oracle
from attnreg.testing.candidate import check_candidate
from attnreg.testing.dropout import check_dropout
from attnreg_triton.flash import TritonFlash

HARDWARE = detect("cpu")
FLASH = TritonFlash()
TAKEN = taken(FLASH, cases())
PAGED = [without_gradients(case) for case in cases() if case.spec.page_size is not None]


def problem(spec: AttentionSpec, **sizes: object) -> Problem:
    """A small float32 problem of the spec; sizes override."""
    plain = {"batch": 1, "q_heads": 2, "kv_heads": 1, "sq": 40, "skv": 40, "head_dim": 16, "dtype": "float32"}
    merged = plain | sizes
    width = merged["head_dim"]
    merged = {"head_dim_k": width, "head_dim_v": width, "kv_dtype": merged["dtype"]} | merged
    merged["square"] = merged["sq"] == merged["skv"]
    return Problem(spec=spec, **merged)  # type: ignore[arg-type]  # sizes come by name


def prepared(problem: Problem, **config: int | str) -> Callable[..., Any]:
    """A callable of the flash backend, at its default configuration but for `config`."""
    assert FLASH.supports(problem, HARDWARE) == []
    return FLASH.prepare(problem, FLASH.space(problem, HARDWARE).check(config))


class TestTritonFlash(BackendConformance):
    backend = FLASH
    cases = quick(TAKEN)
    configurations = 1


class TestTritonFlashPaged(BackendConformance):
    backend = FLASH
    cases = quick(taken(FLASH, PAGED))
    configurations = 1


@pytest.mark.slow
class TestTritonFlashWhole(BackendConformance):
    backend = FLASH
    cases = (*TAKEN, *taken(FLASH, PAGED))


@pytest.mark.slow
class TestTritonFlashLarger(BackendConformance):
    backend = FLASH
    cases = taken(FLASH, cases(slow=True))


@pytest.mark.parametrize("head_dim", [24, 40, 80, 96, 160, 192])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_head_in_pieces(head_dim: int, dtype: str) -> None:
    """A head that is no power of two is padded or cut into a block and a tail, with the same result."""
    spec = AttentionSpec(mask=masks.Causal(), return_lse=True)
    asked = problem(spec, head_dim=head_dim, head_dim_v=head_dim - 8, dtype=dtype, grads=frozenset("qkv"))
    inputs = make_inputs(asked)
    result = check_candidate(prepared(inputs.problem), inputs)
    assert result.ok, result.reason


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 1), (1, 1, 1, 1), (0, 0), (0,)])
def test_bias_gradient_of_every_broadcast(dims: tuple[int, ...]) -> None:
    """The bias's gradient sums over what it broadcasts over: batches, heads, queries, keys, missing dimensions."""
    spec = AttentionSpec(mask=masks.Causal() & masks.SlidingWindow(21), bias=True, softcap=8.0)
    tensors = (TensorInfo("bias", "float32", dims),)
    asked = problem(
        spec, batch=2, q_heads=4, kv_heads=2, sq=37, skv=50, tensors=tensors, grads=frozenset({"q", "bias"})
    )
    inputs = make_inputs(asked)
    result = check_candidate(prepared(inputs.problem, dq_block_m=32, dq_block_n=16), inputs)
    assert result.ok, result.reason


@pytest.mark.parametrize("layout", ["bhsd", "thd"])
def test_dropout_is_one_mask_forward_and_backward(layout: str) -> None:
    """Which weights stay is read off the forward pass; out and gradients are the oracle's for exactly those.

    Forward and backward run under different tiles, so the mask cannot depend on them.
    """
    spec = AttentionSpec(mask=masks.Causal(), dropout_p=0.3, layout=layout)
    packed = {"batch": 2, "total_q": 48, "total_k": 48, "sq": 30, "skv": 30} if layout == "thd" else {}
    inputs = make_inputs(problem(spec, grads=frozenset("qkv"), **packed))
    run = prepared(inputs.problem, block_m=32, block_n=16, dq_block_m=16, dq_block_n=32, dkv_block_m=32, dkv_block_n=32)
    result = check_dropout(run, inputs)
    assert result.ok, result.reason


def test_backward_repeats_bit_for_bit() -> None:
    spec = AttentionSpec(mask=masks.Causal(), deterministic=True, return_lse=True, sinks=True, bias=True)
    grads = frozenset({"q", "k", "v", "sinks", "bias"})
    inputs = make_inputs(problem(spec, batch=2, q_heads=4, kv_heads=2, dtype="bfloat16", grads=grads))
    result = check_candidate(prepared(inputs.problem), inputs)  # compares two runs where the spec says deterministic
    assert result.ok, result.reason


@pytest.mark.parametrize("window", [(2**28, 2**29 - 1), (3, 2**20), (2**29 - 1, 0)])
def test_far_offsets_do_not_overflow(window: tuple[int, int]) -> None:
    """Positions near +-2**44 see what their windows reach, which may be nothing."""
    spec = AttentionSpec(mask=masks.SlidingWindow(*window), align="offset", return_lse=True)
    inputs = make_inputs(problem(spec, batch=4))
    tensors = {"query_offset": torch.tensor([2**44, -(2**44), 2**28, -(2**20)])}
    out, lse = prepared(inputs.problem)(inputs.q, inputs.k, inputs.v, **tensors)
    exact, exact_lse = oracle(spec, inputs.q, inputs.k, inputs.v, **tensors)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


def test_a_window_longer_than_any_key_line_is_no_window() -> None:
    spec = AttentionSpec(mask=masks.SlidingWindow(2**61, 2**61), return_lse=True)
    inputs = make_inputs(problem(spec))
    out, _ = prepared(inputs.problem)(inputs.q, inputs.k, inputs.v)
    exact, _ = oracle(spec, inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    reasons = FLASH.supports(problem(spec.model_copy(update={"align": "offset"})), HARDWARE)
    assert any("offset" in reason for reason in reasons)


def test_the_recorded_operator_is_sound() -> None:
    """Schema, shapes under tracing and autograd agree with what attnreg's operator does on these kernels."""
    spec = AttentionSpec(mask=masks.Causal(), return_lse=True, sinks=True)
    asked = problem(spec, grads=frozenset("qkv"), sq=8, skv=8)
    inputs = make_inputs(asked)
    texts = (spec.model_dump_json(exclude_defaults=True), "q,k,v", "triton_flash", "{}")
    named = {"sinks": inputs.tensors["sinks"]}
    torch.library.opcheck(torch.ops.attnreg.attention.default, (inputs.q, inputs.k, inputs.v, *texts), named)


def test_compile_sees_through() -> None:
    """torch.compile traces a call without a break, and out and gradients are those of the plain call."""
    spec = AttentionSpec(mask=masks.Causal() & masks.Padding(), return_lse=True)
    inputs = make_inputs(problem(spec, grads=frozenset("qkv")))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_lengths: torch.Tensor) -> torch.Tensor:
        out, lse = attnreg.attention(spec, q * 1.0, k, v, kv_lengths=kv_lengths)
        return (out.sin() * lse.clamp(min=-5).unsqueeze(-1)).sum()

    arguments = (inputs.q, inputs.k, inputs.v, inputs.tensors["kv_lengths"])
    with attnreg.use_backend("triton_flash"):
        plain = torch.autograd.grad(step(*arguments), arguments[:3])
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        traced = torch.autograd.grad(compiled(*arguments), arguments[:3])
    for one, other in zip(plain, traced, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_torch_func_transforms() -> None:
    """torch.func.grad and vmap give what autograd and a loop give."""
    asked = problem(AttentionSpec(mask=masks.Causal()), sq=9, skv=9, traced=True)
    run = prepared(asked)
    q, k, v = torch.randn(3, 1, 2, 9, 16), torch.randn(3, 1, 1, 9, 16), torch.randn(3, 1, 1, 9, 16)
    leaf = q[0].clone().requires_grad_()
    plain = torch.autograd.grad(run(leaf, k[0], v[0]).sin().sum(), leaf)[0]
    found = torch.func.grad(lambda x: run(x, k[0], v[0]).sin().sum())(q[0])
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    mapped = torch.vmap(run)(q, k, v)
    looped = torch.stack([run(*one) for one in zip(q, k, v, strict=True)])
    torch.testing.assert_close(mapped, looped, rtol=0, atol=1e-6)


def test_a_second_derivative_is_refused_or_another_backends() -> None:
    """Kernels compute a gradient outside autograd: differentiating it is never just 0."""
    asked = problem(AttentionSpec(mask=masks.Causal()), sq=9, skv=9, grads=frozenset("q"))
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16)

    def loss(run: Any, q: torch.Tensor) -> Any:
        return run(q, k, v).pow(2).sum()

    def second(run: Any) -> torch.Tensor:
        leaf = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(run, leaf), leaf, create_graph=True)
        found: torch.Tensor = torch.autograd.grad(first.pow(2).sum(), leaf)[0]
        return found

    with pytest.raises(errors.BackendError, match=r"triton_flash: no second derivative.*use_backend\(.eager.\)"):
        second(prepared(asked))
    with attnreg.use_backend("eager"):
        exact = second(attnreg.prepare(asked.spec, q.clone().requires_grad_(), k, v))
    recorded = prepared(replace(asked, traced=True))
    torch.testing.assert_close(second(recorded), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(errors.BackendError, match="first derivative only"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: loss(recorded, q))(q).pow(2).sum())(q)
    (first,) = torch.autograd.grad(loss(recorded, leaf := q.clone().requires_grad_()), leaf)
    found = torch.vmap(torch.func.grad(lambda q: loss(recorded, q)))(torch.stack([q, q]))
    torch.testing.assert_close(found[1], first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_shows_in_float32(name: str, value: float) -> None:
    """A NaN or inf that a row attends is not finite in the result either, where it is not in the definition's."""
    asked = problem(AttentionSpec(mask=masks.Causal()), sq=4, skv=70)
    inputs = make_inputs(asked)
    given = {x: getattr(inputs, x).clone() for x in "qkv"}
    given[name][..., -1, 3] = value
    given["k" if name == "q" else "q"][..., 3].abs_()  # or a score of -inf would hide an infinite key
    exact, _ = oracle(asked.spec, **given)
    shown = ~exact.isfinite()
    assert shown[..., -1, 3].all()
    assert (~prepared(asked)(**given).isfinite() == shown).all()


def spread(axis: int, *shape: int) -> torch.Tensor:
    """float16 noise that lies 2**26 elements apart along an axis: beyond 32 bits in virtual memory, few pages held."""
    strides = [shape[-1]] * len(shape)
    strides[-1] = 1
    strides[axis] = 2**26
    held = torch.empty((shape[axis] - 1) * 2**26 + 2**20, dtype=torch.float16).as_strided(shape, strides)
    return held.copy_(torch.randn(shape))


@pytest.mark.parametrize("name", ["k", "bias"])
def test_strides_beyond_32_bits(name: str) -> None:
    """Keys, and a bias, that lie so far apart that their offsets pass 2**31 elements inside a tile."""
    spec = AttentionSpec(bias=True)
    q, v = torch.randn(1, 2, 4, 16).half(), torch.randn(1, 1, 40, 16).half()
    k = spread(2, 1, 1, 40, 16) if name == "k" else torch.randn(1, 1, 40, 16).half()
    bias = spread(3, 1, 1, 4, 40) if name == "bias" else torch.randn(1, 1, 4, 40).half()
    asked = problem(spec, sq=4, dtype="float16", tensors=(TensorInfo("bias", "float16", (1, 1, 0, 0)),))
    exact, _ = oracle(spec, q, k.contiguous(), v, bias=bias.contiguous())
    torch.testing.assert_close(prepared(asked)(q, k, v, bias=bias).double(), exact, rtol=0, atol=2e-3)


def test_a_gradient_that_no_kernel_computes_is_refused() -> None:
    asked = problem(AttentionSpec(alibi=True), grads=frozenset({"q", "alibi_slopes"}))
    assert FLASH.supports(asked, HARDWARE) == ["gradient of alibi_slopes: these kernels compute none"]


def test_versions_tell_what_changed() -> None:
    """Records of half precision stand: versions 3 and 4 changed what reads float32 or a bias."""
    plain = problem(AttentionSpec(), dtype="bfloat16")
    versions = [FLASH.version_for(p, HARDWARE) for p in (plain, problem(AttentionSpec(bias=True), dtype="bfloat16"))]
    assert [*versions, FLASH.version_for(problem(AttentionSpec()), HARDWARE)] == ["2", "4", "4"]


def test_one_feature_twice_gives_one_gradient() -> None:
    """Asking for dk alone, or dq alone, gives what asking for all gives: unwanted kernels are skipped, not needed."""
    spec = AttentionSpec(mask=masks.Causal())
    inputs = make_inputs(problem(spec, grads=frozenset("qkv")))
    whole = torch.autograd.grad(prepared(inputs.problem)(inputs.q, inputs.k, inputs.v).sum(), (inputs.q, inputs.k))
    for n, name in enumerate("qk"):
        given = {x: getattr(inputs, x).detach().requires_grad_(x == name) for x in "qkv"}
        asked = replace(inputs.problem, grads=frozenset(name))
        out = prepared(asked)(*given.values())
        torch.testing.assert_close(torch.autograd.grad(out.sum(), given[name])[0], whole[n], rtol=0, atol=0)


def test_cases_are_enough() -> None:
    """The quick table is no empty promise: it holds every feature that the backend takes."""

    def features(chosen: tuple[Case, ...]) -> set[str]:
        return {case.name.split("/")[0] for case in chosen}

    run = (*TestTritonFlash.cases, *TestTritonFlashPaged.cases)
    missing = features(TAKEN) - features(run)
    assert not missing, f"features that the backend takes and CI never runs: {sorted(missing)}"
    assert len(features(TAKEN)) > 50
