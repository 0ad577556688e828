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


def chosen_code(compiler: str, *flags: str, source: Path = DRIVER) -> str:
    """What the preprocessor leaves of a driver and of csrc under these flags: the program that a sanitiser sees."""
    command = [compiler, *FLAGS, *flags, "-E", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    kept, ours = [], False
    for line in done.stdout.splitlines():
        if line.startswith("# "):  # the line and the file of what follows
            ours = str(build.SOURCE_DIR) in line or str(source) in line
        elif ours:
            kept.append(line.strip())
    return "\n".join(line for line in kept if line)


def run_driver(*command: str | Path) -> str:
    """What the driver printed; any failure that it found, or a sanitiser's report, fails the test."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "0 failures" in done.stdout
    return done.stdout
