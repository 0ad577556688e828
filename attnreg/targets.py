"""Targets: GPUs that need not be here, as far as compilers, search spaces and static models need to know them."""

from __future__ import annotations

from collections.abc import Mapping

from attnreg.errors import TuneError
from attnreg.hardware import Hardware

__all__ = ["TARGETS", "target"]

KIB = 1024
GIB = 1024**3
TERA = 1e12


def _nvidia(
    arch: str,
    cores: int,
    memory: int,
    shared: int,
    threads: int,
    bandwidth: float,
    *,
    half: float,
    tf32: float,
    vector: float,
    float8: float = 0.0,
) -> Hardware:
    rates = [("float16", half), ("bfloat16", half), ("float32", tf32), ("vector", vector), ("float8", float8)]
    return Hardware(
        "cuda",
        "nvidia",
        "",
        arch,
        cores,
        memory * GIB,
        shared_memory=shared * KIB,
        registers=65536,
        warp_size=32,
        bandwidth=bandwidth,
        threads=threads,
        rates=tuple((name, rate * TERA) for name, rate in rates if rate),
    )


def _amd(
    arch: str,
    cores: int,
    memory: int,
    shared: int,
    registers: int,
    lanes: int,
    bandwidth: float,
    *,
    half: float,
    single: float,
    vector: float,
    float8: float = 0.0,
) -> Hardware:
    rates = [("float16", half), ("bfloat16", half), ("float32", single), ("vector", vector), ("float8", float8)]
    return Hardware(
        "hip",
        "amd",
        "",
        arch,
        cores,
        memory * GIB,
        shared_memory=shared * KIB,
        registers=registers,
        warp_size=lanes,
        bandwidth=bandwidth,
        threads=2048,
        rates=tuple((name, rate * TERA) for name, rate in rates if rate),
    )


# One part stands for its architecture, by the named documents (written down 2026-11; nothing here was measured): dense
# rates with float32 accumulation, in TFLOP/s. Shared memory: the most that one block may ask for (CUDA C++ Programming
# Guide, compute capabilities). Registers of AMD parts: the CDNA 2, CDNA 3 and RDNA 3 instruction set guides.
TARGETS: Mapping[str, Hardware] = {
    # A100 SXM 80 GB: NVIDIA A100 data sheet (2021).
    "sm_80": _nvidia("sm_80", 108, 80, 163, 2048, 2.039e12, half=312, tf32=156, vector=19.5),
    # A10: NVIDIA A10 data sheet (2021).
    "sm_86": _nvidia("sm_86", 72, 24, 99, 1536, 0.6e12, half=125, tf32=62.5, vector=31.2),
    # L40S: NVIDIA L40S data sheet (2023).
    "sm_89": _nvidia("sm_89", 142, 48, 99, 1536, 0.864e12, half=362, tf32=183, vector=91.6, float8=733),
    # H100 SXM: NVIDIA H100 data sheet (2023).
    "sm_90": _nvidia("sm_90", 132, 80, 227, 2048, 3.35e12, half=989, tf32=494, vector=67, float8=1979),
    # B200: NVIDIA DGX B200 data sheet (2024).
    "sm_100": _nvidia("sm_100", 148, 180, 227, 2048, 8e12, half=2250, tf32=1125, vector=75, float8=4500),
    # GeForce RTX 5090: NVIDIA RTX Blackwell architecture paper (2025).
    "sm_120": _nvidia("sm_120", 170, 32, 99, 1536, 1.792e12, half=209.5, tf32=104.8, vector=104.8, float8=419),
    # One die of an Instinct MI250X: AMD data sheet (2021).
    "gfx90a": _amd("gfx90a", 110, 64, 64, 131072, 64, 1.638e12, half=191.5, single=47.9, vector=23.9),
    # Instinct MI300X: AMD data sheet (2023).
    "gfx942": _amd("gfx942", 304, 192, 64, 131072, 64, 5.3e12, half=1307, single=163, vector=163, float8=2615),
    # Instinct MI355X: AMD data sheet (2025).
    "gfx950": _amd("gfx950", 256, 288, 160, 131072, 64, 8e12, half=2516, single=157, vector=157, float8=5033),
    # Radeon RX 7900 XTX: AMD data sheet (2022).
    "gfx1100": _amd("gfx1100", 96, 24, 64, 98304, 32, 0.96e12, half=123, single=61, vector=61),
}


def target(name: str) -> Hardware:
    """The hardware that a target's name stands for. Raises TuneError for one that is not in the table."""
    if name not in TARGETS:
        raise TuneError(f"target {name!r} is not known; there are {', '.join(TARGETS)}")
    return TARGETS[name]
