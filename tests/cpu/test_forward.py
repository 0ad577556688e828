"""Law: every native forward result lies within twice the error of the same-dtype eager computation of the oracle's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_cases import CASES, Case

from attnreg import AttentionSpec, Problem, hardware
from attnreg.testing.oracle import attend, oracle
from attnreg.testing.sequences import put_together
from attnreg.validate import check
from attnreg_cpu import build
from attnreg_cpu.native import NativeBackend

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BACKEND = NativeBackend()
CPU = hardware.detect("cpu")


def prepare(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, named: Any, **config: Any) -> Any:
    """The backend's callable for a case; the reasons why there is none fail the test."""
    problem = Problem.of(case.spec, check(case.spec, q, k, v, named), q, k, v, named)
    assert BACKEND.supports(problem, CPU) == []
    space = BACKEND.space(problem, CPU)
    offered = {name: value for name, value in config.items() if value in space.choices.get(name, ())}
    full = {**space.default, **offered}
    if space.reasons(full):
        pytest.skip(f"this CPU's space has no such point: {space.reasons(full)}")
    return BACKEND.prepare(problem, full)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference; infinities must agree, NaN is infinitely wrong."""
    got = got.double()
    same = got == exact
    return float(torch.where(same, 0.0, (got - exact).abs()).nan_to_num(nan=torch.inf).max()) if got.numel() else 0.0


def compare(case: Case, dtype: torch.dtype, **config: Any) -> None:
    q, k, v, named = case.draw(dtype)
    out, lse = prepare(case, q, k, v, named, **config)(q, k, v, **named)
    exact_out, exact_lse = oracle(case.spec, q, k, v, **named)
    plain = [(p.out, p.lse) for p in attend(case.spec, q, k, v, named, dtype=dtype)]
    plain_out, plain_lse = put_together(case.spec.layout, q, plain, case.dim_v)
    assert out.shape == exact_out.shape
    assert out.dtype == dtype
    assert lse.shape == exact_lse.shape
    assert lse.dtype == torch.float32
    assert error(out, exact_out) <= 2 * error(plain_out, exact_out) + FLOOR[dtype]
    assert error(lse, exact_lse) <= 2 * error(plain_lse, exact_lse) + 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.parametrize("config", [
    {"vectors": 1, "tiles": 1, "block_kv": 32, "pack": "all", "layout_q": 32, "layout_kv": 32},
    {"vectors": 3, "tiles": 2, "block_kv": 128, "layout_q": 96, "layout_kv": 128},
    {"vectors": 2, "tiles": 4, "block_kv": 64, "pack": "values", "layout_q": 32, "layout_kv": 64},
    {"vectors": 4, "tiles": 8, "block_kv": 128, "product": "fma"},
    {"vectors": 3, "product": "dot"},
    {"vectors": 2, "tiles": 16, "block_kv": 256, "product": "amx_bf16x3"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("case", [c for c in CASES if c.dim == 64], ids=str)
def test_every_configuration_gives_the_same(case: Case, config: dict[str, Any]) -> None:
    compare(case, torch.bfloat16 if config.get("product") in ("fma", "dot") else torch.float32, **config)


@pytest.mark.parametrize(("heads", "rows"), [(1, 80), (32, 1), (3, 1)], ids=str)
def test_long_sums_are_as_exact_as_eager(heads: int, rows: int) -> None:
    """65,536 keys whose values do not cancel: in one running sum float32 would lose ten times as much."""
    g = torch.Generator().manual_seed(8)
    q = torch.randn(1, heads, rows, 64, generator=g)
    k, v = torch.randn(1, 1, 65536, 64, generator=g), torch.randn(1, 1, 65536, 64, generator=g) + 1
    case = Case("long", AttentionSpec(return_lse=True))
    out, lse = prepare(case, q, k, v, {})(q, k, v)
    exact_out, exact_lse = oracle(case.spec, q, k, v)
    ((plain_out, plain_lse),) = [(p.out, p.lse) for p in attend(case.spec, q, k, v, {}, dtype=torch.float32)]
    assert error(out, exact_out) <= 2 * error(plain_out, exact_out) + FLOOR[torch.float32]
    assert error(lse, exact_lse) <= 2 * error(plain_lse, exact_lse) + 4e-6
