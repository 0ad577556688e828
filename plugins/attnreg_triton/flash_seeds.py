"""Known-good tiles of the flash kernels per architecture and head size: what the tuner tries first.

Forward seeds for heads of 128 on sm_80, sm_90 and sm_100 follow the tuned choices that the Triton and FlexAttention
projects publish (A100: 128, 64, 8 warps, 3 stages; H100: that, and 128, 128 in float16; B200: 128, 64, 8, 2). Hopper's
first ones for heads of 64 and 128 were the fastest of those tried on an H200 that spill nothing (2026-11). The others
are the largest tiles that cross-compiled for the architecture without a spilled register.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from attnreg import Hardware, Problem

TileTuple = tuple[int, int, int, int]
Family = Literal["ampere", "ada", "hopper", "blackwell", "cdna", "rdna", "cpu"]
Width = Literal["narrow", "medium", "wide", "latent"]
NVIDIA: tuple[Family, ...] = ("ampere", "ada", "hopper", "blackwell")


class Seeds(NamedTuple):
    """Tiles (block_m, block_n, warps, stages), best guess first; backward ones pair by position."""

    forward: tuple[TileTuple, ...]
    dq: tuple[TileTuple, ...]
    dkv: tuple[TileTuple, ...]


HALF: dict[tuple[Family, Width], Seeds] = {
    ("ampere", "narrow"): Seeds(
        ((128, 128, 8, 3), (64, 64, 4, 3)),
        ((128, 64, 8, 2), (64, 64, 4, 2)),
        ((64, 128, 8, 2), (64, 64, 8, 2)),
    ),
    ("ampere", "medium"): Seeds(
        ((128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 2)),
        ((64, 64, 8, 2), (128, 64, 8, 2)),
        ((64, 64, 8, 2), (32, 64, 8, 2)),
    ),
    ("ampere", "wide"): Seeds(((64, 32, 8, 2),), ((32, 32, 8, 2),), ((16, 32, 8, 2),)),
    ("ada", "narrow"): Seeds(
        ((128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
        ((128, 64, 8, 2), (64, 64, 4, 2)),
        ((32, 128, 8, 2), (32, 64, 4, 2)),
    ),
    ("ada", "medium"): Seeds(
        ((128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 8, 2)),
        ((64, 64, 8, 2), (128, 32, 8, 2)),
        ((64, 64, 8, 2), (32, 64, 8, 2)),
    ),
    ("ada", "wide"): Seeds(((64, 32, 8, 2),), ((32, 32, 8, 2),), ((16, 32, 8, 2),)),
    ("hopper", "narrow"): Seeds(
        ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)),
        ((64, 64, 4, 3), (128, 64, 8, 2)),
        ((32, 64, 4, 3), (64, 64, 8, 2)),
    ),
    ("hopper", "medium"): Seeds(
        ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 3)),
        ((128, 64, 8, 3), (64, 64, 8, 2)),
        ((32, 64, 4, 3), (32, 128, 8, 2)),
    ),
    ("hopper", "wide"): Seeds(((128, 32, 8, 2),), ((64, 32, 8, 2), (32, 32, 8, 2)), ((16, 32, 8, 2), (16, 32, 8, 1))),
    ("blackwell", "narrow"): Seeds(
        ((128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 2)),
        ((128, 64, 8, 2), (64, 64, 8, 2)),
        ((64, 128, 8, 2), (32, 64, 8, 2)),
    ),
    ("blackwell", "medium"): Seeds(
        ((128, 64, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3)),
        ((128, 64, 8, 2), (64, 64, 8, 2)),
        ((64, 128, 8, 2), (32, 64, 8, 2)),
    ),
    ("blackwell", "wide"): Seeds(((128, 32, 8, 2), (64, 32, 4, 2)), ((64, 32, 8, 2),), ((32, 64, 8, 2),)),
    ("cdna", "narrow"): Seeds(
        ((128, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2)),
        ((64, 64, 4, 2), (64, 32, 4, 2)),
        ((32, 64, 4, 1), (16, 64, 4, 2)),
    ),
    ("cdna", "medium"): Seeds(
        ((128, 64, 4, 1), (128, 32, 4, 2), (64, 32, 4, 2)),
        ((64, 64, 4, 2), (64, 32, 4, 2)),
        ((32, 64, 4, 1), (16, 64, 4, 2)),
    ),
    ("cdna", "wide"): Seeds(((64, 32, 4, 1), (32, 32, 4, 1)), ((32, 32, 4, 1),), ((16, 32, 4, 1),)),
    ("rdna", "narrow"): Seeds(((128, 64, 8, 1), (64, 32, 8, 1)), ((64, 32, 8, 1),), ((16, 16, 4, 1),)),
    ("rdna", "medium"): Seeds(((64, 32, 16, 1),), ((32, 16, 8, 1),), ((16, 16, 8, 1),)),
    ("rdna", "wide"): Seeds(((32, 16, 8, 1),), ((16, 16, 8, 1),), ((16, 16, 8, 1),)),
}
BUSY = Seeds(((64, 32, 4, 2), (32, 32, 4, 2)), ((32, 32, 4, 2), (32, 16, 4, 2)), ((16, 32, 4, 2), (16, 16, 4, 2)))
"""Bias, ALiBi, documents and dropout hold tiles of their own in registers: smaller products go beside them."""
SCATTERED = Seeds(((64, 32, 8, 2), (32, 32, 8, 2)), ((32, 32, 8, 1), (32, 16, 8, 1)), ((16, 32, 8, 1), (16, 16, 8, 1)))
"""Where 16 does not divide a head, every element is loaded by an address of its own: few of them a thread leave
NVIDIA's registers room for the rest."""
SCATTERED_DECODE: tuple[TileTuple, ...] = ((16, 32, 8, 2), (16, 16, 8, 1))
MASKED = Seeds((), ((64, 32, 8, 2),), ((16, 64, 8, 2),))
"""Where v's columns end before their block, masks stand beside the accumulators of the backward kernels."""
EIGHT: dict[Width, tuple[TileTuple, ...]] = {
    "narrow": ((128, 64, 8, 2), (64, 64, 4, 2)),
    "medium": ((64, 64, 8, 2), (128, 32, 8, 2)),
    "wide": ((64, 32, 8, 1), (32, 32, 8, 2)),
    "latent": ((32, 32, 8, 2),),
}
"""8-bit products on NVIDIA parts hold factors beside the accumulators: smaller tiles than in half precision."""
HOPPER_EIGHT: dict[Width, tuple[TileTuple, ...]] = {
    **EIGHT,
    "medium": ((128, 32, 8, 2), (64, 32, 8, 2)),
    "wide": ((32, 32, 8, 2),),
}
DECODE: dict[Width, tuple[TileTuple, ...]] = {
    "narrow": ((16, 64, 4, 3), (16, 128, 4, 3), (16, 64, 4, 2)),
    "medium": ((16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 3)),
    "wide": ((16, 32, 4, 3), (16, 32, 4, 2)),
    "latent": ((32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 4, 2)),
}
ADA_DECODE: tuple[TileTuple, ...] = ((16, 64, 4, 2), (16, 32, 4, 3))
"""Heads of 128: a third stage spills there where the cache is paged."""


def family(hardware: Hardware) -> Family:
    """Architectures that share seeds: consumer NVIDIA parts have Ampere's instructions and 99 KiB of shared memory."""
    if hardware.kind == "cpu":
        return "cpu"
    if hardware.kind == "hip":
        return "cdna" if hardware.arch.startswith("gfx9") else "rdna"
    if hardware.arch.startswith("sm_9"):
        return "hopper"
    if hardware.arch.startswith("sm_10"):
        return "blackwell"
    return "ampere" if hardware.arch == "sm_80" else "ada"


def width(problem: Problem) -> Width:
    """Classes of head size; latent: MLA's 576 and 512 columns."""
    size = max(problem.head_dim, problem.head_dim_v)
    if size > 256:
        return "latent"
    return "narrow" if size <= 64 else "medium" if size <= 128 else "wide"


def product_precisions(hardware: Hardware) -> tuple[str, ...]:
    """How a float32 product may be made; the first is the default, as precise as float32 itself."""
    return ("tf32x3", "ieee") if hardware.kind == "cuda" else ("ieee",)


def _features(problem: Problem) -> int:
    """How many features hold a tile of their own."""
    spec = problem.spec
    return sum((spec.bias, spec.alibi, spec.dropout_p > 0, "document_ids" in spec.tensors()))


def scattered(problem: Problem, group: Family) -> bool:
    """Does the compiler load q, k or v an element at a time, on a part where that makes tiles spill?"""
    return group in NVIDIA and bool(problem.head_dim % 16 or problem.head_dim_v % 16)


def masked(problem: Problem, group: Family) -> bool:
    """Do v's columns end before their block, on a part where masks of them make tiles spill?"""
    return group in NVIDIA and bool(problem.head_dim_v & (problem.head_dim_v - 1))


def _first(small: Seeds, best: Seeds, smallest: bool = False) -> Seeds:
    """`best` behind `small`, of which the `smallest` take the second, smaller tiles only."""
    return Seeds(*(few[int(smallest) :] + more for few, more in zip(small, best, strict=True)))


def _seeds(problem: Problem, group: Family, size: Width) -> Seeds:
    if problem.dtype == "float32":
        return _single(problem, group, size)
    # What is widened to 16 bits stands beside its 8 bits: wide heads leave no room for that either.
    eight = problem.spec.dtype.compute, problem.kv_dtype if size == "wide" else ""
    if any(name.startswith("float8") for name in eight) and group not in ("cdna", "rdna"):
        return HALF[group, size]._replace(forward=(HOPPER_EIGHT if group == "hopper" else EIGHT)[size])
    best, features = HALF[group, size], _features(problem)
    if scattered(problem, group):
        return _first(SCATTERED, best, smallest=size == "wide" or features > 0)
    if masked(problem, group) and size == "wide":
        return _first(Seeds((), best.dq[:1], SCATTERED.dkv[1:]), best)
    if masked(problem, group) and group in ("ampere", "ada") and size == "medium" and features == 0:
        return _first(MASKED, best)  # newer parts' products of whole tiles leave room for the larger ones
    if features == 0 or size == "wide" or group == "rdna":
        return best
    return _first(BUSY, best, smallest=features > 2)


def _single(problem: Problem, group: Family, size: Width) -> Seeds:
    """Float32 tiles: a product in three TF32 parts holds three times the operands, so tiles stay small."""
    if group == "rdna":
        return Seeds(((16, 16, 8, 1),), ((16, 16, 8, 1),), ((16, 16, 8, 1),))
    if size == "narrow":
        return Seeds(((32, 32, 4, 2), (16, 32, 4, 2)), ((32, 16, 8, 1),), ((16, 32, 8, 1),))
    if group == "cdna" and size != "medium":
        return Seeds(((16, 16, 4, 2),), ((16, 16, 4, 1),), ((16, 16, 4, 1),))
    if exact_products(problem, group, size):
        forward = (32, 32, 8, 1) if size == "medium" else (16, 16, 8, 1)
        if group == "ampere":  # its compiler aims at fewer registers than the other tiles would need
            medium = size == "medium"
            return Seeds(
                (forward,), ((32, 32 if medium else 16, 8, 1),), ((32, 32, 8, 1) if medium else (16, 16, 4, 1),)
            )
        return Seeds((forward,), ((32, 16, 8, 1),), ((16, 16, 8, 1),))
    return Seeds(((32, 32, 8, 2), (16, 16, 4, 2)), ((16, 16, 8, 1),), ((16, 16, 8, 1),))


def exact_products(problem: Problem, group: Family, size: Width) -> bool:
    """Do float32 seeds multiply outside the matrix unit? Where the three TF32 parts spill at the smallest tiles."""
    if problem.dtype != "float32" or group not in NVIDIA:
        return False
    return size in ("wide", "latent") or (size == "medium" and problem.needs_grad)


def seed_precision(problem: Problem, hardware: Hardware) -> str | None:
    """The precision that float32 seeds are meant with; None for the first that is offered."""
    return "ieee" if exact_products(problem, family(hardware), width(problem)) else None


def forward_tiles(problem: Problem, hardware: Hardware, decode: bool = False) -> tuple[TileTuple, ...]:
    """(block_m, block_n, warps, stages), best guess first."""
    group, size = family(hardware), width(problem)
    if group == "cpu":
        # The interpreter pays by the operation, not by the element.
        return ((64, 64, 4, 2), (32, 128, 4, 2))
    if decode and problem.dtype != "float32":
        if group == "rdna" and size != "latent":
            return ((16, 16, 8, 1), (16, 16, 4, 1)) if size != "wide" else ((16, 16, 8, 1),)
        stages = 2 if group == "cdna" else 4
        if size == "latent" and group in ("cdna", "rdna"):
            return ((16, 16, 4, 2),)
        tiles = ADA_DECODE if (group, size) == ("ada", "medium") else DECODE[size]
        if scattered(problem, group):
            tiles = SCATTERED_DECODE + tiles
        return tuple((m, n, warps, min(count, stages)) for m, n, warps, count in tiles)
    return _seeds(problem, group, size).forward


def backward_tiles(problem: Problem, hardware: Hardware) -> list[tuple[TileTuple, TileTuple]]:
    """(dq tile, dkv tile) pairs, best guess first."""
    group, size = family(hardware), width(problem)
    if group == "cpu":
        return [((64, 64, 4, 2), (64, 64, 4, 2)), ((128, 32, 4, 2), (32, 128, 4, 2))]
    seeds = _seeds(problem, group, size)
    return list(zip(seeds.dq, seeds.dkv, strict=False))
