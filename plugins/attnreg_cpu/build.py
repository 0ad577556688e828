"""Compile a C++ source of this plugin into a cached shared library and load it.

A library is keyed by its sources, flags and CPU, and named after its compiler too, so a change in any of them compiles
anew and a cache shared between machines never serves code for another CPU. Where there is no compiler, what any
compiler has made of the same key serves. A file lock keeps processes from compiling the same thing twice; the finished
file appears by rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from attnreg import errors
from attnreg_cpu import library_files
from attnreg_cpu.source_text import code_of

SOURCE_DIR = Path(__file__).parent / "csrc"
BASE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    # GCC 12 warns of its own AVX-512 headers.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
COMPILERS = ("g++", "clang++", "c++")
COMPILE_TIMEOUT = 300.0
ELSEWHERE = "on a machine with a compiler and the same CPU and bring its cache here"
INSTALL_HINT = "install g++ (for instance `apt-get install g++`) or point CXX at a C++17 compiler"


class BuildError(errors.BackendError):
    """The system's compiler is missing, or refused a kernel source."""


@functools.cache
def find_compiler() -> str | None:
    """The path of the C++ compiler: CXX if set, else the first of g++, clang++, c++ on PATH; None without one."""
    for candidate in _named()[:1] or COMPILERS:
        path = shutil.which(candidate)
        if path is not None:
            return path
    return None


def compiler_arguments() -> list[str]:
    """What CXX names behind the program: `-m64` of "g++ -m64", `g++` of "ccache g++"."""
    return _named()[1:]


def no_compiler() -> str:
    """What was looked for, where find_compiler() finds none."""
    named = os.environ.get("CXX", "")
    looked = f"CXX is {named!r}, which is no program here" if _named() else f"none of {', '.join(COMPILERS)} is on PATH"
    return f"no C++ compiler: {looked}"


@functools.cache
def compiler_version(compiler: str, *arguments: str) -> str:
    """The first line of `compiler --version` and its target: part of a library's name."""
    lines = []
    for flag in ("--version", "-dumpmachine"):
        command = [compiler, *arguments, flag]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        lines.append(done.stdout.splitlines()[0] if done.stdout else "")
    return " ".join(lines)


@functools.cache
def cpu_identity() -> str:
    """What decides which instructions -march=native may emit: the CPU's model and its feature flags."""
    fields = {"model name", "flags", "Features", "CPU part", "CPU implementer"}
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in fields:
                found.setdefault(name.strip(), value.strip())
    return f"{platform.machine()} {sorted(found.items())}"


def architecture_flags() -> tuple[str, ...]:
    """`-march=native`, or what `ATTNREG_CPU_MARCH` names (x86-64-v3 runs the AVX2 kernels on an AVX-512 machine)."""
    chosen = os.environ.get("ATTNREG_CPU_MARCH", "native")
    flags = (f"-march={chosen}",)
    # GCC halves its vectors by default on some CPUs; the kernels are written for whole registers.
    return (*flags, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else flags


@functools.cache
def source_digest(source: str) -> str:
    """A digest of the code of csrc/`source` and of every header of ours that it includes, directly or not.

    Comments, blank lines and the names of files change nothing, as they change no library.
    """
    return hashlib.sha256(code_of(source, SOURCE_DIR).encode()).hexdigest()


def library_path(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> Path:
    """Where the library of `source` under these macros lies, or will lie once built.

    Raises BuildError without a compiler.
    """
    return _plan(source, defines, extra_flags)[0]


def library_key(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> str:
    """A digest of all that decides what a library does, and on which CPU it runs."""
    identity = [source_digest(source), source, *_flags(defines, extra_flags), cpu_identity()]
    return _digest(identity)[:24]


def build(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile csrc/`source` with `-D` macros unless the cache holds it whole; returns the library's path.

    Safe among threads and processes: one compiles, the others wait for its lock. Without a compiler, what another
    machine's has made serves. Raises BuildError with the compiler's words, or with what is missing.
    """
    if find_compiler() is None:
        return _built_elsewhere(source, defines, extra_flags)
    target, command = _plan(source, defines, extra_flags)
    if library_files.is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with library_files.locked(target.with_suffix(".lock")):
            if not library_files.is_whole(target):
                _compile(command, target)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {target.parent}: {error}") from error
    return target


def ready(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> Path | None:
    """The library that serves without a compiler, the newest where several have made one; None without any."""
    found = candidates(source, defines, extra_flags)
    return next((path for path in found if library_files.is_whole(path)), None)


def candidates(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> list[Path]:
    """The files of the cache, whole or damaged, that would serve without a compiler; the newest first."""
    return library_files.of_key(source, library_key(source, defines, extra_flags))


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """Load a built library and hand it torch's OpenMP entry. Calls through it release the GIL."""
    library = ctypes.CDLL(str(path))
    set_parallel = library.attnreg_set_parallel
    set_parallel.argtypes = [ctypes.c_void_p]
    set_parallel.restype = None
    set_parallel(openmp_entry())
    return library


def is_openmp(path: str) -> bool:
    """Is a file that is mapped into this process an OpenMP runtime?"""
    return Path(path).name.startswith(("libgomp", "libiomp", "libomp"))


@functools.cache
def openmp_entry() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded, or None: kernels then use one thread.

    torch's own folder is preferred, because another package (scikit-learn, say) may have brought a second runtime.
    """
    torch_folder = str(Path(torch.__file__).parent)
    loaded: list[str] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if is_openmp(path) and path not in loaded:
                loaded.append(path)
    for path in sorted(loaded, key=lambda p: not p.startswith(torch_folder)):
        with contextlib.suppress(OSError, AttributeError):
            # RTLD_NOLOAD: only ever the runtime that is there already.
            entry = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
            return ctypes.cast(entry, ctypes.c_void_p).value
    return None


def _named() -> list[str]:
    """The words of CXX: a program, and perhaps arguments of its own. Empty where it is not set."""
    named = os.environ.get("CXX", "")
    try:
        return shlex.split(named)
    except ValueError:  # a quote that nothing closes
        return [named]


def _flags(defines: Mapping[str, int | str], extra_flags: tuple[str, ...]) -> list[str]:
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    return [*BASE_FLAGS, *architecture_flags(), *macros, *extra_flags]


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _plan(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...]) -> tuple[Path, list[str]]:
    compiler, arguments = find_compiler(), compiler_arguments()
    if compiler is None:
        raise BuildError(f"{no_compiler()}; {INSTALL_HINT}")
    made_by = _digest([compiler_version(compiler, *arguments), *arguments])[:8]
    target = library_files.path_of(source, library_key(source, defines, extra_flags), made_by)
    return target, [compiler, *arguments, *_flags(defines, extra_flags), str(SOURCE_DIR / source)]


def _built_elsewhere(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...]) -> Path:
    found = ready(source, defines, extra_flags)
    if found is not None:
        return found
    damaged = candidates(source, defines, extra_flags)
    if damaged:
        lack = f"{', '.join(map(str, damaged))} is damaged or cannot be read: delete it"
    else:
        macros = [f"{name}={value}" for name, value in sorted(defines.items())]
        lack = f"{library_files.cache_dir()} holds no library of {' '.join([source, *macros])}"
    raise BuildError(f"{no_compiler()}, and {lack}; run `attnreg build` {ELSEWHERE}, or {INSTALL_HINT}")


def _compile(command: list[str], target: Path) -> None:
    # The compiler itself makes the file in a folder of ours, so that the umask decides who may read it.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.stem, suffix=".tmp") as folder:
        scratch = Path(folder) / target.name
        try:
            done = subprocess.run(
                [*command, "-o", str(scratch)], capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"compiling took over {COMPILE_TIMEOUT:.0f} s: {' '.join(command)}") from error
        if done.returncode != 0:
            raise BuildError(f"`{' '.join(command)}` failed with status {done.returncode}:\n{done.stderr.strip()}")
        library_files.seal(scratch)
        os.replace(scratch, target)
