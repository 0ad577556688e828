"""What `attnreg doctor` says of the native kernels."""

from __future__ import annotations

from attnreg import Finding, folders
from attnreg_cpu import build, library_files, product
from attnreg_cpu.toolchain import BuildError


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
    version = build.compiler_version(compiler, *build.compiler_arguments()) or "it does not say its version"
    for folder in folders.places("cache"):
        try:
            build.try_compiler(library_files.in_folder(folder))
        except OSError as error:
            folders.refuse("cache", folder, error)
        except BuildError as error:
            todo = f"mend it, or point CXX at one that works; or run `attnreg build` {build.ELSEWHERE}"
            return Finding("cpu: compiler", False, f"{version}: {error}", todo)
        else:
            return Finding("cpu: compiler", True, f"{version}; it builds and loads a kernel")
    return Finding("cpu: compiler", False, f"{version}; no folder to try it in", "see the kernel cache")


def _cache() -> Finding:
    said = folders.report("cache")
    passed = "; ".join(f"{fault.where}: {fault.why}" for fault in said.passed)
    compiles = not build.lacking()
    found = library_files.libraries()
    damaged = [path.name for path in found if not library_files.is_whole(path)]
    here = library_files.in_folder(said.path) if said.path is not None else "no folder"
    detail = f"{here if compiles else library_files.where()} holds {len(found) - len(damaged)} compiled kernels"
    if passed:
        detail += f" (others cannot be used: {passed})"
    if damaged:
        detail += f", and {len(damaged)} damaged or unreadable: {', '.join(damaged)}"
        again = "calls compile anew what they need" if compiles else "and run `attnreg build` where there is a compiler"
        return Finding("cpu: kernel cache", False, detail, f"delete these files: {again}")
    todo = f"set {said.variable} to a folder that can be written and whose file system lets files be executed"
    return Finding("cpu: kernel cache", not passed, detail, todo if passed else "")


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
