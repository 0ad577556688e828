"""Law: every native gradient lies within three times the error of the same-dtype eager gradient of the oracle's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_cases import CASES, Case
from test_forward import error, prepare

from attnreg.testing.oracle import attend, oracle
from attnreg.testing.sequences import put_together
from attnreg_cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

FLOOR = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
UNPAGED = [case for case in CASES if not case.pages]


def compare(case: Case, dtype: torch.dtype, *, through_lse: bool, **config: Any) -> None:
    q, k, v, named = case.draw(dtype)
    trained = [named[n].requires_grad_() for n in ("bias", "sinks", "score_weight") if n in named]
    leaves = [x.requires_grad_() for x in (q, k, v)] + trained
    out, lse = prepare(case, q, k, v, named, **config)(q, k, v, **named)
    g = torch.Generator().manual_seed(9)
    d_out = torch.randn(out.shape, generator=g).to(dtype)
    d_lse = torch.where(lse == -torch.inf, 0.0, torch.randn(lse.shape, generator=g)) * through_lse

    def gradients(of: Any) -> list[torch.Tensor]:
        got_out, got_lse = of
        total = (got_out.double() * d_out.double()).sum()
        if through_lse:
            total = total + (torch.where(d_lse == 0, 0.0, got_lse.double()) * d_lse.double()).sum()
        return list(torch.autograd.grad(total, leaves))

    exact = gradients(oracle(case.spec, q, k, v, **named))
    parts = [(p.out, p.lse) for p in attend(case.spec, q, k, v, named, dtype=dtype)]
    plain = gradients(put_together(case.spec.layout, q, parts, case.dim_v))
    for name, got, eager, want in zip(
        ("q", "k", "v", "more", "more"), gradients((out, lse)), plain, exact, strict=False
    ):
        assert got.shape == want.shape
        want = want.double()
        scale = max(1.0, float(want.abs().max()))
        assert error(got, want) <= 3 * error(eager, want) + FLOOR[dtype] * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", UNPAGED, ids=str)
def test_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, through_lse=False)


@pytest.mark.parametrize("case", UNPAGED, ids=str)
def test_gradients_through_lse(case: Case) -> None:
    compare(case, torch.float32, through_lse=True)


@pytest.mark.parametrize("config", [
    {"vectors": 1, "tiles": 1, "block_kv": 32, "pack": "all", "layout_q": 32, "layout_kv": 32},
    {"vectors": 4, "tiles": 2, "block_kv": 128},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("case", [c for c in UNPAGED if c.dim == 64], ids=str)
def test_every_configuration_has_the_same_gradients(case: Case, config: dict[str, Any]) -> None:
    compare(case, torch.float32, through_lse=True, **config)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gradients_repeat_bit_for_bit(threads: int) -> None:
    case = next(c for c in CASES if c.name == "mqa_wide_values")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(3):
            q, k, v, named = case.draw(torch.float32)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out, lse = prepare(case, q, k, v, named)(q, k, v, **named)
            runs.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
