"""Hardware: what this machine (or a named target) is, as frozen data with a slug for the tuning database."""

from __future__ import annotations

import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

__all__ = ["Hardware", "cpu_quota", "detect"]

# Flags that change which kernel is fastest; /proc/cpuinfo's spelling, and what Arm calls the same.
ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_bf16",
    "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimdhp", "asimddp",
    "bf16", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """One device. Sizes in bytes; 0 or empty where unknown or not of this kind.

    kind: "cpu", "cuda" or "hip". arch: the widest vector ISA of a CPU ("avx512"), "sm_90", "gfx942".
    cores: CPU cores that this process may use (affinity and cgroup quota); SMs or compute units of a GPU.
    isa: CPU feature flags. caches: L1d a core, L2 a core, L3 in all. shared_memory: the most a block may ask
    for. registers, threads: 32-bit registers and most resident threads of a multiprocessor. bandwidth: bytes a
    second of main memory, 0 if unmeasured. rates: (dtype, dense matrix products a second in FLOP/s), and ("vector",
    float32 FLOP/s outside the matrix units); empty for hardware that is not a named target.
    """

    kind: Literal["cpu", "cuda", "hip"]
    vendor: str
    model: str
    arch: str
    cores: int
    memory: int = 0
    isa: tuple[str, ...] = ()
    caches: tuple[int, int, int] = (0, 0, 0)
    shared_memory: int = 0
    registers: int = 0
    warp_size: int = 0
    bandwidth: float = 0.0
    threads: int = 0
    rates: tuple[tuple[str, float], ...] = ()

    @property
    def slug(self) -> str:
        """The folder of the tuning database: machines of one slug share records."""
        if self.kind == "cpu":
            return _slug(f"cpu-{self.vendor}-{self.model}-{self.arch}-{self.cores}c")
        return _slug(f"{self.arch}-{self.model}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def detect(device: torch.device | str | int = "cpu") -> Hardware:
    """The hardware behind a torch device. Cached: a machine does not change under a process."""
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu()
    return _gpu(device.type, device.index or 0)


@functools.lru_cache(maxsize=1)
def _cpu() -> Hardware:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    vendor, model = _cpu_names(info)
    return Hardware(
        kind="cpu",
        vendor=vendor,
        model=model,
        arch=_vector_isa(flags),
        cores=usable_cores(),
        memory=_memory(),
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        caches=_caches(),
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    out: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            out[name.strip()] = value.strip()
    except OSError:
        pass
    return out


def _cpu_names(info: dict[str, str]) -> tuple[str, str]:
    """Vendor and model: family and model numbers on x86, since hypervisors shorten the marketing name."""
    vendors = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
    implementers = {"0x41": "arm", "0x61": "apple", "0xc0": "ampere", "0x51": "qualcomm", "0x4e": "nvidia"}
    if "vendor_id" in info:
        vendor = vendors.get(info["vendor_id"], info["vendor_id"])
        return vendor, f"family{info.get('cpu family', '0')}-model{info.get('model', '0')}"
    if "CPU implementer" in info:
        return implementers.get(info["CPU implementer"], info["CPU implementer"]), f"part{info.get('CPU part', '0')}"
    return platform.machine() or "unknown", _slug(platform.processor() or platform.system())


def _vector_isa(flags: set[str]) -> str:
    for flag, name in (("amx_tile", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"), ("sve", "sve"), ("asimd", "neon")):
        if flag in flags:
            return name
    return "neon" if platform.machine() in ("arm64", "aarch64") else platform.machine() or "unknown"


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, cut by the cgroup's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(count, int(quota) if quota is not None else count))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that the cgroup grants (v2, then v1); None where there is no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota = (root / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _caches() -> tuple[int, int, int]:
    """L1d and L2 of one core, L3 in all, as the kernel tells them for cpu0."""
    sizes = {1: 0, 2: 0, 3: 0}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind = int((index / "level").read_text()), (index / "type").read_text().strip()
            text = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and level in sizes:
            unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
            sizes[level] = int(text.rstrip("KMG")) * unit
    return sizes[1], sizes[2], sizes[3]


@functools.lru_cache(maxsize=16)
def _gpu(kind: str, index: int) -> Hardware:
    props = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    arch = props.gcnArchName.split(":")[0] if hip else f"sm_{props.major}{props.minor}"
    return Hardware(
        kind="hip" if hip else "cuda",
        vendor="amd" if hip else "nvidia",
        model=props.name,
        arch=arch,
        cores=props.multi_processor_count,
        memory=props.total_memory,
        shared_memory=int(getattr(props, "shared_memory_per_block_optin", 0)),
        registers=int(getattr(props, "regs_per_multiprocessor", 65536)),
        warp_size=int(getattr(props, "warp_size", 64 if hip else 32)),
    )
