"""The prefill path: many query rows, forward and backward, by tiles of rows in vector lanes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, scores
from attnreg_cpu.arguments import Arguments, dense_rows
from attnreg_cpu.conjunction import Conjunction, read_conjunction
from attnreg_cpu.gradient import Backward
from attnreg_cpu.sparse import Layouts, needs_layout
from attnreg_cpu.tuning_space import PACKS
from attnreg_cpu.variant import ELEMENTS, Kernel, check_status, variant_of

MAX_HEAD_DIM = 1024  # the kernels unroll nothing over it; beyond, a tile would leave the caches


def prefill_kernels(problem: Problem, config: Mapping[str, int | str | float | bool]) -> Forward | Backward:
    """Compile (or find) the kernels. Raises BuildError where that fails."""
    layouts = None
    mask = read_conjunction(problem.spec.mask)
    if mask is None or needs_layout(problem):
        # The layout says which pairs attend; the positions that ALiBi counts from are the sequence's.
        mask = Conjunction()
        layouts = Layouts(problem, int(config["layout_q"]), int(config["layout_kv"]))
    settings = {name: int(config[name]) for name in ("block_kv", "tiles")} | {"pack": PACKS.index(str(config["pack"]))}
    # Scratch memory is as long as a run, and a run holds at least a block of the layout.
    settings["block_kv"] = max(settings["block_kv"], int(config.get("layout_kv", 0)))
    arguments = Arguments(problem, mask, settings)
    shape = int(config["vectors"]), str(config["product"])
    kernel = variant_of("forward.cpp", problem, *shape).kernel("attnreg_forward")
    forward = Forward(problem, kernel, arguments, layouts)
    if not problem.needs_grad:
        return forward
    return Backward(forward, variant_of("backward.cpp", problem, *shape).kernel("attnreg_backward"))


class Forward:
    """run(q, k, v, **tensors) of one prepared problem, without gradients."""

    def __init__(self, problem: Problem, kernel: Kernel, arguments: Arguments, layouts: Layouts | None) -> None:
        self._kernel = kernel
        self.arguments = arguments
        self._layouts = layouts
        self._head_dim_v = problem.head_dim_v
        self.layout = problem.spec.layout
        self._page_size = problem.spec.page_size
        self.return_lse = problem.spec.return_lse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        out, lse, _ = self.compute(q, k, v, tensors, False)
        return (out, lse) if self.return_lse else out

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """out, lse where the problem or a backward pass asks for it, and for the latter its low word; see Kernels."""
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        out = q.new_empty(*q.shape[:-1], self._head_dim_v)
        lse = self._lse_like(q) if for_backward or self.return_lse else None
        low = self._lse_like(q) if for_backward else None
        self.launch(self._kernel, (q, k, v), out, lse, tensors, {} if low is None else {"lse_low": low.data_ptr()})
        return out, lse, low

    def _lse_like(self, q: Tensor) -> Tensor:
        return q.new_empty(q.shape[:-1] if self.layout == "bhsd" else _heads_first(q), dtype=torch.float32)

    def launch(
        self,
        kernel: Kernel,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor | None,
        tensors: Mapping[str, Any],
        more: dict[str, int],
    ) -> None:
        """Run a kernel on q, k, v with dense rows; `more` are further params fields."""
        q, k, v = inputs
        batch, skv = self.sizes(q, k, tensors)
        layout = None
        if self._layouts is not None:
            fields, layout = self._layouts.params(q, batch, skv, tensors)
            more = {**more, **fields}
        tail, kept = self.arguments.tail(tensors, more)
        check_status(kernel(self.arguments.head(q, k, v, out, lse, batch, skv) + tail))
        del kept, layout  # the bytes pointed into them

    def sizes(self, q: Tensor, k: Tensor, tensors: Mapping[str, Any]) -> tuple[int, int]:
        """Sequences of the call, and key rows of a padded one (paged: of a full table)."""
        batch = q.shape[0] if self.layout != "thd" else tensors["cu_seqlens_q"].shape[0] - 1
        if self._page_size is not None:
            return batch, tensors["block_table"].shape[1] * self._page_size
        return batch, k.shape[2] if self.layout == "bhsd" else k.shape[-3]


def _heads_first(q: Tensor) -> tuple[int, ...]:
    """Shape of lse for q [B, Sq, Hq, D] or [T, Hq, D]."""
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def prefill_supports(problem: Problem) -> list[str]:
    """Every reason against the prefill path, but for those that hold for all native kernels; empty if there is none."""
    spec = problem.spec
    reasons = []
    if problem.dtype not in ELEMENTS:
        reasons.append(f"dtype {problem.dtype}: the native kernels take {', '.join(ELEMENTS)}")
    if problem.kv_dtype != problem.dtype:
        reasons.append(f"k and v of {problem.kv_dtype} beside q of {problem.dtype}: prefill takes one dtype")
    if not isinstance(spec.score, (scores.ScaledDot, scores.Dot, scores.Additive)):
        reasons.append(f"score {spec.score!r}: only scaled and plain dot products and the additive score")
    if spec.dropout_p:
        reasons.append(f"dropout_p={spec.dropout_p}: the native kernels draw no random numbers")
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        reasons.append(f"head_dim {problem.head_dim} and {problem.head_dim_v}: at most {MAX_HEAD_DIM}")
    if max(problem.sq, problem.skv) >= 2**31:
        reasons.append(f"{max(problem.sq, problem.skv)} rows: positions are 32-bit in the kernels")
    if "alibi_slopes" in problem.grads:
        reasons.append("gradient of alibi_slopes: the native kernels compute none")
    if problem.needs_grad and spec.page_size is not None:
        reasons.append("gradients into a paged cache: only contiguous keys and values have them here")
    return reasons
