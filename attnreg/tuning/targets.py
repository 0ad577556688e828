"""Targets: hardware that is not here, as far as a compiler and a search space need to know it."""

from __future__ import annotations

from collections.abc import Mapping

from attnreg.errors import TuneError
from attnreg.hardware import Hardware

__all__ = ["TARGETS", "target_hardware"]

KB = 1024

# Multiprocessors (compute units) of the largest part, most shared memory a block may ask for, lanes of a warp; from
# the CUDA programming guide's table of compute capabilities and AMD's CDNA 3, CDNA 4 and RDNA 3 manuals.
TARGETS: Mapping[str, tuple[int, int, int]] = {
    "sm_80": (108, 163 * KB, 32),
    "sm_89": (142, 99 * KB, 32),
    "sm_90": (132, 227 * KB, 32),
    "sm_100": (148, 227 * KB, 32),
    "sm_120": (188, 99 * KB, 32),
    "gfx942": (304, 64 * KB, 64),
    "gfx950": (256, 160 * KB, 64),
    "gfx1100": (96, 64 * KB, 32),
}


def target_hardware(name: str) -> Hardware:
    """The hardware that a target names. Raises TuneError for one that is not in the table."""
    if name not in TARGETS:
        raise TuneError(f"target {name!r} is not known; there are {', '.join(TARGETS)}")
    cores, shared, lanes = TARGETS[name]
    hip = name.startswith("gfx")
    return Hardware(
        kind="hip" if hip else "cuda",
        vendor="amd" if hip else "nvidia",
        model="",
        arch=name,
        cores=cores,
        shared_memory=shared,
        registers=65536,
        warp_size=lanes,
    )
