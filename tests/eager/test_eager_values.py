"""The eager backend equals dense float64 attention, forward and backward, in one tile and in many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_cases import CASES, Case, lse, make
from eager_reference import dense
from torch import Tensor

from attnreg import AttentionSpec, Problem
from attnreg.hardware import detect
from attnreg.validate import check
from attnreg_eager import plan, run
from attnreg_eager.backend import Eager


def attend(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, t: dict[str, Any]) -> Any:
    """Validate and run, as the dispatcher does."""
    problem = Problem.of(spec, check(spec, q, k, v, t), q, k, v, t)
    backend = Eager()
    assert backend.supports(problem, detect()) == []
    return backend.prepare(problem, backend.space(problem, detect()).default)(q, k, v, **t)


def unrounded(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, t: dict[str, Any]) -> Any:
    """The same before lse is rounded to the float32 that the contract pins."""
    attend(spec, q, k, v, t)
    return run.exact(spec, q, k, v, t)


def leaves(*named: Any) -> list[Tensor]:
    return [
        x.requires_grad_()
        for x in named
        if isinstance(x, Tensor) and x.dtype.is_floating_point and x.dtype.itemsize > 1
    ]


def both(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(out, lse, gradients...) of eager, in `dtype`, and of the reference, for the same random cotangents."""
    spec = lse(case.spec)
    results = []
    for function in (unrounded if dtype == torch.float64 and not case.float8 else attend, dense):
        q, k, v, t = make(case, dtype)
        if function is dense:  # the same values, but gradients that add up in float64
            q, k, v = (x.double() if x.dtype.itemsize > 1 else x for x in (q, k, v))
            t = {name: x.double() if x.dtype == dtype else x for name, x in t.items()}
        xs = leaves(q, k, v, *(t.get(name) for name in ("bias", "sinks", "score_weight", "alibi_slopes")))
        out, l = function(spec, q, k, v, t)  # noqa: E741  # lse is the name of the helper that asks for it
        g = torch.Generator().manual_seed(1)
        do = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype).double()
        dl = torch.randn(l.shape, generator=g, dtype=torch.float64)
        loss = (out.double() * do).sum() + (torch.where(l == -torch.inf, 0.0, l).double() * dl).sum()
        grads = torch.autograd.grad(loss, xs, allow_unused=True) if loss.requires_grad else []
        grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(xs, grads, strict=False)]
        results.append([out.detach(), l.detach(), *grads])
    return results[0], results[1]


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert not got.isnan().any()
    dead = want.isneginf()
    assert torch.equal(got.isneginf(), dead)
    error = (got.double() - want.double()).masked_fill(dead, 0).abs()
    assert (error <= tolerance * (1 + want.double().masked_fill(dead, 0).abs())).all(), float(error.max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case: Case) -> None:
    got, want = both(case, torch.float64)
    # fp8 q comes out as bfloat16; everything else keeps float64 all the way.
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        close(x, y, (1e-2 if n == 0 else 1e-5) if case.float8 else 1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile sizes change nothing but rounding."""
    monkeypatch.setattr(plan, "BUDGET", 300)
    monkeypatch.setattr(plan, "UPCAST", 700)
    test_float64(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.float8], ids=str)
def test_narrow(case: Case, dtype: torch.dtype) -> None:
    """Half precision is computed in float32: what remains is float32's error and the rounding of the result."""
    got, want = both(case, dtype)
    assert got[0].dtype == dtype
    tolerance = 4e-3 if case.spec.bias else 5e-5  # a bias of 1e4 leaves float32 scores 1e-3 of resolution
    assert got[1].dtype == torch.float32
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        close(x, y, tolerance + (0.0 if n == 1 else torch.finfo(dtype).eps))


def test_at_once_equals_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sync-free form of packed sequences, which captures use, says the same."""
    monkeypatch.setattr(run, "traced", lambda *xs: True)
    for case in CASES:
        test_float64(case)
