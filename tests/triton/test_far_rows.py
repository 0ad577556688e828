"""Law: rows whose bias lies far from 0 have the gradients of their definition in the Triton kernels too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnreg import AttentionSpec, Problem
from attnreg.hardware import detect
from attnreg.validate import check as checked
from attnreg_triton.block_sparse import TritonBlockSparse
from attnreg_triton.flash import TritonDecode, TritonFlash

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from far_rows import LOWEST, ROWS, Call, check

HARDWARE = detect("cpu")
NAMES = ("causal_lse_bias", "sinks", "far_sinks", "mixed", "softcap_alibi", "thd", "bfloat16_bias")


def by(backend: Any, config: dict[str, Any]) -> Any:
    def run(call: Call) -> Any:
        q, k, v = (call.leaves[n] for n in ("q", "k", "v"))
        sizes = checked(call.spec, q, k, v, call.tensors)
        problem = Problem.of(call.spec, sizes, q, k, v, call.tensors)
        assert backend.supports(problem, HARDWARE) == []
        return backend.prepare(problem, backend.space(problem, HARDWARE).check(config))(q, k, v, **call.tensors)

    return run


@pytest.mark.parametrize("backend", [TritonFlash(), TritonBlockSparse()], ids=lambda x: x.name)
@pytest.mark.parametrize("name", NAMES)
def test_far_rows(backend: Any, name: str) -> None:
    for value in (LOWEST, -1e6):
        check(by(backend, {}), ROWS[name], value)


@pytest.mark.parametrize("value", [LOWEST, -1e9, 1e9])
@pytest.mark.parametrize("splits", [1, 4])
def test_decoding_of_far_rows(value: float, splits: int) -> None:
    """Partial results of split keys are joined by their lse's, which are far too."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (2, 200, 200))
    bias = torch.zeros(1, 2, 2, 200)
    bias[:, :, 1] = value
    spec = AttentionSpec(bias=True)
    backend, tensors = TritonDecode(), {"bias": bias}
    problem = Problem.of(spec, checked(spec, q, k, v, tensors), q, k, v, tensors)
    config = backend.space(problem, HARDWARE).check({"splits": splits, "block_n": 32})
    out = backend.prepare(problem, config)(q, k, v, **tensors)
    want = (q.double() @ k.double().mT / 4 + bias.double()).float().double().softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
