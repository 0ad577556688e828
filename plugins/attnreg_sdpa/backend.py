"""The `sdpa` backend: what torch's scaled_dot_product_attention can say, its choices, and its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnreg import Hardware, Problem, SearchSpace, scores, sparsity
from attnreg_sdpa.call import prepared
from attnreg_sdpa.pairs import causal_form

__all__ = ["Sdpa"]

HALF = ("float16", "bfloat16")
MASK_SHARE = 0.25  # of the memory, at most, for the dense mask


class Sdpa:
    """torch.nn.functional.scaled_dot_product_attention, each of its kernels a choice."""

    name = "sdpa"
    version = f"1+torch{torch.__version__}"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason why SDPA cannot compute the problem exactly; empty if it can."""
        spec = problem.spec
        on_cpu = problem.device == "cpu"
        lse = [word for word, said in (("return_lse", spec.return_lse), ("sinks", spec.sinks)) if said]
        out = []
        if problem.device not in ("cpu", "cuda"):
            out.append(f"device {problem.device!r}: SDPA is used on the CPU and on CUDA or HIP devices only")
        if isinstance(spec.score, scores.Additive):
            out.append("score Additive(): SDPA's kernels compute dot products only")
        if spec.softcap:
            out.append(f"softcap={spec.softcap}: SDPA has no place between the scores and the mask to cap them")
        if lse and not on_cpu:
            out.append(f"{' and '.join(lse)}: SDPA returns no lse; of torch's kernels only the CPU's is used for it")
        if lse and spec.dropout_p:
            out.append(f"{' and '.join(lse)} with dropout_p: the kernel that returns the lse draws no dropout")
        if lse and _added(problem):
            names = " and ".join("the bias" if name == "bias" else name for name in sorted(_added(problem)))
            out.append(f"{' and '.join(lse)} with a gradient of {names}: the kernel that returns the lse has none")
        if spec.sinks and spec.bias and "sinks" in problem.grads:
            out.append("gradient of sinks with a bias: there they are a key of the mask, whose gradient no kernel has")
        if spec.layout == "thd" and not on_cpu:
            out.append("layout 'thd': splitting the packed sequences would read cu_seqlens back from the device")
        if problem.traced and spec.layout == "thd":
            out.append("layout 'thd' under a trace: splitting the packed sequences reads the values of cu_seqlens")
        if problem.traced and isinstance(spec.sparsity, sparsity.BigBird) and spec.sparsity.random_blocks:
            out.append("sparsity BigBird under a trace: its random blocks are drawn on the host")
        if problem.traced and problem.needs_grad and spec.bias:
            out.append(
                "gradients with a bias under a trace: the backward of torch's kernels makes weights of a rounded lse, "
                "which holds nothing of a row whose values are all at the lowest numbers, and a trace reads none"
            )
        if spec.deterministic and problem.needs_grad and not on_cpu:
            out.append("deterministic: the backward of torch's GPU kernels adds atomically and does not repeat")
        return out + _memory(problem, hardware)

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """kernel: which of torch's. grouping: how query heads share keys. upcast: half precision run in float32."""
        choices: dict[str, tuple[str | bool, ...]] = {"kernel": _kernels(problem)}
        default: dict[str, str | bool] = {}
        constraints: list[tuple[str, Callable[[Mapping[str, Any]], bool]]] = []
        if problem.group > 1:
            # Reshaping rows of symbolic number adds guards to a trace; one row needs no reshape of the sizes.
            may_pack = _form(problem) != "causal" and (not problem.traced or problem.sq == 1)
            choices["grouping"] = ("pack", "enable_gqa", "expand") if may_pack else ("enable_gqa", "expand")
            if problem.device != "cpu":
                constraints.append(
                    (
                        "torch's efficient kernel takes as many key heads as query heads",
                        lambda config: config["kernel"] != "efficient" or config["grouping"] != "enable_gqa",
                    )
                )
            # Packing multiplies the rows of a dense mask; beyond a few rows the keys are reused in cache anyway. GPU
            # kernels read grouped keys once by themselves, and split them: decoding one sequence of 8K keys took
            # 98 us packed and 11 us grouped on an H200.
            few = _form(problem) == "none" or problem.sq <= 16
            packs = may_pack and few and (problem.device == "cpu" or _math_alone(problem))
            default["grouping"] = "pack" if packs else "enable_gqa"
            if problem.device != "cpu" and choices["kernel"][0] == "efficient":
                default["grouping"] = "expand"
        if problem.device == "cpu" and problem.dtype in HALF and problem.kv_dtype == problem.dtype:
            choices["upcast"] = (True, False)
            # Converting k and v pays off only where they are used often.
            default["upcast"] = problem.sq * problem.group >= 16 or problem.needs_grad
        return SearchSpace(choices=choices, default=default, constraints=constraints)

    def prepare(self, problem: Problem, config: Mapping[str, Any]) -> Callable[..., Any]:
        """`run(q, k, v, **tensors)` for the problem's bucket."""
        return prepared(problem, config)

    def estimate(self, problem: Problem, hardware: Hardware) -> float:
        """Seconds, from flops and bytes at the rates that SDPA reaches, and its habits: see `_rates`."""
        flop_rate, bandwidth, call = _rates(problem, hardware)
        form = _form(problem)
        pairs = problem.batch * problem.q_heads * problem.sq * problem.skv
        # Only its own causal mask lets the kernel skip anything; a dense mask is read and skips nothing.
        flops = 2 * pairs * (problem.head_dim_k + problem.head_dim_v) * (0.55 if form == "causal" else 1.0)
        size = 4 if problem.device == "cpu" else 2
        moved = problem.batch * problem.kv_heads * problem.skv * (problem.head_dim_k + problem.head_dim_v) * size
        if form == "mask" or problem.spec.bias or problem.spec.alibi:
            moved += problem.sq * problem.skv * size * _mask_copies(problem)
            call += 20e-6
            if problem.device != "cpu" and problem.needs_grad:
                flop_rate /= 2.5  # torch's efficient kernel, which is all that serves there
        if problem.device != "cpu" and _math_alone(problem):
            # Decoding latent heads took 80 ms on an H200 that others do in 0.3.
            flop_rate, moved = flop_rate / 200, moved + 4 * pairs * size
        passes = 3.5 if problem.needs_grad else 1.0
        return call + passes * (flops / flop_rate + moved / bandwidth)


def _added(problem: Problem) -> frozenset[str]:
    """Of what is added to the scores with the mask, that which needs a gradient."""
    return problem.grads & {"bias", "alibi_slopes"}


def _form(problem: Problem) -> str:
    form = causal_form(problem.spec, problem.sq, problem.skv, problem.spec.layout == "thd")
    if form == "causal" and problem.spec.align == "bottom_right" and not problem.square:
        return "mask"
    return form


def _kernels(problem: Problem) -> tuple[str, ...]:
    spec = problem.spec
    masked = _form(problem) == "mask" or spec.bias or spec.alibi
    if problem.device == "cpu":
        if spec.return_lse or spec.sinks:
            return ("flash",)
        # Dropout and a gradient of the mask exist in torch's math path only, which "auto" then takes.
        return ("auto",) if spec.dropout_p or _added(problem) else ("auto", "flash", "math")
    if problem.needs_grad and spec.bias:
        # The others make weights of a rounded lse in the backward pass: of a row whose bias is everywhere at the lowest
        # numbers it holds nothing but them, and each weight would be 1.
        return ("math",)
    half = problem.dtype in HALF and problem.kv_dtype == problem.dtype
    if half and masked and problem.needs_grad:
        # Where torch chooses, gradients beside a dense mask came out NaN on an H200 (torch 2.11): all of dq at 448 and
        # 4,032 rows of bfloat16 with low scores.
        return ("efficient", "math")
    out = ["auto"]
    if half and not masked and problem.head_dim_k == problem.head_dim_v <= 256:
        out.append("flash")
    out.append("efficient")
    if half and not _added(problem) and max(problem.head_dim_k, problem.head_dim_v) <= 128:
        out.append("cudnn")
    return (*out, "math")


def _math_alone(problem: Problem) -> bool:
    """On a GPU: are the heads too wide for all but torch's math path?"""
    return max(problem.head_dim_k, problem.head_dim_v) > 256


def _mask_copies(problem: Problem) -> int:
    """How many [Sq, Skv] planes the dense mask has: over batch and query heads, as far as they differ."""
    spec = problem.spec
    needs = spec.mask.tensors() | spec.sparsity.tensors()
    by_head = spec.alibi or isinstance(spec.sparsity, sparsity.BigBird)
    by_batch = bool(needs - {"attn_mask", "block_mask"}) or spec.align == "offset"
    by_batch |= any(t.name == "seqused_k" for t in problem.tensors)
    for name in ("attn_mask", "block_mask", "bias"):
        info = problem.info(name)
        if info is not None:
            dims = (1,) * (4 - len(info.dims)) + info.dims
            by_batch |= not dims[0]
            by_head |= not dims[1]
    return (problem.batch if by_batch else 1) * (problem.q_heads if by_head else 1)


def _memory(problem: Problem, hardware: Hardware) -> list[str]:
    if not hardware.memory or not (_form(problem) == "mask" or problem.spec.bias or problem.spec.alibi):
        return []
    size = problem.sq * problem.skv * 4 * (1 if problem.spec.layout == "thd" else _mask_copies(problem))
    if size <= MASK_SHARE * hardware.memory:
        return []
    return [
        f"the mask: as a dense tensor it takes {size / 2**30:.1f} GiB of the {hardware.memory / 2**30:.1f} GiB "
        f"of this {hardware.kind}"
    ]


def _rates(problem: Problem, hardware: Hardware) -> tuple[float, float, float]:
    """Flops a second, bytes a second and seconds a call that SDPA reaches.

    CPU: about 57 GFLOP/s a core with 256-bit vectors and twice that with 512 (measured: 113 GFLOP/s on two cores
    of an AVX2 machine); a dozen bytes a nanosecond a core. GPU: half of what tensor cores promise
    (an H200: 535 TFLOP/s causal, 609 full, heads of 128).
    """
    if hardware.kind == "cpu":
        wide = 2.0 if hardware.arch in ("avx512", "amx") else 1.0 if hardware.arch == "avx2" else 0.5
        cores = min(hardware.cores, max(1, problem.batch * problem.q_heads * -(-problem.sq // 32)))
        return 57e9 * wide * cores, hardware.bandwidth or 15e9 * min(cores, 8), 5e-6
    half = problem.dtype in HALF
    per_unit = {"sm_80": 1.4e12, "sm_90": 4e12, "sm_100": 7e12}.get(hardware.arch, 1e12)
    return (per_unit if half else per_unit / 8) * hardware.cores, hardware.bandwidth or 1e12, 15e-6
