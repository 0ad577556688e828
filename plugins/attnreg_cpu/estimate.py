"""Seconds that the native kernels should take: what ranks them where nobody has measured."""

from __future__ import annotations

from attnreg import Hardware, Problem, blocks, scores
from attnreg_cpu.product import products_of
from attnreg_cpu.tuning_space import lanes_of

CALL = 8e-6
# Floating-point operations a second of one core with 16 float32 lanes: 220e9 were measured on a Zen 5 at head_dim 64
# (its FMA units give 260e9), 110e9 with 8 lanes.
RATE_A_LANE = 12e9
TANH = 24.0  # what a channel of the additive score costs, in multiply-adds (0.6 ns a core with 8 lanes)
BANDWIDTH_A_CORE = 16e9  # two cores read 28 to 50e9 together where that was measured


def estimate(problem: Problem, hardware: Hardware, decodes: bool) -> float:
    """Live pairs at the rate of the products, or keys and values once at memory speed, whichever takes longer."""
    spec = problem.spec
    offset = 0 if spec.align == "top_left" else None
    live = blocks.live_pairs(spec.mask, spec.sparsity, problem.sq, problem.skv, offset=offset)
    # Blocks at the edge of the pattern are computed whole.
    pairs = min(live.count + 48 * min(problem.sq, problem.skv), problem.sq * problem.skv)
    width = problem.head_dim + problem.head_dim_v
    a_pair = problem.head_dim * (TANH if isinstance(spec.score, scores.Additive) else 1) + problem.head_dim_v
    flops = 2 * pairs * problem.batch * problem.q_heads * a_pair
    size = {"float32": 4, "float16": 2, "bfloat16": 2}.get(problem.kv_dtype, 1)
    moved = problem.batch * problem.kv_heads * live.keys * width * size
    rate = RATE_A_LANE * lanes_of(hardware) * hardware.cores
    if not isinstance(spec.score, scores.Additive):
        rate *= {"amx": 2.3, "dot": 1.5}.get(products_of(problem.dtype, hardware)[0], 1.0)
    if spec.softcap or spec.alibi or spec.bias or "attn_mask" in spec.tensors():
        rate /= 1.4
    if decodes and problem.sq * problem.group <= 2 * lanes_of(hardware):
        rate /= 2  # a few rows fill no register tile
    bandwidth = hardware.bandwidth or BANDWIDTH_A_CORE * min(hardware.cores, 8)
    return CALL + (3.5 if problem.needs_grad else 1.0) * max(flops / rate, moved / bandwidth)
