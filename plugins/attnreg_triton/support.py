"""Why a problem cannot run here: the machine's reasons, the flash kernels' own, and what no kernel here computes."""

from __future__ import annotations

import importlib.util
import os
import re

from attnreg import Hardware, Problem, masks, scores, sparsity

from .plan import MAX_KEYS

MIN_COMPUTE_CAPABILITY = 80
HIP_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1200", "gfx1201")
DTYPES = ("float16", "bfloat16", "float32")
MAX_HEAD_DIM = 256
MAX_INDEX = 2**31 - 1
GRADIENTS = ("q", "k", "v", "bias", "sinks")
"""Tensors whose gradients the kernels compute."""


def interpreted() -> bool:
    """Does TRITON_INTERPRET say that kernels run on CPU tensors?"""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def machine_reasons(problem: Problem, hardware: Hardware) -> list[str]:
    """Reasons that lie in the machine: no Triton, tensors on the CPU, a GPU that is too old or unknown."""
    if importlib.util.find_spec("triton") is None:
        return ["the triton package is not installed: pip install attnreg[triton]"]
    if problem.device == "cpu":
        if interpreted():
            return []
        return ["q is on the CPU: Triton kernels need a CUDA or HIP device (TRITON_INTERPRET=1 runs them here, slowly)"]
    if problem.device != "cuda":
        return [f"q is on device {problem.device!r}: Triton kernels need a CUDA or HIP device"]
    arch = hardware.arch
    if hardware.kind == "hip":
        if arch not in HIP_ARCHITECTURES:
            return [f"GPU architecture {arch} is none of those that these kernels compile for: {HIP_ARCHITECTURES}"]
        return []
    found = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    if found is None:
        return [f"GPU architecture {arch!r} is not known; expected sm_80 or newer"]
    if int(found[1]) < MIN_COMPUTE_CAPABILITY:
        return [f"GPU architecture {arch} is too old: the kernels need sm_80 (Ampere) or newer"]
    return []


def dtype_reasons(problem: Problem) -> list[str]:
    """A reason where q, k and v do not share one of DTYPES."""
    if problem.dtype not in DTYPES:
        return [f"q is {problem.dtype}; the kernels take {', '.join(DTYPES)}"]
    if problem.kv_dtype != problem.dtype:
        return [f"k and v are stored as {problem.kv_dtype}, q is {problem.dtype}; the kernels take one dtype"]
    return []


def score_reasons(problem: Problem) -> list[str]:
    """A reason where the score is no product of q and k."""
    score = problem.spec.score
    if isinstance(score, (scores.ScaledDot, scores.Dot)):
        return []
    return [f"score {score!r}: the kernels compute scaled dot products only"]


def flash_reasons(problem: Problem) -> list[str]:
    """Reasons that lie in what is asked: forms that the flash kernels do not compute."""
    spec = problem.spec
    out = [*dtype_reasons(problem), *score_reasons(problem)]
    if not isinstance(spec.sparsity, sparsity.Dense):
        out.append(f"sparsity {spec.sparsity!r}: the kernels skip by mask bounds only; triton_block_sparse takes it")
    band = masks.as_band(spec.mask)
    if band is None:
        out.append(
            f"mask {spec.mask!r} is no band: the kernels take conjunctions of causal, one window, one prefix, padding "
            "and documents; triton_block_sparse takes it"
        )
    elif spec.align == "offset" and max(band.left or 0, band.right or 0) >= MAX_KEYS:
        out.append(f"mask {spec.mask!r} with align='offset': the kernels count positions to windows below {MAX_KEYS}")
    return out + size_reasons(problem) + gradient_reasons(problem)


def gradient_reasons(problem: Problem) -> list[str]:
    """Reasons that lie in the gradients that are asked for."""
    out = [f"gradient of {name}: these kernels compute none" for name in sorted(problem.grads - set(GRADIENTS))]
    if problem.spec.page_size is not None and problem.needs_grad:
        out.append(f"a paged cache has no gradient; {', '.join(sorted(problem.grads))} need one")
    return out


def size_reasons(problem: Problem) -> list[str]:
    """Reasons that lie in sizes beyond 32-bit indices."""
    out = []
    if problem.skv > MAX_KEYS or problem.total_k > MAX_INDEX:
        out.append(f"{max(problem.skv, problem.total_k)} keys: the kernels index at most {MAX_KEYS} keys a sequence")
    rows = max(problem.sq, problem.total_q) * problem.group
    if rows > MAX_INDEX or problem.batch * problem.q_heads * max(problem.sq, 1) > MAX_INDEX:
        out.append(f"{rows} packed query rows a KV head: the kernels index at most 2**31 - 1 rows in all")
    return out


def head_dim_reasons(problem: Problem, limit: int) -> list[str]:
    """A reason where a head is wider than `limit` columns, which no tile of these kernels holds."""
    wide = [(name, size) for name, size in (("q", problem.head_dim), ("v", problem.head_dim_v)) if size > limit]
    return [f"head_dim of {name} is {size}; the kernels hold at most {limit}" for name, size in wide]
