"""Search spaces of the flash and decode kernels: choices, what cannot fit, known-good seeds, and the split heuristic.

Names: `block_m`, `block_n`, `num_warps`, `num_stages` for the forward kernel, prefixed `dq_` and `dkv_` for the
backward kernels. Sources of the seeds: published tuned choices of the Triton, FlashAttention and vLLM projects where
they exist, otherwise tiles that cross-compile without spills for the architecture (`attnreg targets`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnreg import Hardware, Problem, SearchSpace

from .flash_seeds import TileTuple, backward_tiles, forward_tiles, product_precisions, seed_precision
from .launch import head_blocks, next_power_of_two
from .plan import ConfigValue, Tile

Config = Mapping[str, ConfigValue]
Constraint = tuple[str, Callable[[Config], bool]]
FIELDS = ("block_m", "block_n", "num_warps", "num_stages")
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REGISTERS = 232
"""32-bit registers a thread that tiles may take: 255 less what addresses, masks and loop state need."""


def tile_config(prefix: str, tile: TileTuple) -> dict[str, ConfigValue]:
    """A (m, n, warps, stages) tile under its configuration names."""
    return {prefix + name: value for name, value in zip(FIELDS, tile, strict=True)}


def read_tile(config: Config, prefix: str) -> Tile:
    """The tile that a configuration names, waves per EU included."""
    m, n, warps, stages = (int(config[prefix + name]) for name in FIELDS)
    return Tile(m, n, warps, stages, int(config.get("waves_per_eu", 0)))


def plan_fields(config: Config) -> dict[str, Any]:
    """The fields of a Plan that a configuration decides; the backward tiles stay at the default where it has none."""
    out: dict[str, Any] = {"forward": read_tile(config, ""), "splits": int(config.get("splits", 1))}
    if "precision" in config:
        out["precision"] = str(config["precision"])
    if "dq_block_m" in config:
        out |= {"backward_q": read_tile(config, "dq_"), "backward_kv": read_tile(config, "dkv_")}
    return out


def _choices(prefix: str, problem: Problem, kernel: str) -> dict[str, Sequence[ConfigValue]]:
    """Tile choices of one kernel; a tile much longer than the sequence is never better than a shorter one."""
    rows = next_power_of_two(max(problem.sq, 1) * problem.group)
    keys = next_power_of_two(max(problem.skv, 1))
    block_m = [m for m in (16, 32, 64, 128) if m <= max(16, rows)]
    block_n = [n for n in (16, 32, 64, 128) if n <= max(16, keys)]
    return {
        f"{prefix}block_m": block_m,
        f"{prefix}block_n": block_n,
        f"{prefix}num_warps": (1, 2, 4, 8) if kernel == "decode" else (2, 4, 8, 16),
        f"{prefix}num_stages": (1, 2, 3, 4, 5),
    }


def shared_bytes(kernel: str, problem: Problem, tile: Tile) -> int:
    """Shared memory of a kernel, bytes: pipelined tiles a stage, tiles that stay, as the compiler lays them out."""
    width = 4 if problem.dtype == "float32" else 2
    head = sum(head_blocks(problem.head_dim))
    value = max(16, next_power_of_two(problem.head_dim_v))
    held, streamed = (tile.m, tile.n) if kernel != "dkv" else (tile.n, tile.m)
    stages = max(tile.stages - 1, 1) if tile.stages > 1 else 1
    kept = held * head if kernel == "forward" else held * (head + value)
    return width * (stages * streamed * (head + value) + kept)


def accumulator_registers(kernel: str, problem: Problem, tile: Tile, warp_size: int) -> float:
    """32-bit registers a thread for accumulators and score tiles, which live across the loop."""
    head = sum(head_blocks(problem.head_dim))
    value = max(16, next_power_of_two(problem.head_dim_v))
    scores = tile.m * tile.n
    total = {
        "forward": tile.m * value + 1.5 * scores,
        "dq": tile.m * head + 2.5 * scores,
        "dkv": tile.n * (head + value) + 2.5 * scores,
    }[kernel]
    return total / (tile.warps * warp_size)


def miscompiled(kernel: str, problem: Problem, tile: Tile, precision: str) -> bool:
    """Does Triton's compiler make a wrong kernel of a float32 tile for Hopper?

    Seen on an H200 with Triton 3.6: products in TF32 parts of 64 x 16, made by 8 warps, load operands from behind their
    shared memory (compute-sanitizer), which ends in wrong sums or an illegal access. 4 warps, 32 columns, 32 rows,
    half precision and exact products were right.
    """
    if not precision.startswith("tf32") or tile.warps < 8:
        return False
    value = max(16, next_power_of_two(problem.head_dim_v))
    block, tail = head_blocks(problem.head_dim)
    rows, columns = (tile.n, tile.m) if kernel == "dkv" else (tile.m, tile.n)
    return rows >= 64 and min(columns, value, tail or block) <= 16


def tile_rules(kernel: str, problem: Problem, hardware: Hardware, read: Callable[[Config], Tile]) -> list[Constraint]:
    """What drops a kernel's tile, which `read` reads off a configuration: one that is compiled wrongly or cannot fit.

    The rules of size are generous; the compiler has the last word.
    """
    if problem.device == "cpu":
        return []
    warp = hardware.warp_size or 32
    limit = hardware.shared_memory
    registers = REGISTERS if hardware.kind == "cuda" else 2 * REGISTERS

    def fits_registers(config: Config) -> bool:
        return accumulator_registers(kernel, problem, read(config), warp) <= registers

    def fits_shared(config: Config) -> bool:
        return shared_bytes(kernel, problem, read(config)) <= limit

    def compiles_right(config: Config) -> bool:
        return not miscompiled(kernel, problem, read(config), str(config.get("precision", "")))

    out: list[Constraint] = [
        (f"{kernel}: accumulators and scores take at most {registers} registers a thread", fits_registers)
    ]
    if hardware.arch.startswith("sm_9") and problem.dtype == "float32":
        text = "no TF32 product of 64 rows or more and 16 columns is shared by 8 warps or more: it reads astray"
        out.append((f"{kernel}: {text}", compiles_right))
    if limit:
        out.append((f"{kernel}: tiles and stages fit {limit} bytes of shared memory", fits_shared))
    return out


def _constraints(kernel: str, prefix: str, problem: Problem, hardware: Hardware) -> list[Constraint]:
    return tile_rules(kernel, problem, hardware, lambda config: read_tile(config, prefix))


def _extra_choices(problem: Problem, hardware: Hardware) -> dict[str, Sequence[ConfigValue]]:
    out: dict[str, Sequence[ConfigValue]] = {}
    if problem.dtype == "float32":
        out["precision"] = product_precisions(hardware)
    if hardware.kind == "hip":
        out["waves_per_eu"] = (0, 1, 2, 3)
    return out


def _seeds(
    tiles: Sequence[dict[str, ConfigValue]], choices: Mapping[str, Sequence[ConfigValue]]
) -> list[dict[str, ConfigValue]]:
    """Seeds cut to the choices: a tile longer than a short sequence becomes the longest that is offered."""
    out: list[dict[str, ConfigValue]] = []
    for tile in tiles:
        seed: dict[str, ConfigValue] = {}
        for name, values in choices.items():
            wanted = tile.get(name, values[0])
            below = [v for v in values if not isinstance(v, str) and not isinstance(wanted, str) and v <= wanted]
            seed[name] = wanted if wanted in values else max(below, default=values[0])
        if seed not in out:
            out.append(seed)
    return out


def _space(
    choices: dict[str, Sequence[ConfigValue]], constraints: list[Constraint], seeds: list[dict[str, ConfigValue]]
) -> SearchSpace:
    valid = [seed for seed in seeds if all(holds(seed) for _, holds in constraints)]
    if not valid:
        # No seed fits this head on this hardware: the first point that does, smallest tiles first.
        smallest = {name: values[0] for name, values in choices.items()}
        constraints = [(text, holds) for text, holds in constraints if holds(smallest)]
        valid = [smallest]
    return SearchSpace(choices=choices, default=valid[0], constraints=constraints, seeds=valid)


def flash_space(problem: Problem, hardware: Hardware) -> SearchSpace:
    """Tiles of the forward kernel and, where gradients are needed, of the backward kernels."""
    choices = _choices("", problem, "forward")
    constraints = _constraints("forward", "", problem, hardware)
    seeds = [tile_config("", tile) for tile in forward_tiles(problem, hardware)]
    if problem.needs_grad:
        choices |= _choices("dq_", problem, "dq") | _choices("dkv_", problem, "dkv")
        constraints += _constraints("dq", "dq_", problem, hardware)
        constraints += _constraints("dkv", "dkv_", problem, hardware)
        pairs = backward_tiles(problem, hardware)
        count = max(len(seeds), len(pairs))
        seeds = [
            seeds[min(n, len(seeds) - 1)]
            | tile_config("dq_", pairs[min(n, len(pairs) - 1)][0])
            | tile_config("dkv_", pairs[min(n, len(pairs) - 1)][1])
            for n in range(count)
        ]
    choices |= _extra_choices(problem, hardware)
    precision = seed_precision(problem, hardware)
    if precision is not None:
        seeds = [seed | {"precision": precision} for seed in seeds]
    return _space(choices, constraints, _seeds(seeds, choices))


def split_seed(programs: int, key_tiles: int, cores: int) -> int:
    """Smallest split count that fills waves to 85% of the best fill (the rule of FlashAttention's split-KV).

    A fill is the share of busy cores over all waves: `programs * splits / cores` rounded up to whole waves.
    """
    if cores < 1 or programs < 1 or programs >= 0.8 * cores:
        return 1
    offered = [s for s in SPLITS if s <= min(cores, max(key_tiles, 1))]
    fills = {s: programs * s / cores / math.ceil(programs * s / cores) for s in offered}
    best = max(fills.values())
    return next(s for s in offered if fills[s] >= 0.85 * best)


def decode_space(problem: Problem, hardware: Hardware) -> SearchSpace:
    """Tiles of the split forward kernel, and splits."""
    choices = _choices("", problem, "decode")
    rows = max(problem.sq, 1) * problem.group
    choices["block_m"] = [m for m in (16, 32, 64) if m <= max(16, next_power_of_two(rows))]
    choices["splits"] = [s for s in SPLITS if s <= max(1, -(-problem.skv // 16))]
    choices |= _extra_choices(problem, hardware)
    seeds: list[dict[str, ConfigValue]] = []
    for tile in forward_tiles(problem, hardware, decode=True):
        block_m = max(m for m in choices["block_m"] if int(m) <= max(tile[0], 16))
        programs = -(-rows // int(block_m)) * problem.kv_heads * max(problem.batch, 1)
        best = split_seed(programs, -(-problem.skv // tile[1]), hardware.cores if problem.device != "cpu" else 0)
        seeds.append(tile_config("", tile) | {"block_m": block_m, "splits": best})
    return _space(choices, _constraints("forward", "", problem, hardware), _seeds(seeds, choices))
