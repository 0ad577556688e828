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
    threads: int,
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
        threads=threads,
        rates=tuple((name, rate * TERA) for name, rate in rates if rate),
    )


# One part stands for its architecture. Dense matrix rates with float32 accumulation, in TFLOP/s; nothing was measured.
# Each part's figures were held against public documents in November 2026, named beside it; "not checked" marks what no
# document in reach stated. NVIDIA's threads: compute capabilities as public occupancy libraries repeat them (2026).
# NVIDIA's shared memory, the most that one block may ask for in KiB: CUDA C++ Programming Guide 13.1, appendix "Compute
# Capabilities" (8.0: 163, 8.6 and 8.9: 99, 9.0: 227, 12.0: 99) and Blackwell Tuning Guide 13 (10.0: 227), in the public
# copies that repositories hold (read 2026-11).
# Units, LDS and registers of AMD's parts: ROCm documentation, "AMD GPU specifications" (2026); it gives RDNA 3's
# 768 KiB of registers and 128 KiB of LDS for two compute units together.
TARGETS: Mapping[str, Hardware] = {
    # A100 SXM 80 GB: NVIDIA A100 data sheet (2021, revision 1758950 r4) and Ampere architecture paper (2020).
    "sm_80": _nvidia("sm_80", 108, 80, 163, 2048, 2.039e12, half=312, tf32=156, vector=19.5),
    # A10: units, bandwidth and vector rate as product databases repeat them (2021). Matrix rates: 4 and 2 times the
    # vector rate, the ratio in a dealer's copy of NVIDIA's A40 data sheet (149.7, 74.8, 37.4; the same chip).
    "sm_86": _nvidia("sm_86", 72, 24, 99, 1536, 0.6e12, half=125, tf32=62.5, vector=31.2),
    # L40S: NVIDIA L40S data sheet (2023).
    "sm_89": _nvidia("sm_89", 142, 48, 99, 1536, 0.864e12, half=362.05, tf32=183, vector=91.6, float8=733),
    # H100 SXM: NVIDIA H100 data sheet (2023); its rates are with sparsity, these are half of them.
    "sm_90": _nvidia("sm_90", 132, 80, 227, 2048, 3.35e12, half=989, tf32=494, vector=67, float8=1979),
    # B200 at 1000 W: NVIDIA Blackwell architecture brief (2024), HGX column. Memory: an eighth of
    # the 1,440 GB in NVIDIA's DGX B200 user guide.
    "sm_100": _nvidia("sm_100", 148, 180, 227, 2048, 8e12, half=2250, tf32=1100, vector=80, float8=4500),
    # GeForce RTX 5090: units, memory and bandwidth of NVIDIA's RTX Blackwell paper (2025). A public catalogue (2026)
    # repeats 209.5 and 419, and for a sister card (RTX PRO 5000) TF32 and vector rates of half the former each.
    "sm_120": _nvidia("sm_120", 170, 32, 99, 1536, 1.792e12, half=209.5, tf32=104.8, vector=104.8, float8=419),
    # One of the two dies of an Instinct MI250X: AMD's launch table (2021-11), halved.
    "gfx90a": _amd("gfx90a", 110, 64, 64, 131072, 2048, 64, 1.6e12, half=191.5, single=47.85, vector=23.95),
    # Instinct MI300X: bandwidth of AMD's CDNA 3 pages (2024); rates as a public catalogue (2026) repeats AMD's.
    "gfx942": _amd(
        "gfx942", 304, 192, 64, 131072, 2048, 64, 5.3e12, half=1307.4, single=163.4, vector=163.4, float8=2614.9
    ),
    # Instinct MI355X: AMD at Hot Chips (2025) and ISSCC (2026), 8 TB/s and 5 PFLOP/s in FP8; the digits behind from a
    # public catalogue (2026). Float32, vector and matrix alike: AMD's figures as public
    # roofline tables repeat them (2026).
    "gfx950": _amd(
        "gfx950", 256, 288, 160, 131072, 2048, 64, 8e12, half=2516.6, single=157.3, vector=157.3, float8=5033.2
    ),
    # Radeon RX 7900 XTX: AMD's launch table (2022-11). Half precision: 512 operations a clock and unit (AMD
    # GPUOpen on RDNA 4's matrix cores, 2025) of 96 units at 2.5 GHz. There is no float32 matrix unit: the vector rate.
    "gfx1100": _amd("gfx1100", 96, 24, 64, 98304, 1024, 32, 0.96e12, half=122.8, single=61.4, vector=61.4),
}


def target(name: str) -> Hardware:
    """The hardware that a target's name stands for. Raises TuneError for one that is not in the table."""
    if name not in TARGETS:
        raise TuneError(f"target {name!r} is not known; there are {', '.join(TARGETS)}")
    return TARGETS[name]
