"""Building kernel_driver.cpp: the kernels without Python, checked against double precision by the program itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

from attnreg_cpu import build

DRIVER = Path(__file__).parent / "kernel_driver.cpp"
FLAGS = (
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-pthread",
    f"-I{build.SOURCE_DIR}",
)


def build_driver(compiler: str, target: Path, *flags: str, source: Path = DRIVER) -> Path:
    """Compile a driver; a compiler that refuses fails the test with its words."""
    command = [compiler, *FLAGS, *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run_driver(*command: str | Path) -> str:
    """What the driver printed; any failure that it found, or a sanitiser's report, fails the test."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "0 failures" in done.stdout
    return done.stdout
