"""Compile a C++ source of this plugin into a cached shared library and load it.

A library is keyed by its sources, flags, compiler and CPU, so a change in any of them compiles anew and a cache
shared between machines never serves code for another CPU. A file lock keeps processes from compiling the same thing
twice; the finished file appears by rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from attnreg import errors

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
COMPILE_TIMEOUT = 300.0
INCLUDE = re.compile(rb'^#include "([^"]+)"', re.MULTILINE)
INSTALL_HINT = "install g++ (for instance `apt-get install g++`) or point CXX at a C++17 compiler"


class BuildError(errors.BackendError):
    """The system's compiler is missing, or refused a kernel source."""


@functools.cache
def find_compiler() -> str | None:
    """The path of the C++ compiler: CXX if set, else the first of g++, clang++, c++ on PATH; None without one."""
    named = os.environ.get("CXX")
    for candidate in (named,) if named else ("g++", "clang++", "c++"):
        path = shutil.which(candidate)
        if path is not None:
            return path
    return None


@functools.cache
def compiler_version(compiler: str) -> str:
    """The first line of `compiler --version` and its target: part of a library's key."""
    lines = []
    for flag in ("--version", "-dumpmachine"):
        done = subprocess.run([compiler, flag], capture_output=True, text=True, timeout=60, check=False)
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


def cache_dir() -> Path:
    """Where libraries are kept: `ATTNREG_CACHE_DIR`/cpu, else attnreg/cpu in `XDG_CACHE_HOME` or ~/.cache."""
    own = os.environ.get("ATTNREG_CACHE_DIR")
    if own:
        return Path(own) / "cpu"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "attnreg" / "cpu"


def architecture_flags() -> tuple[str, ...]:
    """`-march=native`, or what `ATTNREG_CPU_MARCH` names (x86-64-v3 runs the AVX2 kernels on an AVX-512 machine)."""
    chosen = os.environ.get("ATTNREG_CPU_MARCH", "native")
    flags = (f"-march={chosen}",)
    # GCC halves its vectors by default on some CPUs; the kernels are written for whole registers.
    return (*flags, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else flags


@functools.cache
def source_digest(source: str) -> str:
    """A digest of csrc/`source` and of every header of ours that it includes, directly or not."""
    digest = hashlib.sha256()
    seen: set[str] = set()
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        text = (SOURCE_DIR / name).read_bytes()
        digest.update(name.encode() + b"\0" + text)
        waiting.extend(sorted(found.decode() for found in INCLUDE.findall(text)))
    return digest.hexdigest()


def library_path(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> Path:
    """Where the library of `source` under these macros lies, or will lie once built.

    Raises BuildError without a compiler.
    """
    return _plan(source, defines, extra_flags)[0]


def build(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile csrc/`source` with `-D` macros unless the cache holds it; returns the library's path.

    Safe among threads and processes: one compiles, the others wait for its lock. Raises BuildError with the
    compiler's words.
    """
    target, command = _plan(source, defines, extra_flags)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _compile(command, target)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {target.parent}: {error}") from error
    return target


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """Load a built library and hand it torch's OpenMP entry. Calls through it release the GIL."""
    library = ctypes.CDLL(str(path))
    set_parallel = library.attnreg_set_parallel
    set_parallel.argtypes = [ctypes.c_void_p]
    set_parallel.restype = None
    set_parallel(openmp_entry())
    return library


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
            if Path(path).name.startswith(("libgomp", "libiomp", "libomp")) and path not in loaded:
                loaded.append(path)
    for path in sorted(loaded, key=lambda p: not p.startswith(torch_folder)):
        with contextlib.suppress(OSError, AttributeError):
            # RTLD_NOLOAD: only ever the runtime that is there already.
            entry = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
            return ctypes.cast(entry, ctypes.c_void_p).value
    return None


def _plan(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...]) -> tuple[Path, list[str]]:
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler found: {INSTALL_HINT}")
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    flags = [*BASE_FLAGS, *architecture_flags(), *macros, *extra_flags]
    identity = "\0".join([source_digest(source), source, *flags, compiler_version(compiler), cpu_identity()])
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    target = cache_dir() / f"{Path(source).stem}-{key}.so"
    return target, [compiler, *flags, str(SOURCE_DIR / source)]


def _compile(command: list[str], target: Path) -> None:
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    os.close(descriptor)
    try:
        try:
            done = subprocess.run(
                [*command, "-o", scratch], capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"compiling took over {COMPILE_TIMEOUT:.0f} s: {' '.join(command)}") from error
        if done.returncode != 0:
            raise BuildError(f"`{' '.join(command)}` failed with status {done.returncode}:\n{done.stderr.strip()}")
        os.replace(scratch, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # absent on Windows, where `supports` refuses before anything is built

    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
