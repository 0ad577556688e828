"""Spaces for GPUs that are not here: whatever the table asks, a backend that accepts it has a default."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from attnreg import Problem, registry, targets
from attnreg.backend import estimate_seconds
from attnreg.testing import cases

HOPPER = targets.target("sm_90")
BACKENDS = ("sdpa", "flex", "triton_flash", "triton_decode", "triton_block_sparse", "triton_fp8")


def on_gpu() -> list[Problem]:
    given = [replace(case.problem, device="cuda") for case in cases()]
    return given + [replace(problem, grads=frozenset()) for problem in given]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_case_has_a_space_an_estimate_and_a_foreseen_time(name: str) -> None:
    backend = registry.current().get(name).backend
    served = [problem for problem in on_gpu() if not backend.supports(problem, HOPPER)]
    assert served
    for problem in served:
        space = backend.space(problem, HOPPER)
        assert space.reasons(space.default) == [], problem
        assert estimate_seconds(backend, problem, HOPPER), problem
        if name.startswith("triton"):
            foreseen = backend.foresee(problem, space.default, "sm_90")  # type: ignore[attr-defined]  # optional
            assert 0 < foreseen < math.inf, problem


def test_masked_training_keeps_to_kernels_that_were_right() -> None:
    """Torch's own choice gave NaN gradients beside a dense mask in half precision on an H200."""
    backend, seen = registry.current().get("sdpa").backend, 0
    for problem in on_gpu():
        spec = problem.spec
        masked = spec.mask.tensors() or spec.bias or spec.alibi
        if masked and problem.needs_grad and problem.dtype != "float32" and not backend.supports(problem, HOPPER):
            kernels = backend.space(problem, HOPPER).choices["kernel"]
            half = problem.dtype in ("float16", "bfloat16")
            # A bias may lie at the lowest numbers, where the other kernels' lse holds no sum.
            assert tuple(kernels) == ("math",) if spec.bias else ("auto" in kernels) != half, problem
            seen += half
    assert seen


def test_no_point_of_the_space_is_one_that_triton_miscompiles() -> None:
    """On Hopper: TF32 products of 64 rows or more and 16 columns, shared by 8 warps."""
    backend = registry.current().get("triton_flash").backend
    wanted = [p for p in on_gpu() if p.dtype == "float32" and p.needs_grad and not backend.supports(p, HOPPER)]
    space = backend.space(next(p for p in wanted if p.sq >= 64 and p.head_dim == 32), HOPPER)
    forward = {name: values for name, values in space.choices.items() if not name.startswith(("dq_", "dkv_"))}
    kept = [
        point
        for values in itertools.product(*forward.values())
        if not space.reasons(point := {**space.default, **dict(zip(forward, values, strict=True))})
    ]
    assert any(p["block_m"] >= 64 and p["block_n"] == 16 and p["num_warps"] == 4 for p in kept)
    assert any(p["block_m"] >= 64 and p["block_n"] == 16 and p["precision"] == "ieee" for p in kept)
    for p in kept:
        assert p["precision"] == "ieee" or p["num_warps"] < 8 or p["block_m"] < 64 or p["block_n"] > 16, p
