"""Law: what is detected is what the machine and its limits say, and a slug tells machines apart that differ."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnreg import hardware
from attnreg.hardware import Hardware, cpu_quota, detect, usable_cores


def test_the_cpu_is_what_the_system_says() -> None:
    cpu = detect("cpu")
    assert cpu.kind == "cpu"
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)
    assert cpu.memory > 2**28
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
        assert set(cpu.isa) <= set(flags)
        assert ("avx2" in flags) == ("avx2" in cpu.isa)
    assert detect("cpu") is cpu


def test_slugs_are_folder_names_and_tell_hardware_apart() -> None:
    cpu = detect("cpu")
    assert cpu.slug == cpu.slug.lower()
    assert all(c.isalnum() or c == "-" for c in cpu.slug)
    assert replace(cpu, cores=cpu.cores + 1).slug != cpu.slug
    gpu = Hardware("cuda", "nvidia", "NVIDIA H100 80GB HBM3", "sm_90", 132)
    assert gpu.slug == "sm-90-nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "garbage"}, None),
        ({}, None),
    ],
)
def test_the_cgroups_quota_is_read(files: dict[str, str], want: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path) == want


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_affinity_cuts_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("hip", "props", "want"),
    [
        (
            None,
            {"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 85,
             "shared_memory_per_block_optin": 232448, "regs_per_multiprocessor": 65536, "warp_size": 32},
            ("cuda", "nvidia", "sm_90", 132, 232448, 32),
        ),
        (
            "6.4",
            {"name": "AMD Instinct MI300X", "gcnArchName": "gfx942:sramecc+:xnack-", "multi_processor_count": 304,
             "total_memory": 206, "warp_size": 64},
            ("hip", "amd", "gfx942", 304, 0, 64),
        ),
    ],
)  # fmt: skip
def test_a_gpu_is_what_torch_says(
    hip: str | None, props: dict[str, object], want: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**props))
    hardware._gpu.cache_clear()
    try:
        gpu = detect("cuda:0")
    finally:
        hardware._gpu.cache_clear()
    assert (gpu.kind, gpu.vendor, gpu.arch, gpu.cores, gpu.shared_memory, gpu.warp_size) == want
