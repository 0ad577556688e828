"""Which compiled path a configuration is of."""

from __future__ import annotations

from collections.abc import Mapping

from attnreg import Problem
from attnreg_cpu.decode import Decode
from attnreg_cpu.gradient import Differentiable
from attnreg_cpu.prefill import Forward, prefill_prepare


def run_of(problem: Problem, config: Mapping[str, int | str | float | bool]) -> Decode | Forward | Differentiable:
    """run(q, k, v, **tensors) for calls that are not traced. Compiles (or finds) the kernels."""
    if "kv_splits" in config:  # a configuration of decode_space
        return Decode(problem, config)
    return prefill_prepare(problem, config)
