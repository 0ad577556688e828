"""Law: memory beyond inputs and outputs does not grow with the product of the lengths."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attnreg_cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

# A process of its own, whose peak nothing else has raised; prints by how much one call grew beyond its results.
PROGRAM = """
import resource, sys
import torch
from attnreg import AttentionSpec, Problem, hardware, masks
from attnreg.validate import check
from attnreg_cpu.native import NativeBackend

length, grad = int(sys.argv[1]), sys.argv[2] == "grad"
torch.set_num_threads(2)
spec = AttentionSpec(mask=masks.Causal())
backend, cpu = NativeBackend(), hardware.detect("cpu")

def tensors(n):
    return [torch.randn(1, 1, n, 64, requires_grad=grad) for _ in range(3)]

def call(q, k, v):
    problem = Problem.of(spec, check(spec, q, k, v, {}), q, k, v, {})
    out = backend.prepare(problem, backend.space(problem, cpu).default)(q, k, v)
    if grad:
        out.backward(out.detach())
    return out

call(*tensors(300))  # code, threads and their scratch
q, k, v = tensors(length)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = call(q, k, v)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
kept = out.nbytes * (5 if grad else 1)  # grad: three gradients and a copy of the output
print(grown - kept)
"""


def _growth(length: int, mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(length), mode], capture_output=True, text=True, timeout=550, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize("mode", ["forward", "grad"])
def test_scratch_stays_small(mode: str) -> None:
    assert _growth(16384, mode) < 2 * (64 << 20) * 16384 // 131072 + (8 << 20)


@pytest.mark.slow
def test_131072_tokens_of_one_head_take_under_64_mib_a_thread() -> None:
    assert _growth(131072, "forward") < 2 * (64 << 20)
