"""What `attnreg doctor` says of the native kernels."""

from __future__ import annotations

import os

from attnreg import Finding
from attnreg_cpu import build


def findings() -> list[Finding]:
    """Compiler, cache folder and OpenMP runtime."""
    compiler = build.find_compiler()
    if compiler is None:
        compiler_line = Finding("cpu: compiler", False, "none on PATH", build.INSTALL_HINT)
    else:
        compiler_line = Finding("cpu: compiler", True, build.compiler_version(compiler))
    return [compiler_line, _cache(), _threads()]


def _cache() -> Finding:
    folder = build.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return Finding(
            "cpu: kernel cache", False, f"{folder} cannot be written", "set ATTNREG_CACHE_DIR to a writable folder"
        )
    count = sum(1 for _ in folder.glob("*.so"))
    return Finding("cpu: kernel cache", True, f"{folder} holds {count} compiled kernels")


def _threads() -> Finding:
    if build.openmp_entry() is None:
        return Finding(
            "cpu: threads",
            False,
            "torch has no OpenMP runtime loaded, so kernels use one thread",
            "install a torch build with OpenMP",
        )
    return Finding("cpu: threads", True, "kernels share torch's OpenMP threads")
