"""Which compiled path a configuration is of."""

from __future__ import annotations

from collections.abc import Mapping

from attnreg import Problem
from attnreg_cpu.decode import Decode
from attnreg_cpu.gradient import Backward
from attnreg_cpu.prefill import Forward, prefill_kernels


def kernels_of(problem: Problem, config: Mapping[str, int | str | float | bool]) -> Decode | Forward | Backward:
    """The kernels of a problem, compiled or found. Those without a backward pass are also run(q, k, v, **tensors)."""
    if "kv_splits" in config:  # a configuration of decode_space
        return Decode(problem, config)
    return prefill_kernels(problem, config)
