"""What `attnreg doctor` says of the native kernels."""

from __future__ import annotations

import os

from attnreg import Finding
from attnreg_cpu import build, library_files, product


def findings() -> list[Finding]:
    """Compiler, cache folder, OpenMP runtime and, where the CPU has them, tile registers."""
    tiles = [_tiles()] if product.on_this_cpu() else []
    return [_compiler(), _cache(), _threads(), *tiles]


def _compiler() -> Finding:
    compiler = build.find_compiler()
    if compiler is None:
        detail = f"{build.no_compiler()}, so only kernels that lie compiled in the cache run"
        todo = f"{build.INSTALL_HINT}, or run `attnreg build` {build.ELSEWHERE}"
        return Finding("cpu: compiler", False, detail, todo)
    return Finding("cpu: compiler", True, build.compiler_version(compiler, *build.compiler_arguments()))


def _cache() -> Finding:
    folder = library_files.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    compiles = build.find_compiler() is not None
    if compiles and not writable:
        return Finding(
            "cpu: kernel cache", False, f"{folder} cannot be written", "set ATTNREG_CACHE_DIR to a writable folder"
        )
    found = library_files.libraries()
    damaged = [path.name for path in found if not library_files.is_whole(path)]
    detail = f"{folder} holds {len(found) - len(damaged)} compiled kernels"
    if damaged:
        detail += f" and {len(damaged)} damaged or unreadable: {', '.join(damaged)}"
        again = "calls compile anew what they need" if compiles else "and run `attnreg build` where there is a compiler"
        return Finding("cpu: kernel cache", False, detail, f"delete these files: {again}")
    return Finding("cpu: kernel cache", True, detail)


def _threads() -> Finding:
    if build.openmp_entry() is None:
        return Finding(
            "cpu: threads",
            False,
            "torch has no OpenMP runtime loaded, so kernels use one thread",
            "install a torch build with OpenMP",
        )
    return Finding("cpu: threads", True, "kernels share torch's OpenMP threads")


def _tiles() -> Finding:
    if product.refused():
        return Finding(
            "cpu: AMX",
            False,
            "the operating system does not grant the CPU's tile registers, so bfloat16 is multiplied without",
            "use Linux 5.16 or newer, without a sandbox or a small alternative signal stack in the way",
        )
    return Finding("cpu: AMX", True, "granted: kernels multiply bfloat16 in tile registers")
