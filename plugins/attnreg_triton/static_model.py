"""A static model of the kernels' time on a target: what ranks configurations that nobody has measured.

One multiprocessor visits one tile of scores in the time of four pipes: the matrix unit, the exponentials and other
float32 work of the softmax, shared memory, and the L2 cache. Pipes overlap as far as there are other warps or stages
to fill them: with c concurrent tiles a visit takes `longest + (sum - longest) / c`. A program adds the load of its
rows and the store of its result; programs run in waves. The constants are rates of the architectures as their vendors
document them, not fits to measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnreg import Hardware, Problem

from .flash_space import accumulator_registers, shared_bytes
from .launch import head_blocks, next_power_of_two
from .plan import Plan, Tile

KERNEL_TILES = {
    "forward_kernel": "forward",
    "block_forward_kernel": "forward",
    "fp8_forward_kernel": "forward",
    "backward_q_kernel": "dq",
    "block_q_kernel": "dq",
    "backward_kv_kernel": "dkv",
    "block_kv_kernel": "dkv",
}
FORWARD, DQ, DKV = ("forward_kernel", "backward_q_kernel", "backward_kv_kernel")
SPARSE = {FORWARD: "block_forward_kernel", DQ: "block_q_kernel", DKV: "block_kv_kernel"}
RESERVED = 1024
"""Bytes of shared memory that CUDA keeps for itself in each resident block."""
STATE = 56
"""Registers a thread besides accumulators and scores, where no compiler was asked: addresses, masks, loop state."""
SOFTMAX_OPS = {"forward": 7.0, "dq": 9.0, "dkv": 9.0}
"""float32 instructions a score besides its exponential: scale, maximum, subtract, sum, convert, rescale, gradient."""
SHARED_BYTES = 128.0
"""Bytes of shared memory that a multiprocessor moves a cycle."""
L2_BYTES = 48.0
"""Bytes that a multiprocessor reads from the L2 cache a cycle."""
ISSUE = 400.0
"""Cycles of a visit that no other pipe hides with one tile in flight: barriers and the latency of dependent steps."""
START = 3000.0
"""Cycles to start a program: launch, addresses, the first load from main memory."""


@dataclass(frozen=True)
class Machine:
    """Rates of one multiprocessor, a cycle."""

    clock: float
    matrix: float
    vector: float
    exponentials: float
    rows: int
    """Rows of one matrix instruction: what reads its right operand from shared memory once."""


def machine(problem: Problem, hardware: Hardware) -> Machine:
    """Rates of a target for the problem's dtype; a clock of 1.5 GHz stands for all, as only ratios matter."""
    rates = dict(hardware.rates)
    clock = 1.5e9
    wanted = "float8" if problem.spec.dtype.compute.startswith("float8") and "float8" in rates else problem.dtype
    matrix = rates.get(wanted, rates.get("bfloat16", 1e14)) / hardware.cores / clock
    vector = rates.get("vector", 2e13) / 2 / hardware.cores / clock
    fast = hardware.arch in ("sm_90", "sm_100")
    # Warp-group instructions and tensor memory read a right operand once for 64 and 128 rows, others for 16 a warp.
    rows = (64 if hardware.arch == "sm_90" else 128) if fast else 16
    return Machine(clock, matrix, vector, 16.0 if hardware.kind == "cuda" else 32.0, rows)


def visit_cycles(kernel: str, problem: Problem, tile: Tile, now: Machine, blocks: int) -> float:
    """Cycles of one BLOCK_M x BLOCK_N visit on a multiprocessor that holds `blocks` programs, of its share."""
    width = 1 if problem.spec.dtype.compute.startswith("float8") else 4 if problem.dtype == "float32" else 2
    head = sum(head_blocks(problem.head_dim))
    value = max(16, next_power_of_two(problem.head_dim_v))
    scores = tile.m * tile.n
    # Products of each kernel: q.k and w.v; in the backward also do.v and ds.k (and for keys both, transposed).
    columns = {"forward": head + value, "dq": 2 * head + value, "dkv": 2 * head + 2 * value}[kernel]
    held, streamed = (tile.m, tile.n) if kernel != "dkv" else (tile.n, tile.m)
    # A matrix instruction wider than the warps' rows idles.
    used = min(1.0, held / min(now.rows * (tile.warps / 4 if now.rows == 64 else 1), 128)) if now.rows > 16 else 1.0
    matrix = 2.0 * scores * columns / (now.matrix * used)
    vector = scores * (1.0 / now.exponentials + SOFTMAX_OPS[kernel] / now.vector)
    reads = max(1.0, held / (now.rows if now.rows > 16 else 16 * max(1, held // (16 * tile.warps))))
    shared = reads * streamed * columns * width / SHARED_BYTES
    cache = streamed * (head + value) * width / L2_BYTES
    pipes = (matrix, vector, shared, cache)
    stages = 1.0 + 0.5 * min(max(tile.stages - 1, 0), 2)
    concurrent = blocks * stages * math.sqrt(max(1.0, tile.warps / 4))
    longest = max(pipes)
    return longest + (sum(pipes) - longest) / concurrent + ISSUE / concurrent


def kernel_seconds(name: str, problem: Problem, plan: Plan, hardware: Hardware, blocks: int) -> float:
    """Modelled seconds of one kernel with `blocks` programs resident a multiprocessor; 0 for small helpers."""
    kernel = KERNEL_TILES.get(name)
    if kernel is None:
        return 0.0
    tile = {"forward": plan.forward, "dq": plan.backward_q, "dkv": plan.backward_kv}[kernel]
    now = machine(problem, hardware)
    packed = problem.group if not name.startswith(("block", "fp8")) else 1
    heads = problem.q_heads // packed
    rows, keys = problem.sq * packed, problem.skv
    splits = plan.splits if kernel == "forward" else 1
    held, streamed = (rows, keys) if kernel != "dkv" else (keys, rows)
    long, wide = (tile.m, tile.n) if kernel != "dkv" else (tile.n, tile.m)
    lines = math.ceil(max(held, 1) / long)
    programs = lines * heads * max(problem.batch, 1) * splits
    # Tiles that a program visits: its share of live pairs, and a ragged edge at each end of its line.
    live = min(1.0, problem.density)
    visits = live * streamed / wide + (0.5 * (1.0 + long / wide / max(packed, 1)) if live < 1 else 0.0)
    visits = max(1.0, min(visits, math.ceil(streamed / wide)) / splits)
    blocks = min(blocks, max(1, math.ceil(programs / hardware.cores)))
    cycles = visits * visit_cycles(kernel, problem, tile, now, blocks)
    bytes_once = held / max(lines, 1) * (problem.head_dim + problem.head_dim_v) * 2
    per_program = cycles + START / blocks + bytes_once / L2_BYTES
    waves = programs / hardware.cores / blocks
    # Programs of unequal length fill the last wave's holes; a whole wave is lost only where there are few.
    filled = math.ceil(waves) if waves < 4 else waves + 0.5
    compute = filled * blocks * per_program / now.clock
    traffic = problem.bytes / hardware.bandwidth if hardware.bandwidth else 0.0
    merge = 2e-6 * (splits > 1)
    return max(compute, traffic) + merge


def resident(registers: int, shared: int, warps: int, hardware: Hardware) -> int:
    """Blocks that one multiprocessor holds at once: by registers a thread, shared bytes and threads; at least 1."""
    threads = warps * hardware.warp_size
    limits = []
    if registers:
        # Registers are handed out in eights a thread.
        limits.append(hardware.registers // (-(-registers // 8) * 8 * threads))
    if shared:
        reserved = RESERVED if hardware.kind == "cuda" else 0
        limits.append((hardware.shared_memory + reserved) // (shared + reserved))
    if hardware.threads:
        limits.append(hardware.threads // threads)
    return max(1, min(limits, default=1))


def foresee(problem: Problem, plan: Plan, hardware: Hardware, *, sparse: bool = False) -> float:
    """Modelled seconds of a plan's kernels before anything is compiled: registers and shared memory are reckoned."""
    total = 0.0
    most = 255 if hardware.kind == "cuda" or hardware.warp_size == 32 else 512
    for name in (FORWARD, DQ, DKV) if problem.needs_grad else (FORWARD,):
        kernel = KERNEL_TILES[name]
        tile = {"forward": plan.forward, "dq": plan.backward_q, "dkv": plan.backward_kv}[kernel]
        wanted = int(accumulator_registers(kernel, problem, tile, hardware.warp_size)) + STATE
        blocks = resident(min(wanted, most), shared_bytes(kernel, problem, tile), tile.warps, hardware)
        total += kernel_seconds(SPARSE[name] if sparse else name, problem, plan, hardware, blocks)
    return total
