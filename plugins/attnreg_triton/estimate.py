"""What a call of the kernels takes, roughly, where nobody has measured: from live pairs, bytes, and rates once seen.

Rates are those of an H200 (2026-11, torch 2.11, Triton 3.6; docs/gpu.md), a multiprocessor; other architectures by the
same factors that torch's own kernels are estimated with. They rank backends and nothing else.
"""

from __future__ import annotations

from attnreg import Hardware, Problem

DENSE = ((64, 2.75e12), (128, 3.5e12), (576, 1.5e12))
"""(largest head, flops a second of one multiprocessor): causal 4,096 in bfloat16; at 256, a window with softcap."""
SPARSE = 0.9e12
"""The same of lists that leave out most blocks, where partial blocks and short lists cost: BigBird and Longformer."""
BLOCKS = 0.7
"""Of the dense rate, where the lists leave out little: query heads of a group are not packed."""
TRAINING = 0.7
"""Of the forward's rate, over forward and backward."""
SCALE = {"sm_80": 0.4, "sm_90": 1.0, "sm_100": 2.0}
SINGLE = 1 / 20
"""float32 against half precision: products in three TF32 parts."""
CALL = 20e-6
EDGE = 64
"""Blocks at the edge of a mask are computed whole: so many more keys a row, at most."""
INTERPRETED = 1e6
ROWS = 64
"""Rows of a tile: a grid of few tiles leaves multiprocessors idle."""


def seconds(problem: Problem, hardware: Hardware, sparse: bool, splits: bool) -> float:
    """Seconds of a call, gradients included. sparse: by lists of blocks; splits: the keys are cut over the grid."""
    if problem.device == "cpu":
        return CALL + problem.flops / INTERPRETED
    head = max(problem.head_dim, problem.head_dim_v)
    rate = next((rate for most, rate in DENSE if head <= most), DENSE[-1][1]) * SCALE.get(hardware.arch, 0.3)
    if sparse:
        rate = min(rate, SPARSE * SCALE.get(hardware.arch, 0.3)) if problem.density < 0.5 else rate * BLOCKS
    if problem.dtype == "float32":
        rate *= SINGLE
    if problem.needs_grad:
        rate *= TRAINING
    edges = 1 + EDGE / max(problem.density * problem.skv, EDGE)
    tiles = -(-problem.sq * (1 if sparse else problem.group) // ROWS) * problem.sequences
    tiles *= problem.q_heads if sparse else problem.kv_heads
    busy = 1.0 if splits else min(1.0, max(tiles, 1) / max(hardware.cores, 1))
    bandwidth = hardware.bandwidth or 1e12
    return CALL + (problem.flops * edges / (rate * max(hardware.cores, 1)) + problem.bytes / bandwidth) / busy
