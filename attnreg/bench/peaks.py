"""The machine's peaks, measured by the same command: multiply-add rate and read bandwidth, over all threads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from attnreg.hardware import Hardware

__all__ = ["Peaks", "measure_peaks"]

TRIES = 7
ROUNDS = 4_000_000


@dataclass(frozen=True)
class Peaks:
    """flops: floating-point operations a second in float32; read: bytes a second. how: what measured them."""

    flops: float
    read: float
    how: str

    def share(self, flops: float, moved: float, seconds: float) -> tuple[float, float]:
        """Which share of either peak a call of that much work reached."""
        return flops / seconds / self.flops, moved / seconds / self.read


def measure_peaks(hardware: Hardware, threads: int) -> Peaks:
    """Best of several tries of a small C loop on each thread; by torch where there is no compiler."""
    buffer = torch.ones(max(4 * hardware.caches[2], 1 << 27) // 4)
    library = _compiled()
    if library is None:
        square = torch.randn(1024, 1024)
        flops = max(2 * 1024**3 / _timed(lambda: torch.mm(square, square)) for _ in range(TRIES))
        read = max(buffer.numel() * 4 / _timed(buffer.sum) for _ in range(TRIES))
        return Peaks(flops, read, "torch.mm and Tensor.sum, since no C compiler was found: below the true peaks")
    part = buffer.numel() // threads // 128 * 128
    done = [0.0] * threads

    def multiply(n: int) -> None:
        done[n] = library.attnreg_fma(ROUNDS, ctypes.byref(ctypes.c_float(0)))

    def scan(n: int) -> None:
        library.attnreg_read(buffer.data_ptr() + 4 * part * n, part)

    flops = max(_each(multiply, threads, lambda: sum(done)) for _ in range(TRIES))
    read = max(_each(scan, threads, lambda: float(4 * part * threads)) for _ in range(TRIES))
    return Peaks(flops, read, f"a C loop on {threads} threads, best of {TRIES}")


def _each(work: Callable[[int], None], threads: int, amount: Callable[[], float]) -> float:
    """Amount a second of `work(n)` on every thread at once; ctypes lets go of the interpreter's lock."""
    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return amount() / (time.perf_counter() - start)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _compiled() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peak.so"
        source = files("attnreg.bench") / "peak.c"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        library = ctypes.CDLL(str(made))
    library.attnreg_fma.restype = ctypes.c_double
    library.attnreg_fma.argtypes = [ctypes.c_long, ctypes.c_void_p]
    library.attnreg_read.restype = ctypes.c_float
    library.attnreg_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
