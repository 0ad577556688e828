"""Compile a configuration's kernels for a GPU that is not here, and read off the binaries what they will cost."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnreg import Hardware, Problem, StaticReport, folders, targets

from . import estimate, static_model
from .plan import ConfigValue, Plan
from .signatures import CompileSpec
from .support import interpreted

MATRIX = ("HMMA", "HGMMA", "QGMMA", "IMMA", "QMMA", "UTCHMMA", "UTCQMMA", "OMMA")
"""SASS mnemonics of matrix products: Ampere and Ada (HMMA), Hopper (HGMMA, 8-bit QGMMA), Blackwell (UTC*MMA, QMMA)."""
TENSOR_COLUMNS = 512
"""Columns of tensor memory that a multiprocessor of sm_100 has."""


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: registers a thread, spills (bytes of stack and local memory, or spilled registers on AMD),
    shared memory in bytes, matrix instructions by mnemonic, and columns of tensor memory.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]
    tensor_columns: int = 0


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the fusion default, which spec.options sets
        made = triton.compile(source, target=gpu_target(hardware), options=dict(spec.options))
    if "cubin" in made.asm:
        binary = _read_cubin(spec.name, made.asm["cubin"], made.metadata.shared)
        return replace(binary, tensor_columns=int(getattr(made.metadata, "tmem_size", None) or 0))
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
    with tempfile.NamedTemporaryFile(suffix=".cubin", dir=folders.temporary()) as file:
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
    """Blocks that one multiprocessor holds at once: by registers, shared memory, threads and tensor memory."""
    blocks = static_model.resident(binary.registers, binary.shared, warps, hardware)
    return max(1, min(blocks, TENSOR_COLUMNS // binary.tensor_columns)) if binary.tensor_columns else blocks


class CrossCompiled:
    """What the backends share: versions, an estimate, and cross-compiling and foresight from their own plans."""

    version = ""
    earlier = ""
    """The version of the kernels that `version` left as they were: those that read neither float32 nor a bias."""
    sparse = False
    """Do its kernels walk lists of blocks, one query head each?"""
    splits = False
    """Are the keys of a sequence cut over several programs?"""

    def version_for(self, problem: Problem, hardware: Hardware) -> str:
        """The version of the kernels that serve the problem: `version` changed only those of float32 and of a bias."""
        return self.version if problem.dtype == "float32" or problem.spec.bias else self.earlier

    def estimate(self, problem: Problem, hardware: Hardware) -> float:
        """Seconds of a call, roughly: see `attnreg_triton.estimate`."""
        return estimate.seconds(problem, hardware, self.sparse, self.splits)

    def plan(self, problem: Problem, config: Mapping[str, ConfigValue]) -> Plan:
        """The plan of a problem, cut as the configuration says."""
        raise NotImplementedError

    def compile_specs(self, problem: Problem, config: Mapping[str, ConfigValue]) -> list[CompileSpec]:
        """Compiler input of every kernel that a call of the problem starts."""
        raise NotImplementedError

    def cross_compile(self, problem: Problem, config: Mapping[str, ConfigValue], target: str) -> StaticReport:
        """What the configuration's kernels show when compiled for a target; raises what the compiler raises."""
        made, kernel = report(
            problem, self.plan(problem, config), self.compile_specs(problem, config), targets.target(target)
        )
        return replace(made, culprit=_choices_of(kernel, config)) if made.refused else made

    def foresee(self, problem: Problem, config: Mapping[str, ConfigValue], target: str) -> float:
        """Modelled seconds of the configuration from its tiles alone."""
        plan, hardware = self.plan(problem, config), targets.target(target)
        return static_model.foresee(problem, plan, hardware, sparse=self.sparse)


def _choices_of(kernel: str, config: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
    """The choices that shape a kernel: its own, by prefix, and those that kernels share. Splits only cut its grid."""
    prefix = {"dq": "dq_", "dkv": "dkv_"}.get(static_model.KERNEL_TILES.get(kernel, ""), "")
    out = {}
    for name, value in config.items():
        own = name.startswith(prefix) if prefix else not name.startswith(("dq_", "dkv_"))
        shared = bool(prefix) and not name.startswith(("dq_", "dkv_")) and prefix + name not in config
        if (own or shared) and name != "splits":
            out[name] = value
    return out


def report(problem: Problem, plan: Plan, specs: Sequence[CompileSpec], hardware: Hardware) -> tuple[StaticReport, str]:
    """What the kernels of a configuration show together; refused where one does not fit or spills, which is named.

    registers, shared and spills are the largest of the kernels, occupancy the smallest, instructions and the modelled
    seconds sums.
    """
    instructions: Counter[str] = Counter()
    binaries: list[Binary] = []
    blocks: list[int] = []
    refused = culprit = ""
    seconds = 0.0
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
            culprit = spec.name
            break
        seconds += static_model.kernel_seconds(spec.name, problem, plan, hardware, blocks[-1])
    made = StaticReport(
        hardware.arch,
        registers=max((b.registers for b in binaries), default=0),
        spills=max((b.spills for b in binaries), default=0),
        shared=max((b.shared for b in binaries), default=0),
        occupancy=float(min(blocks, default=0)),
        instructions=dict(instructions),
        seconds=None if refused else float(f"{seconds:.4g}"),
        refused=refused,
    )
    return made, culprit
