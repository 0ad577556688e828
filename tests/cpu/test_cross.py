"""Law: the same kernels are right on aarch64 with NEON, run under user-mode emulation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from drivers import build_driver, run_driver

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
@pytest.mark.parametrize("flags", [("-O3", "-march=armv8-a"), ("-O2", "-march=armv8.2-a+fp16")], ids=str)
def test_kernels_are_right_on_aarch64(flags: tuple[str, ...], tmp_path: Path) -> None:
    program = build_driver(COMPILER or "", tmp_path / "driver", "-static", *flags)
    # NEON registers hold four floats: the driver says which width it was compiled for.
    assert "4 lanes" in run_driver(EMULATOR or "", program)
