"""A static model of the kernels' time on a target: what ranks configurations that nobody has measured.

A visit of one BLOCK_M x BLOCK_N tile of scores takes the time of four pipes: the matrix unit; issue slots and
exponentials of the softmax; shared memory; the L2 cache. c tiles in flight (resident blocks, and the warps of each, up
to 8) overlap them: `longest + (sum - longest) / c`. To that come the steps that depend on one another, hidden only by
other tiles; a reduction between warps where more of them share a row than one instruction's rows; and what the stages
leave open of the L2 cache's latency. A program adds its start and its rows; programs run in waves. The whole is never
faster than main memory, whose rate is reached only with enough bytes in flight. The constants are rates and latencies
of the architectures as public documents give them, rounded, not fits to measurements: nothing here was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
INSTRUCTIONS = 150.0
"""Instructions of a warp at each visit that do not grow with the tile: addresses, copies, barriers, loop."""
SHARED_BYTES = 128.0
"""Bytes of shared memory that a multiprocessor moves a cycle."""
L2_BYTES = 32.0
"""Bytes that a multiprocessor reads from the L2 cache a cycle while all others do: about 5 TB/s on an A100 or H100."""
FULL = 4.0
"""Tiles in flight that fill the four schedulers of a multiprocessor; more hide nothing more."""
LATENCY = 700.0
"""Cycles until a load from the L2 cache or beyond arrives; what the pipeline's stages must cover."""
STEPS = 400.0
"""Cycles of a visit's dependent steps with one tile in flight: product, maximum, exponential, product."""
REDUCE = 250.0
"""Cycles of a reduction between warps through shared memory, with its barriers."""
START = 3000.0
"""Cycles to start a program: launch, addresses, the first load from main memory."""
LISTED = 200.0
"""Cycles of a visit's wait for its entry in a list of blocks, with one tile in flight."""
LAYOUT = 1e-5
"""Seconds of a block-sparse call on the host, to find its layout."""
MEMORY_LATENCY = 1e-6
"""Seconds from a load's issue to its data, from main memory under load."""
SMALL = 0.5
"""Share of the matrix rate of sm_90 and sm_100 that the older instructions of single warps reach."""
SPILLED = 1.5
"""Factor on what is reckoned to need more registers than there are."""


@dataclass(frozen=True)
class Machine:
    """Rates of one multiprocessor, a cycle."""

    clock: float
    matrix: float
    vector: float
    exponentials: float
    rows: int
    """Rows of one matrix instruction: what reads its right operand from shared memory once."""
    warps: int
    """Warps that issue one matrix instruction together."""


def machine(problem: Problem, hardware: Hardware, precision: str = "ieee") -> Machine:
    """Rates of a target for the problem's dtype; a clock of 1.5 GHz stands for all, as only ratios matter."""
    rates = dict(hardware.rates)
    clock = 1.5e9
    wanted = "float8" if problem.spec.dtype.compute.startswith("float8") and "float8" in rates else problem.dtype
    matrix = rates.get(wanted, rates.get("bfloat16", 1e14))
    if problem.dtype == "float32" and hardware.kind == "cuda":
        # Three TF32 products make one; exact ones run outside the matrix unit.
        matrix = rates["vector"] if precision == "ieee" else matrix / (3.0 if precision == "tf32x3" else 1.0)
    vector = rates.get("vector", 2e13) / 2 / hardware.cores / clock
    # Warp groups read a right operand once for 64 rows, tensor memory for 128, the others for 16 a warp.
    rows, warps = {"sm_90": (64, 4), "sm_100": (128, 4)}.get(hardware.arch, (16, 1))
    exponentials = 16.0 if hardware.kind == "cuda" else 32.0
    return Machine(clock, matrix / hardware.cores / clock, vector, exponentials, rows, warps)


def visit_cycles(kernel: str, problem: Problem, tile: Tile, now: Machine, blocks: int, listed: bool = False) -> float:
    """Cycles of one BLOCK_M x BLOCK_N visit on a multiprocessor that holds `blocks` programs, of its share."""
    width = 1 if problem.spec.dtype.compute.startswith("float8") else 4 if problem.dtype == "float32" else 2
    head = sum(head_blocks(problem.head_dim))
    value = max(16, next_power_of_two(problem.head_dim_v))
    scores = tile.m * tile.n
    # Products of each kernel: q.k and w.v; in the backward also do.v and ds.k (and for keys both, transposed).
    columns = {"forward": head + value, "dq": 2 * head + value, "dkv": 2 * head + 2 * value}[kernel]
    held, streamed = (tile.m, tile.n) if kernel != "dkv" else (tile.n, tile.m)
    if now.warps > 1 and (tile.warps < now.warps or held < 64):
        # Too small for a warp group's instructions: those of one warp, at about half their rate.
        now = replace(now, matrix=SMALL * now.matrix, rows=16, warps=1)
    # Rows that the warps cover at once: a matrix instruction wider than the tile idles, and warps beyond the tile's
    # rows share rows: their operands are read again, and their rows are reduced between them.
    covered = now.rows * max(1, tile.warps // now.warps)
    matrix = 2.0 * scores * columns / (now.matrix * min(1.0, held / now.rows))
    vector = scores * (1.0 / now.exponentials + SOFTMAX_OPS[kernel] / now.vector)
    vector += INSTRUCTIONS * tile.warps * 32 / now.vector
    reads = max(1.0, held / now.rows if now.rows > 16 else held / (16.0 * max(1, held // covered)))
    # Operands are read for each group of rows, after they were once copied in.
    shared = (reads * columns + head + value) * streamed * width / SHARED_BYTES
    cache = streamed * (head + value) * width / L2_BYTES
    pipes = (matrix, vector, shared, cache)
    longest = max(pipes)
    flying = min(blocks * math.sqrt(max(1.0, min(tile.warps, 8) / 4)), FULL)
    shares = (REDUCE if covered > held else 0.0) + (LISTED if listed else 0.0)
    hidden = (max(tile.stages, 1) - 1) * blocks * longest
    stall = max(0.0, LATENCY - hidden) / blocks
    return longest + (sum(pipes) - longest) / flying + (STEPS + shares) / flying + stall


def kernel_seconds(name: str, problem: Problem, plan: Plan, hardware: Hardware, blocks: int) -> float:
    """Modelled seconds of one kernel with `blocks` programs resident a multiprocessor; 0 for small helpers."""
    kernel = KERNEL_TILES.get(name)
    if kernel is None:
        return 0.0
    tile = {"forward": plan.forward, "dq": plan.backward_q, "dkv": plan.backward_kv}[kernel]
    now = machine(problem, hardware, plan.precision)
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
    listed = name.startswith("block")
    cycles = visits * visit_cycles(kernel, problem, tile, now, blocks, listed)
    bytes_once = held / max(lines, 1) * (problem.head_dim + problem.head_dim_v) * 2
    per_program = cycles + START / blocks + bytes_once / L2_BYTES
    waves = programs / hardware.cores / blocks
    # Programs of unequal length fill the last wave's holes; a whole wave is lost only where there are few.
    filled = math.ceil(waves) if waves < 4 else waves + 0.5
    compute = filled * blocks * per_program / now.clock
    memory = 0.0
    if hardware.bandwidth:
        itemsize = 4 if problem.kv_dtype == "float32" else 1 if problem.kv_dtype.startswith("float8") else 2
        row = (problem.head_dim + problem.head_dim_v) * itemsize
        flying = blocks * max(tile.stages - 1, 0.5) * wide * row * min(programs, hardware.cores)
        memory = problem.bytes / hardware.bandwidth
        memory *= max(1.0, hardware.bandwidth * MEMORY_LATENCY / flying)
    merge = LAYOUT * (listed and kernel == "forward")
    if splits > 1:
        # A launch, and float32 results of each split written and read again.
        partial = 8.0 * splits * problem.batch * problem.q_heads * problem.sq * (problem.head_dim_v + 1)
        merge += 2e-6 + partial / (hardware.bandwidth or 1e12)
    # The shorter of the two hides behind the longer, but for its ends.
    return max(compute, memory) + 0.1 * min(compute, memory) + merge


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
        wanted = reckoned_registers(kernel, problem, tile, hardware)
        blocks = resident(min(wanted, most), shared_bytes(kernel, problem, tile), tile.warps, hardware)
        seconds = kernel_seconds(SPARSE[name] if sparse else name, problem, plan, hardware, blocks)
        total += seconds * (SPILLED if wanted > most else 1.0)
    return total


def reckoned_registers(kernel: str, problem: Problem, tile: Tile, hardware: Hardware) -> int:
    """Registers a thread that a tile is likely to take."""
    wanted = accumulator_registers(kernel, problem, tile, hardware.warp_size) + STATE
    if machine(problem, hardware).rows == 16 and kernel == "forward":
        # These instructions take the held rows from registers, and Triton keeps them there across the loop.
        width = 4 if problem.dtype == "float32" else 2
        wanted += tile.m * sum(head_blocks(problem.head_dim)) * width / 4 / (tile.warps * hardware.warp_size)
    return int(wanted)
