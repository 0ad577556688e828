"""Law: rows whose bias lies at the bottom of the float range, or far from 0, have the gradients of their definition.

lse is the maximum plus the log of the sum, and float32 holds little of the second beside a large first. Weights made of
lse alone would be up to as many times too large as a row has keys.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from far_rows import LOWEST, ROWS, VALUES, Call, check, make

import attnreg
from attnreg import AttentionSpec, errors, masks
from attnreg_cpu import build

TRAINS = ("cpu", "sdpa", "eager")
LACKS: dict[str, set[str]] = {
    # The kernel that returns the lse has no gradient of the bias; sinks join by a rounded lse.
    "sdpa": {"causal_lse_bias", "sinks", "far_sinks", "softcap_alibi"},
    "cpu": set(),
    "eager": set(),
}


def by(backend: str) -> Any:
    def run(call: Call) -> Any:
        q, k, v = (call.leaves[n] for n in "qkv")
        with attnreg.use_backend(backend):
            return attnreg.attention(call.spec, q, k, v, **call.tensors)

    return run


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("backend", TRAINS)
@pytest.mark.parametrize("name", ROWS)
def test_far_rows(backend: str, name: str) -> None:
    row = ROWS[name]
    if name in LACKS[backend]:
        call = make(row, LOWEST)
        with pytest.raises(errors.UnsupportedError):
            by(backend)(call)
        return
    for value in VALUES:
        try:
            check(by(backend), row, value)
        except AssertionError as error:
            raise AssertionError(f"bias {value:g}: {error}") from error


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("backend", ["cpu", "sdpa", "eager", "flex"])
@pytest.mark.parametrize("value", [LOWEST, -1e9])
@pytest.mark.parametrize("sq", [1, 37])
def test_far_rows_without_gradients(backend: str, value: float, sq: int) -> None:
    """Forward kernels, decoding among them, which `flex` has alone on the CPU."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (sq, 45, 45))
    bias = torch.zeros(1, 2, sq, 45)
    bias[:, :, 0] = value
    want = (q.double() @ k.double().mT / 4 + bias.double()).float().double().softmax(-1) @ v.double()
    with torch.no_grad(), attnreg.use_backend(backend):
        out = attnreg.attention(AttentionSpec(bias=True), q, k, v, bias=bias)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("size", [64.0, 3e3, 1e5])
def test_large_logits_without_a_bias(size: float) -> None:
    """Rows far from 0 by q and k themselves: the weights that the backward pass makes are those of the forward pass."""
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-1, 2, (1, 2, 70, 16), generator=g).float() for _ in range(2))
    q[..., 0], k[..., 0] = math.sqrt(size), -4.0 * math.sqrt(size)
    q[..., 0] = float(2 ** round(math.log2(math.sqrt(size))))
    k[..., 0] = -4.0 * q[0, 0, 0, 0]
    v = torch.ones(1, 2, 70, 16, requires_grad=True)
    with attnreg.use_backend("cpu"):
        out = attnreg.attention(AttentionSpec(mask=masks.Causal()), q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), v)
    # Each row's weights sum to 1, so that all of them together sum to the number of rows.
    torch.testing.assert_close(grad.sum((2, 3)) / 16, torch.full((1, 2), 70.0), rtol=1e-6, atol=0)


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("value", [LOWEST, -1e9])
def test_far_rows_in_a_compiled_graph(value: float) -> None:
    """The traced operators hand the second word on; `sdpa`, which reads no value under a trace, refuses."""
    row = ROWS["causal_lse_bias"]

    def run(call: Call) -> Any:
        q, k, v = (call.leaves[n] for n in "qkv")
        spec, bias = call.spec, call.tensors["bias"]
        torch._dynamo.reset()
        step = torch.compile(lambda q, k, v, bias: attnreg.attention(spec, q, k, v, bias=bias), backend="aot_eager")
        with attnreg.use_backend("cpu"):
            return step(q, k, v, bias)

    check(run, row, value)


def test_sdpa_refuses_under_a_trace_what_it_cannot_repair() -> None:
    from dataclasses import replace

    from attnreg.hardware import detect
    from attnreg.testing import make_inputs
    from attnreg.testing.problems import cases
    from attnreg_sdpa import Sdpa

    problem = next(case.problem for case in cases() if case.name.startswith("bias_full/normal"))
    problem = make_inputs(replace(problem, grads=frozenset("qkv"))).problem
    assert Sdpa().supports(problem, detect("cpu")) == []
    (reason,) = Sdpa().supports(replace(problem, traced=True), detect("cpu"))
    assert "rounded lse" in reason
