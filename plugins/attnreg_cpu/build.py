"""Compile a C++ source of this plugin into a cached shared library and load it.

A library is keyed by its sources, flags and CPU, and named after its compiler too, so a change in any of them compiles
anew and a cache shared between machines never serves code for another CPU. Where there is no compiler that works, what
any compiler has made of the same key serves. A file lock keeps processes from compiling the same thing twice; the
finished file appears by rename. A folder that cannot be written or executed is passed over for the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
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

from attnreg import folders
from attnreg_cpu import library_files, toolchain
from attnreg_cpu.source_text import code_of
from attnreg_cpu.toolchain import BuildError

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
ELSEWHERE = "on a machine with a compiler and the same CPU and bring its cache here"
INSTALL_HINT = "install g++ (for instance `apt-get install g++`) or point CXX at a C++17 compiler"


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


def lacking() -> str:
    """Why nothing can be compiled: no compiler, one that is known not to work, or no folder. Empty where it may."""
    compiler = find_compiler()
    if compiler is None:
        return no_compiler()
    fault = toolchain.fault(_trial_command(compiler))
    if fault:
        return f"the C++ compiler does not work: {fault}"
    if folders.chosen("cache") is None:
        folders.tell("cache", None)
        return f"no folder can keep compiled kernels: {_passed({})}"
    return ""


def try_compiler(folder: Path) -> None:
    """Let the compiler build and load a one-line kernel in `folder`, unless that is known. Raises as prove()."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"{no_compiler()}; {INSTALL_HINT}")
    toolchain.prove(_trial_command(compiler), folders.ready(folder))


@functools.cache
def compiler_version(compiler: str, *arguments: str) -> str:
    """The first line of `compiler --version` and its target: part of a library's name."""
    lines = []
    for flag in ("--version", "-dumpmachine"):
        command = [compiler, *arguments, flag]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):  # the trial says what is wrong with it
            return ""
        lines.append(done.stdout.splitlines()[0] if done.stdout.strip() else "")
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
    """Compile csrc/`source` with `-D` macros unless a cache holds it whole; returns the library's path.

    Safe among threads and processes: one compiles, the others wait for its lock. Without a compiler that works, what
    another machine's has made serves. Raises BuildError with the compiler's words, or with what is missing; its cause
    is an OSError where it is the system that lacks something, such as room on the disk.
    """
    if lacking():
        return _built_elsewhere(source, defines, extra_flags)
    planned, command = _plan(source, defines, extra_flags)
    name = planned.name
    there = library_files.found(name)
    if there is not None:
        return there
    failed: dict[Path, OSError] = {}
    for folder in folders.places("cache"):
        target = library_files.in_folder(folder) / name
        if library_files.why_refused(target):  # what was made there would be the same
            continue
        try:
            _make(command, target)
        except OSError as error:
            folders.refuse("cache", folder, error)
            failed[folder] = error
        except BuildError:
            if not lacking():
                raise
            return _built_elsewhere(source, defines, extra_flags)
        else:
            folders.tell("cache", folder)
            return target
    refused = [f"{path}: {why}" for path in library_files.of_name(name) if (why := library_files.why_refused(path))]
    why = "; ".join([*refused, _passed(failed)])
    raise BuildError(
        f"{source}: no folder can keep the compiled kernel ({why}); set ATTNREG_CACHE_DIR to one that can"
    ) from next(reversed(failed.values()), None)


def library(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Build and load. What lies where nothing can be loaded is copied to another folder. Raises BuildError."""
    while True:
        path = build(source, defines, extra_flags)
        try:
            return load(path)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and "Cannot allocate memory" in str(error):
                raise BuildError(f"{path} cannot be loaded: {error}") from OSError(errno.ENOMEM, str(error))
            copy = _copied(path) if isinstance(error, OSError) and toolchain.cannot_execute(error) else None
            if copy is not None:
                return copy
            library_files.refuse(path, f"cannot be loaded: {error}")


def ready(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...] = ()) -> Path | None:
    """The library that serves without a compiler, the newest where several have made one; None without any."""
    found = candidates(source, defines, extra_flags)
    return next((path for path in found if library_files.serves(path)), None)


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


def _trial_command(compiler: str) -> list[str]:
    return [compiler, *compiler_arguments(), *_flags({}, ())]


def _plan(source: str, defines: Mapping[str, int | str], extra_flags: tuple[str, ...]) -> tuple[Path, list[str]]:
    """Where the library will lie, unless another folder serves, and the command that makes it."""
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
    unusable = candidates(source, defines, extra_flags)
    if unusable:
        why = [library_files.why_refused(path) or "is damaged or cannot be read: delete it" for path in unusable]
        lack = "; ".join(f"{path} {said}" for path, said in zip(unusable, why, strict=True))
    else:
        macros = [f"{name}={value}" for name, value in sorted(defines.items())]
        lack = f"{library_files.where()} holds no library of {' '.join([source, *macros])}"
    raise BuildError(f"{lacking()}, and {lack}; run `attnreg build` {ELSEWHERE}, or {INSTALL_HINT}")


def _copied(path: Path) -> ctypes.CDLL | None:
    """A library that lies where nothing can be loaded, loaded from the first folder that takes a copy."""
    folders.refuse("cache", path.parent.parent, "nothing in it can be loaded (is it mounted noexec?)")
    for folder in folders.places("cache"):
        target = library_files.in_folder(folder) / path.name
        try:
            loaded = load(library_files.copy(path, target))
        except OSError as error:
            folders.refuse("cache", folder, error)
        else:
            folders.tell("cache", folder)
            return loaded
    return None


def _passed(failed: Mapping[Path, OSError]) -> str:
    """The folders that do not do, and why."""
    found = {fault.where: fault.why for fault in folders.report("cache").passed}
    found |= {str(folder): error.strerror or str(error) for folder, error in failed.items()}
    return "; ".join(f"{where}: {why}" for where, why in found.items())


def _make(command: list[str], target: Path) -> None:
    """Compile into the folder of `target` unless another process does so first. Raises BuildError, OSError."""
    folder = folders.ready(target.parent)
    with library_files.locked(target.with_suffix(".lock")):
        if not library_files.serves(target):
            try_compiler(folder)
            _compile(command, target)


def _compile(command: list[str], target: Path) -> None:
    # The compiler itself makes the file in a folder of ours, so that the umask decides who may read it.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.stem, suffix=".tmp") as folder:
        scratch = Path(folder) / target.name
        toolchain.run(command, scratch)
        library_files.seal(scratch)
        os.replace(scratch, target)
