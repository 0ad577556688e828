"""The quick interpreter computes what Triton's own does, bit for bit, searches less, and finds overflows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from quick_interpreter import quick

from attnreg import AttentionSpec, Problem, masks
from attnreg.hardware import detect
from attnreg.testing import make_inputs
from attnreg_triton.flash import TritonFlash


def test_the_same_bits_with_fewer_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    searches: list[str] = []
    own = inspect.unwrap(interpreter._patch_lang)  # what stands below the fixture of these tests

    def counted(fn: Callable[..., Any]) -> Any:
        searches.append(fn.__name__)
        return own(fn)

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    sizes: dict[str, Any] = {"head_dim": 16, "head_dim_k": 16, "head_dim_v": 16, "grads": frozenset("qkv")}
    spec = AttentionSpec(mask=masks.Causal() & masks.SlidingWindow(30), softcap=8.0, return_lse=True)
    inputs = make_inputs(Problem(spec, 1, 2, 1, 40, 40, dtype="bfloat16", kv_dtype="bfloat16", square=True, **sizes))
    backend = TritonFlash()
    run = backend.prepare(inputs.problem, backend.space(inputs.problem, detect("cpu")).default)

    def results() -> tuple[int, list[torch.Tensor]]:
        searches.clear()
        out, lse = run(inputs.q, inputs.k, inputs.v)
        grads = torch.autograd.grad([out.float().sum() + lse.sum()], [inputs.q, inputs.k, inputs.v])
        return len(searches), [out, lse, *grads]

    many, plain = results()
    with quick():
        few, same = results()
    for one, other in zip(plain, same, strict=True):
        assert torch.equal(one, other)
    assert few < many / 20


@triton.jit
def index_kernel(target, base, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # device code
    at = tl.arange(0, BLOCK)
    tl.store(target + at, (base + at * step > 0).to(tl.int32))


@pytest.mark.parametrize(("base", "step", "words"), [(1, 7, ""), (2**31 - 3, 1, "add of int32"), (1, 2**30, "mul of")])
def test_an_overflow_is_found(base: int, step: int, words: str) -> None:
    target = torch.zeros(16, dtype=torch.int32)
    if words:
        with pytest.raises(Exception, match=words):
            index_kernel[(1,)](target, base, step, BLOCK=16)
    else:
        index_kernel[(1,)](target, base, step, BLOCK=16)
        assert target.all()
