"""The backend of the native prefill kernels."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import Hardware, Problem, SearchSpace, scores, sparsity
from attnreg_cpu import build
from attnreg_cpu.arguments import Arguments, dense_rows
from attnreg_cpu.conjunction import read_conjunction
from attnreg_cpu.gradient import Differentiable
from attnreg_cpu.tuning_space import kernel_space
from attnreg_cpu.variant import ELEMENTS, Kernel, Variant, check_status

MAX_HEAD_DIM = 1024  # the kernels unroll nothing over it; beyond, a tile would leave the caches


class NativeBackend:
    """Attention by C++ kernels compiled for this CPU: tiled online softmax with query rows in vector lanes."""

    name = "cpu"

    def __init__(self) -> None:
        digests = build.source_digest("forward.cpp") + build.source_digest("backward.cpp")
        self.version = hashlib.sha256(digests.encode()).hexdigest()[:12]  # changes with any kernel source

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason why the problem cannot be computed exactly as said; empty if it can."""
        return [*_machine_reasons(problem), *_spec_reasons(problem)]

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """Micro-kernel shape, tiles of an item, keys of a run, packing, bfloat16 products."""
        return kernel_space(problem, hardware)

    def prepare(self, problem: Problem, config: Mapping[str, int | str | float | bool]) -> Any:
        """Compile (or find) the kernel and return run(q, k, v, **tensors)."""
        mask = read_conjunction(problem.spec.mask)
        assert mask is not None, "supports() refuses other masks"
        settings = {name: int(config[name]) for name in ("block_kv", "tiles", "pack")}
        arguments = Arguments(problem, mask, settings)
        forward = Forward(problem, _variant("forward.cpp", problem, config).kernel("attnreg_forward"), arguments)
        if not problem.needs_grad:
            return forward
        kernel = _variant("backward.cpp", problem, config).kernel("attnreg_backward")
        return Differentiable(forward, kernel, arguments)


class Forward:
    """run(q, k, v, **tensors) of one prepared problem, without gradients."""

    def __init__(self, problem: Problem, kernel: Kernel, arguments: Arguments) -> None:
        self._kernel = kernel
        self._arguments = arguments
        self._head_dim_v = problem.head_dim_v
        self.layout = problem.spec.layout
        self._page_size = problem.spec.page_size
        self.return_lse = problem.spec.return_lse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        out, lse = self.compute(q, k, v, tensors, self.return_lse)
        return (out, lse) if self.return_lse else out

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(out, lse or None)."""
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        out = torch.empty(*q.shape[:-1], self._head_dim_v, dtype=q.dtype)
        batch, skv = self.sizes(q, k, tensors)
        lse = None
        if with_lse:
            lse = torch.empty(q.shape[:-1] if self.layout == "bhsd" else _heads_first(q), dtype=torch.float32)
        tail, kept = self._arguments.tail(tensors)
        check_status(self._kernel(self._arguments.head(q, k, v, out, lse, batch, skv) + tail))
        del kept
        return out, lse

    def sizes(self, q: Tensor, k: Tensor, tensors: Mapping[str, Any]) -> tuple[int, int]:
        """Sequences of the call, and key rows of a padded one (paged: of a full table)."""
        batch = q.shape[0] if self.layout != "thd" else tensors["cu_seqlens_q"].shape[0] - 1
        if self._page_size is not None:
            return batch, tensors["block_table"].shape[1] * self._page_size
        return batch, k.shape[2] if self.layout == "bhsd" else k.shape[-3]


def _variant(source: str, problem: Problem, config: Mapping[str, int | str | float | bool]) -> Variant:
    return Variant(
        source, problem.head_dim, problem.head_dim_v, problem.dtype, int(config["vectors"]), bool(config["pairs"])
    )


def _heads_first(q: Tensor) -> tuple[int, ...]:
    """Shape of lse for q [B, Sq, Hq, D] or [T, Hq, D]."""
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def _machine_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"device {problem.device}: the native kernels run on the CPU only")
    if not sys.platform.startswith("linux"):
        reasons.append(f"platform {sys.platform}: the native kernels are built on Linux only")
    elif build.find_compiler() is None:
        reasons.append(f"no C++ compiler: {build.INSTALL_HINT}")
    return reasons


def _spec_reasons(problem: Problem) -> list[str]:
    spec = problem.spec
    reasons = []
    if problem.dtype not in ELEMENTS:
        reasons.append(f"dtype {problem.dtype}: the native kernels take {', '.join(ELEMENTS)}")
    if problem.kv_dtype != problem.dtype:
        reasons.append(f"k and v of {problem.kv_dtype} beside q of {problem.dtype}: prefill takes one dtype")
    if not isinstance(spec.score, (scores.ScaledDot, scores.Dot)):
        reasons.append(f"score {spec.score!r}: only scaled and plain dot products")
    if spec.dropout_p:
        reasons.append(f"dropout_p={spec.dropout_p}: the native kernels draw no random numbers")
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        reasons.append(f"head_dim {problem.head_dim} and {problem.head_dim_v}: at most {MAX_HEAD_DIM}")
    if max(problem.sq, problem.skv) >= 2**31:
        reasons.append(f"{max(problem.sq, problem.skv)} rows: positions are 32-bit in the kernels")
    if read_conjunction(spec.mask) is None:
        reasons.append(f"mask {spec.mask!r}: no conjunction of intervals")
    if problem.needs_grad and spec.page_size is not None:
        reasons.append("gradients into a paged cache: only contiguous keys and values have them here")
    if not isinstance(spec.sparsity, sparsity.Dense):
        reasons.append(f"sparsity {spec.sparsity!r}: no block layouts yet")
    return reasons
