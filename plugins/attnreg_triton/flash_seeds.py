"""Known-good tiles of the flash kernels per architecture and head size: what the tuner tries first."""

from __future__ import annotations

from attnreg import Hardware, Problem

TileTuple = tuple[int, int, int, int]


def product_precisions(hardware: Hardware) -> tuple[str, ...]:
    """How a float32 product may be made; the first is the default, as precise as float32 itself."""
    return ("tf32x3", "ieee") if hardware.kind == "cuda" else ("ieee",)


def forward_tiles(problem: Problem, hardware: Hardware, decode: bool = False) -> list[TileTuple]:
    """(block_m, block_n, warps, stages), best guess first."""
    if hardware.kind == "cpu":
        # The interpreter pays by the operation, not by the element.
        return [(64, 64, 4, 2), (32, 128, 4, 2)]
    if decode:
        return [(16, 64, 4, 3), (16, 32, 4, 3), (32, 64, 4, 3), (16, 32, 4, 2)]
    return [(64, 32, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3), (32, 32, 4, 2)]


def backward_tiles(problem: Problem, hardware: Hardware) -> list[tuple[TileTuple, TileTuple]]:
    """(dq tile, dkv tile) pairs, best guess first."""
    if hardware.kind == "cpu":
        return [((64, 64, 4, 2), (64, 64, 4, 2)), ((128, 32, 4, 2), (32, 128, 4, 2))]
    return [((64, 32, 4, 2), (32, 32, 4, 2)), ((64, 64, 8, 2), (32, 64, 8, 2))]
