"""Compile a configuration's kernels for a GPU that is not here, and read off the binaries what they will cost."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnreg import Hardware, Problem, StaticReport

from . import static_model
from .plan import Plan
from .signatures import CompileSpec
from .support import interpreted

MATRIX = ("HMMA", "HGMMA", "QGMMA", "IMMA", "QMMA", "UTCHMMA", "UTCQMMA", "OMMA")
"""SASS mnemonics of matrix products: Ampere and Ada (HMMA), Hopper (HGMMA, 8-bit QGMMA), Blackwell (UTC*MMA, QMMA)."""
RESERVED = 1024
"""Bytes of shared memory that CUDA keeps for itself in each resident block."""


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: registers a thread, spills (bytes of stack and local memory, or spilled registers on AMD),
    shared memory in bytes, and matrix instructions by mnemonic.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]


def gpu_target(hardware: Hardware) -> Any:
    """Triton's name of an architecture."""
    from triton.backends.compiler import GPUTarget

    if hardware.kind == "hip":
        return GPUTarget("hip", hardware.arch, hardware.warp_size)
    return GPUTarget("cuda", int(hardware.arch.removeprefix("sm_")), 32)


def compile_kernel(spec: CompileSpec, hardware: Hardware) -> Binary:
    """Compile one kernel; raises what the compiler raises. Triton keeps binaries on disk, so a second time is cheap."""
    import triton
    from triton.compiler import ASTSource

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels were loaded for the interpreter and cannot be compiled")
    source = ASTSource(spec.fn, dict(spec.signature), dict(spec.constexprs), dict(spec.attrs))
    made = triton.compile(source, target=gpu_target(hardware), options=dict(spec.options))
    if "cubin" in made.asm:
        return _read_cubin(spec.name, made.asm["cubin"], made.metadata.shared)
    return _read_amdgcn(spec.name, made.asm["amdgcn"], made.metadata.shared)


@lru_cache(maxsize=4096)
def _read_cubin(name: str, cubin: bytes, shared: int) -> Binary:
    usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{name}: cuobjdump names no registers: {usage[:200]}")
    assembly = _tool("nvdisasm", "-c", cubin)
    words = Counter(re.findall(r"\b([A-Z]{3,8})(?:\.[\w.]+)? ", assembly))
    # STACK alone may be an array of the ABI: a spill is what is stored to or loaded from local memory.
    spills = words["STL"] + words["LDL"]
    stack = (int(found[2]) + int(found[3])) if spills else 0
    return Binary(name, int(found[1]), max(spills, stack), shared, {x: words[x] for x in MATRIX if words[x]})


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(name: str, text: str, shared: int) -> Binary:
    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    spills = number(r"\.vgpr_spill_count:\s*(\d+)") + number(r"ScratchSize:\s*(\d+)")
    registers = number(r"\.vgpr_count:\s*(\d+)")
    words = {x: n for x in ("v_mfma", "v_wmma") if (n := len(re.findall(rf"\b{x}_", text)))}
    return Binary(name, registers, spills, shared, words)


def occupancy(binary: Binary, warps: int, hardware: Hardware) -> int:
    """Blocks that one multiprocessor holds at once: by registers, shared memory and threads; at least 1."""
    threads = warps * hardware.warp_size
    limits = []
    if binary.registers:
        # Registers are handed out in eights a thread.
        limits.append(hardware.registers // (-(-binary.registers // 8) * 8 * threads))
    if binary.shared:
        reserved = RESERVED if hardware.kind == "cuda" else 0
        limits.append((hardware.shared_memory + reserved) // (binary.shared + reserved))
    if hardware.threads:
        limits.append(hardware.threads // threads)
    return max(1, min(limits, default=1))


def report(problem: Problem, plan: Plan, specs: Sequence[CompileSpec], hardware: Hardware) -> StaticReport:
    """What the kernels of a configuration show together; refused where one does not fit or spills.

    registers, shared and spills are the largest of the kernels, occupancy the smallest, instructions and the modelled
    seconds sums.
    """
    instructions: Counter[str] = Counter()
    binaries, refused = [], ""
    seconds = 0.0
    blocks: list[int] = []
    for spec in specs:
        binary = compile_kernel(spec, hardware)
        binaries.append(binary)
        instructions.update(binary.instructions)
        blocks.append(occupancy(binary, int(spec.options["num_warps"]), hardware))
        if binary.shared > hardware.shared_memory:
            refused = f"{spec.name}: {binary.shared} bytes of shared memory of {hardware.shared_memory}"
        elif binary.spills:
            refused = f"{spec.name}: spills ({binary.spills} bytes or instructions) at {binary.registers} registers"
        if refused:
            break
        seconds += static_model.kernel_seconds(spec.name, problem, plan, hardware, blocks[-1])
    return StaticReport(
        hardware.arch,
        registers=max((b.registers for b in binaries), default=0),
        spills=max((b.spills for b in binaries), default=0),
        shared=max((b.shared for b in binaries), default=0),
        occupancy=float(min(blocks, default=0)),
        instructions=dict(instructions),
        seconds=None if refused else float(f"{seconds:.4g}"),
        refused=refused,
    )
