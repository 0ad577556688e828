"""The `flex` backend: what compiled FlexAttention can say, its block sizes, and its cost."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnreg import Hardware, Problem, SearchSpace, blocks, masks, scores, sparsity
from attnreg_flex.call import Call
from attnreg_flex.cpu_faults import WRONG_DIMS

__all__ = ["Flex", "compiler_missing"]

HALF = ("float16", "bfloat16")


class Flex:
    """torch.nn.attention.flex_attention, compiled, with mask and score modifiers derived from the spec."""

    name = "flex"
    version = f"1+torch{torch.__version__}"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason why FlexAttention cannot compute the problem exactly; empty if it can."""
        spec = problem.spec
        out = []
        if problem.device not in ("cpu", "cuda"):
            out.append(f"device {problem.device!r}: FlexAttention is used on the CPU and on CUDA or HIP devices only")
        if problem.traced:
            out.append("under a trace: FlexAttention needs a compilation of its own, which cannot lie inside another")
        if isinstance(spec.score, scores.Additive):
            out.append("score Additive(): a score_mod sees the product of q and k, not q and k themselves")
        if spec.dropout_p:
            out.append("dropout_p: FlexAttention draws no dropout")
        if spec.layout == "thd":
            out.append("layout 'thd': positions within packed sequences are not derived here; use bhsd or bshd")
        if problem.dtype not in ("float32", *HALF):
            out.append(f"dtype {problem.dtype}: FlexAttention computes in float32, float16 and bfloat16")
        if problem.kv_dtype != problem.dtype:
            out.append(f"k and v stored as {problem.kv_dtype}: FlexAttention takes one dtype for q, k and v")
        if "alibi_slopes" in problem.grads:
            out.append("gradient of alibi_slopes: it is not verified for what a score_mod reads by head")
        if spec.deterministic and problem.needs_grad:
            out.append("deterministic: gradients of captured tensors are added atomically and do not repeat")
        return out + (_cpu_reasons(problem) if problem.device == "cpu" else [])

    def version_for(self, problem: Problem, hardware: Hardware) -> str:
        """Head dimensions that torch's own code gets wrong run wider than they did."""
        repaired = problem.device == "cpu" and problem.head_dim_k in WRONG_DIMS
        return f"2+torch{torch.__version__}" if repaired else self.version

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """block_q, block_kv: rows and keys of a block that is skipped or run as one. upcast: as for SDPA."""
        on_cpu = problem.device == "cpu"
        sizes = (32, 64, 128, 256) if on_cpu else (128, 256)
        choices: dict[str, tuple[int | bool, ...]] = {"block_q": sizes, "block_kv": sizes}
        best = {"block_q": 64, "block_kv": 64} if on_cpu else {"block_q": 128, "block_kv": 128}
        default: dict[str, int | bool] = dict(best)
        if on_cpu and problem.dtype in HALF:
            choices["upcast"] = (True, False)
            default["upcast"] = True
        return SearchSpace(choices=choices, default=default)

    def prepare(self, problem: Problem, config: Mapping[str, Any]) -> Callable[..., Any]:
        """`run(q, k, v, **tensors)` for the problem's bucket. Compiles at the first call, for some 10 seconds."""
        return Call(problem, config)

    def estimate(self, problem: Problem, hardware: Hardware) -> float:
        """Seconds once compiled: live blocks at the rate that the generated code reaches, and a fixed cost a call."""
        spec = problem.spec
        offset = 0 if spec.align == "top_left" else None
        live = blocks.live_pairs(spec.mask, spec.sparsity, problem.sq, problem.skv, offset=offset)
        pairs = live.count
        if isinstance(spec.sparsity, sparsity.Blocks):
            pairs = min(pairs, problem.sq * problem.skv)
        # Blocks at the edge of the pattern are computed whole.
        edge = 64 * min(problem.sq, problem.skv)
        pairs = min(pairs + edge, problem.sq * problem.skv) * problem.batch * problem.q_heads
        flops = 2 * pairs * (problem.head_dim_k + problem.head_dim_v)
        moved = 4 * problem.batch * problem.q_heads * live.keys * (problem.head_dim_k + problem.head_dim_v)
        if hardware.kind == "cpu":
            wide = 2.0 if hardware.arch in ("avx512", "amx") else 1.0 if hardware.arch == "avx2" else 0.5
            # Measured on two AVX2 cores: 60 to 80 GFLOP/s in all, less where modifiers run pair by pair.
            rate = 35e9 * wide * hardware.cores / (1.3 if spec.softcap or spec.alibi or spec.bias else 1.0)
            return 150e-6 + flops / rate + moved / (hardware.bandwidth or 12e9 * min(hardware.cores, 8))
        per_unit = {"sm_80": 1.2e12, "sm_90": 2.5e12, "sm_100": 4e12}.get(hardware.arch, 0.8e12)
        # As seen on an H200: 2.5e12 under a causal mask, 1e12 under a window with heads of 256 and softcap, 0.3e12
        # under Longformer's mask, 0.03e12 under BigBird's pattern.
        per_unit /= 2.5 if max(problem.head_dim_k, problem.head_dim_v) > 128 else 1
        per_unit /= 80 if not isinstance(spec.sparsity, sparsity.Dense) else 1 if masks.as_band(spec.mask) else 8
        rate = (per_unit if problem.dtype in HALF else per_unit / 8) * hardware.cores
        return 60e-6 + (3.5 if problem.needs_grad else 1.0) * (flops / rate + moved / (hardware.bandwidth or 1e12))


def _cpu_reasons(problem: Problem) -> list[str]:
    spec = problem.spec
    out = []
    if problem.needs_grad:
        out.append("gradients on the CPU: torch's FlexAttention has no backward there")
    if spec.return_lse:
        out.append("return_lse on the CPU: torch's compiled FlexAttention returns no lse there")
    if spec.sinks:
        out.append("sinks on the CPU: they join the denominator through the lse, which is not returned there")
    missing = compiler_missing()
    return [*out, missing] if missing else out


@functools.lru_cache(maxsize=1)
def compiler_missing() -> str:
    """Why torch cannot compile for this CPU; empty if it can."""
    # The conditions of torch's own lowering, which raises deep inside the compiler.
    if not torch.cpu._is_avx2_supported() or os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        return "torch compiles FlexAttention only for CPUs with AVX2 that ATEN_CPU_CAPABILITY leaves in use"
    if sys.platform == "darwin" or torch.xpu.is_available():
        return "torch compiles FlexAttention for the CPU neither on macOS nor beside an XPU"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"torch.compile finds no C++ compiler: install g++ or clang++, or set CXX ({said})"
    return ""
