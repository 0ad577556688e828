"""The machine's peaks, measured by the same command: multiply-add rate and read bandwidth, over all threads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from attnreg import folders
from attnreg.hardware import Hardware

__all__ = ["PeakLoops", "Peaks"]

ROUNDS = 4_000_000


@dataclass(frozen=True)
class Peaks:
    """flops: floating-point operations a second in float32; read: bytes a second. how: what measured them."""

    flops: float
    read: float
    how: str


class PeakLoops:
    """Two calls that do nothing but multiply and add, or read memory once, on every thread.

    multiply, read: the calls; flops, bytes: what one call does. A run takes turns with the contestants, so a share of
    a peak pairs like with like on a machine whose speed varies. By torch where there is no compiler.

    bytes: to read; four times the last cache, at least 128 MiB, unless given. rounds: of the multiply-add loop.
    """

    def __init__(self, hardware: Hardware, threads: int, *, size: int | None = None, rounds: int = ROUNDS) -> None:
        self._buffer = torch.ones((size or max(4 * hardware.caches[2], 1 << 27)) // 4)
        self.multiply: Callable[[], object]
        self.read: Callable[[], object]
        library = _compiled()
        if library is None:
            square = torch.randn(1024, 1024)
            self.multiply, self.flops = (lambda: torch.mm(square, square)), 2.0 * 1024**3
            self.read, self.bytes = self._buffer.sum, 4.0 * self._buffer.numel()
            self.how = "torch.mm and Tensor.sum, since no C compiler was found: below the true peaks"
            return
        part = self._buffer.numel() // threads // 128 * 128
        self.flops = threads * library.attnreg_fma(rounds, ctypes.byref(ctypes.c_float(0)))
        self.bytes = 4.0 * part * threads
        self.how = f"C loops on {threads} threads"
        start = self._buffer.data_ptr()
        self.multiply = lambda: _each(lambda n: library.attnreg_fma(rounds, ctypes.byref(ctypes.c_float(0))), threads)
        self.read = lambda: _each(lambda n: library.attnreg_read(start + 4 * part * n, part), threads)


def _each(work: Callable[[int], object], threads: int) -> None:
    """`work(n)` on every thread at once; ctypes lets go of the interpreter's lock."""
    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _compiled() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(dir=folders.temporary(to_execute=True)) as folder:
        made = Path(folder) / "peak.so"
        source = files("attnreg.bench") / "peak.c"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        try:
            library = ctypes.CDLL(str(made))
        except OSError:  # no temporary folder from which anything can be loaded
            return None
    library.attnreg_fma.restype = ctypes.c_double
    library.attnreg_fma.argtypes = [ctypes.c_long, ctypes.c_void_p]
    library.attnreg_read.restype = ctypes.c_float
    library.attnreg_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
