"""Search space of the block-sparse kernels: one block size for the layout, warps and stages for each kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from attnreg import Hardware, Problem, SearchSpace

from .flash_seeds import Family, Width, exact_products, family, masked, product_precisions, scattered, width
from .flash_space import Config, Constraint, tile_rules
from .launch import next_power_of_two
from .plan import ConfigValue, Tile

KERNELS = {"forward": "", "dq": "dq_", "dkv": "dkv_"}


class Seed(NamedTuple):
    """Block sizes of the layout, and (warps, stages) of the three kernels."""

    m: int
    n: int
    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]


def _alike(m: int, n: int, warps: int, stages: int) -> Seed:
    return Seed(m, n, (warps, stages), (warps, stages), (warps, stages))


SMALLEST = _alike(16, 16, 4, 1)
FORWARD: dict[Width, tuple[Seed, ...]] = {
    "narrow": (_alike(64, 64, 4, 2), _alike(128, 64, 8, 2)),
    "medium": (_alike(64, 64, 4, 2), _alike(64, 32, 4, 2)),
    "wide": (_alike(64, 32, 8, 2), _alike(32, 32, 4, 2)),
    "latent": (SMALLEST,),
}
"""Half precision without gradients, best guess first."""
TRAINING: dict[tuple[Family, Width], Seed] = {
    ("ampere", "narrow"): _alike(64, 32, 4, 2),
    ("ada", "narrow"): _alike(64, 32, 4, 2),
    ("hopper", "narrow"): Seed(64, 64, (4, 2), (4, 2), (8, 2)),
    ("blackwell", "narrow"): _alike(64, 64, 8, 1),
    ("cdna", "narrow"): Seed(64, 64, (4, 2), (4, 2), (4, 1)),
    ("ampere", "medium"): Seed(64, 64, (4, 2), (8, 2), (8, 2)),
    ("ada", "medium"): Seed(64, 64, (4, 2), (8, 2), (8, 2)),
    ("hopper", "medium"): Seed(64, 32, (4, 2), (4, 2), (8, 2)),
    ("blackwell", "medium"): Seed(64, 64, (4, 2), (8, 2), (8, 2)),
    ("cdna", "medium"): Seed(32, 32, (4, 2), (4, 2), (4, 1)),
    ("ampere", "wide"): _alike(32, 32, 8, 2),
    ("ada", "wide"): _alike(32, 32, 8, 2),
    ("hopper", "wide"): _alike(32, 32, 8, 2),
    ("blackwell", "wide"): _alike(32, 32, 8, 2),
}
"""Half precision with gradients: the largest blocks whose three kernels cross-compiled without a spilled register."""
SCATTERED = _alike(32, 32, 8, 1)
"""Half precision without gradients where loads take an address an element: see `flash_seeds.scattered`."""
MASKED = _alike(16, 32, 8, 1)
MASKED_WIDE = _alike(16, 16, 8, 1)
"""Half precision with gradients where loads do that (`MASKED`), or hold masks of columns: see `flash_seeds.masked`."""


def seed_blocks(problem: Problem, hardware: Hardware) -> tuple[Seed, ...]:
    """Blocks to try first; the smallest where nothing else is known."""
    group, size = family(hardware), width(problem)
    if problem.dtype == "float32":
        small = group == "cdna" or (group == "ampere" and problem.needs_grad)
        found: tuple[Seed, ...] = () if small else (_alike(16, 16, 8, 1 if problem.needs_grad else 2),)
    elif group == "cpu":
        found = (_alike(64, 64, 4, 2), _alike(32, 32, 4, 2))  # the interpreter pays by the operation
    elif problem.needs_grad:
        found = (TRAINING[group, size],) if (group, size) in TRAINING else ()
        if scattered(problem, group):
            found = (MASKED, *found)
        elif masked(problem, group):
            found = (MASKED_WIDE if size == "wide" else MASKED, *found)
    elif scattered(problem, group):
        found = (SCATTERED, *FORWARD[size])
    elif group == "rdna":
        found = (_alike(128, 64, 8, 1), _alike(64, 32, 8, 1)) if size == "narrow" else (_alike(16, 16, 8, 1),)
    else:
        found = FORWARD[size][1:] if (group, size) == ("blackwell", "narrow") else FORWARD[size]
    return found or (SMALLEST,)


def read_tile(config: Config, kernel: str) -> Tile:
    """The tile of "forward", "dq" or "dkv" in a configuration; the block sizes are the layout's and so shared."""
    prefix = KERNELS[kernel]
    warps, stages = (int(config.get(prefix + name, config[name])) for name in ("num_warps", "num_stages"))
    waves = int(config.get("waves_per_eu", 0))
    return Tile(int(config["block_m"]), int(config["block_n"]), warps, stages, waves)


def plan_fields(config: Config) -> dict[str, Any]:
    """The fields of a Plan that a configuration decides."""
    names = {"forward": "forward", "dq": "backward_q", "dkv": "backward_kv"}
    tiles: dict[str, Any] = {field: read_tile(config, kernel) for kernel, field in names.items()}
    return tiles | ({"precision": str(config["precision"])} if "precision" in config else {})


def space(problem: Problem, hardware: Hardware) -> SearchSpace:
    """Block sizes up to the sequence; warps and stages of the forward and, with gradients, the backward kernels."""
    rows, keys = (next_power_of_two(max(size, 1)) for size in (problem.sq, problem.skv))
    kernels = ["forward", "dq", "dkv"] if problem.needs_grad else ["forward"]
    choices: dict[str, Sequence[ConfigValue]] = {
        "block_m": [m for m in (16, 32, 64, 128) if m <= max(16, rows)],
        "block_n": [n for n in (16, 32, 64, 128) if n <= max(16, keys)],
    }
    for kernel in kernels:
        choices |= {KERNELS[kernel] + "num_warps": (2, 4, 8), KERNELS[kernel] + "num_stages": (1, 2, 3, 4)}
    if problem.dtype == "float32":
        choices["precision"] = product_precisions(hardware)
    if hardware.kind == "hip":
        choices["waves_per_eu"] = (0, 1, 2, 3)
    constraints = [rule for kernel in kernels for rule in _rules(kernel, problem, hardware)]
    seeds: list[dict[str, ConfigValue]] = []
    for blocks in seed_blocks(problem, hardware):
        seed: dict[str, ConfigValue] = {name: values[0] for name, values in choices.items()}
        seed["block_m"] = max(x for x in (16, 32, 64, 128) if x in choices["block_m"] and x <= blocks.m)
        seed["block_n"] = max(x for x in (16, 32, 64, 128) if x in choices["block_n"] and x <= blocks.n)
        for kernel in kernels:
            warps, stages = getattr(blocks, kernel)
            seed |= {KERNELS[kernel] + "num_warps": warps, KERNELS[kernel] + "num_stages": stages}
        if exact_products(problem, family(hardware), width(problem)):
            seed["precision"] = "ieee"
        if seed not in seeds and len(seeds) < 2 and all(holds(seed) for _, holds in constraints):
            seeds.append(seed)
    if not seeds:
        smallest = {name: values[0] for name, values in choices.items()}
        constraints = [(text, holds) for text, holds in constraints if holds(smallest)]
        seeds = [smallest]
    return SearchSpace(choices=choices, default=seeds[0], constraints=constraints, seeds=seeds)


def _rules(kernel: str, problem: Problem, hardware: Hardware) -> list[Constraint]:
    """What drops a tile: the flash kernels' rules, for the same inner step."""
    return tile_rules(kernel, problem, hardware, lambda config: read_tile(config, kernel))
