"""The `triton_block_sparse` backend: any mask and any block pattern, through attnreg.blocks.BlockLayout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg import Hardware, Problem, SearchSpace, blocks, differentiable, masks

from . import block_sparse_space
from .calls import drawn
from .crosscompile import CrossCompiled
from .flash import Config, Run
from .launch import ROWS_AXIS, Inputs, Launch, natural, sizes
from .plan import Plan
from .signatures import CompileSpec
from .support import (
    GRADIENTS,
    MAX_HEAD_DIM,
    dtype_reasons,
    gradient_reasons,
    head_dim_reasons,
    machine_reasons,
    score_reasons,
    size_reasons,
)

ROWS = ("row_ptr", "row_split", "col_idx", "tile_idx", "bits")
"""The tensors of a layout that the forward kernel reads."""


@dataclass(frozen=True)
class Call:
    """One call: what it computes, its tensors, and its live blocks."""

    plan: Plan
    inputs: Inputs
    layout: blocks.BlockLayout


class TritonBlockSparse(CrossCompiled):
    """The flash kernels' tile step over lists of live blocks: full ones without a mask, partial ones by bit tiles.

    The layout is built on the host and kept by what its tensors hold, so a call whose mask reads call tensors
    synchronises with the device, and a CUDA graph cannot record its building.
    """

    name = "triton_block_sparse"
    version, earlier = "4", "2"
    sparse = True

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason against; empty if the kernels compute the problem as said."""
        out = [
            *machine_reasons(problem, hardware),
            *dtype_reasons(problem),
            *score_reasons(problem),
            *size_reasons(problem),
            *head_dim_reasons(problem, MAX_HEAD_DIM),
            *gradient_reasons(problem),
        ]
        if problem.traced:
            out.append("traced: the block layout is built from sizes and values, which a trace does not have")
        return out

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """Block sizes, and warps and stages of each kernel that the problem needs."""
        return block_sparse_space.space(problem, hardware)

    def prepare(self, problem: Problem, config: Config) -> Run:
        """A callable that serves the problem's bucket; kernels compile at its first call."""
        kernels = BlockKernels(problem, make_plan(problem, config))
        return differentiable(self.name, kernels, problem) if problem.needs_grad else kernels

    def plan(self, problem: Problem, config: Config) -> Plan:
        """The plan of a problem, cut as the configuration says."""
        return make_plan(problem, config)

    def compile_specs(self, problem: Problem, config: Config) -> list[CompileSpec]:
        """Compiler input of every kernel that a call of the problem starts."""
        return compile_specs(problem, make_plan(problem, config))


def make_plan(problem: Problem, config: Config) -> Plan:
    """The plan of a problem, cut as the configuration says; its mask lies in the layout."""
    spec = problem.spec
    return Plan(
        layout=spec.layout,
        scale=float(problem.scale),
        align=spec.align,
        softcap=float(spec.softcap),
        dropout_p=float(spec.dropout_p),
        page_size=spec.page_size,
        **block_sparse_space.plan_fields(config),
    )


def make_call(problem: Problem, plan: Plan, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Call:
    """Bind a call's tensors and find its layout."""
    from . import operators

    spec = problem.spec
    named = {name: tensors.get(name) for name in operators.FIELDS}
    used, lengths = tensors.get("seqused_k"), tensors.get("kv_lengths")
    # Padding may be one side of a union: `kv_lengths` places the queries, and the layout alone says what is masked.
    # Where no query attends a key behind it, none is loaded either: a weight of 0 would not take away a NaN.
    last = used
    if lengths is not None and masks.within_lengths(spec.mask):
        last = lengths if used is None else torch.minimum(lengths, used)
    named |= {"q": q, "k": k, "v": v, "kv_lengths": last, "prefix_lengths": None}
    if spec.dropout_p > 0:
        named["seed"] = drawn(q, tensors)
    inputs = operators.make_inputs(plan, *(named[name] for name in operators.FIELDS))
    size = sizes(plan, inputs)
    if size.batches == 0:
        return Call(plan, inputs, empty_layout(problem, plan.forward.m, plan.forward.n))
    packed = spec.layout == "thd"
    sq, skv = size.q_len, size.kv_len
    if packed:
        sq = _longest(tensors["cu_seqlens_q"])
        skv = skv if spec.page_size is not None else _longest(tensors["cu_seqlens_k"])
    given = dict(tensors)
    if spec.align == "bottom_right" and lengths is not None:
        rows = tensors["cu_seqlens_q"].diff().long() if packed else sq
        there = lengths.long() if used is None else torch.minimum(lengths.long(), used.long())
        inputs = replace(inputs, query_offset=there - rows)
    layout = blocks.call_layout(
        spec, sq, skv, plan.forward.m, plan.forward.n, batch=size.batches, heads=size.heads, tensors=given,
        device=q.device,
    )  # fmt: skip
    return Call(plan, inputs, layout)


def _longest(starts: Tensor) -> int:
    """The longest of packed sequences."""
    return int(starts.diff().max()) if starts.numel() > 1 else 0


def forward(call: Call, kept: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, low): out in q's layout and dtype with Dv columns; lse float32 [B, Hq, Sq] or [Hq, T]; low, of lse's
    shape, what its rounding left, where that is to be `kept` and the backward kernels read it.
    """
    from . import ready
    from .block_sparse_launch import forward_launches
    from .flash_launch import low_like, output_like

    plan, inputs, layout = call.plan, call.inputs, call.layout
    out, lse = output_like(plan, inputs, sizes(plan, inputs))
    low = low_like(inputs, lse) if kept else None
    rows = (layout.row_ptr, layout.row_split, layout.col_idx, layout.tile_idx, layout.bits)

    def make(tensors: Sequence[Any]) -> list[Launch]:
        *given, out, lse, low = tensors
        again = replace(layout, **dict(zip(ROWS, given[-len(ROWS) :], strict=True)))
        return forward_launches(plan, Inputs(*given[: -len(ROWS)]), again, out, lse, low)

    what = ("block forward", kept, plan, layout.n_q, layout.n_heads, layout.n_batch, layout.block_q)
    ready.start(what, (*inputs.tensors(), *rows), (out, lse, low), make)
    return out, lse, low


def backward(
    call: Call,
    saved: tuple[Tensor, Tensor, Tensor | None],
    upstream: tuple[Tensor, Tensor | None],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of GRADIENTS; None for those that are not wanted."""
    from . import ready
    from .block_sparse_launch import backward_launches
    from .operators import readable, sink_gradient

    plan, inputs = call.plan, call.inputs
    size, lse = sizes(plan, inputs), saved[1]
    # Packed rows that belong to no sequence are visited by no kernel: their gradient is 0.
    new = torch.zeros_like if plan.layout == "thd" else torch.empty_like
    dense = torch.contiguous_format
    dq = new(inputs.q, memory_format=dense) if wanted[0] else None
    dkv = None
    if wanted[1] or wanted[2]:
        dkv = (new(inputs.k, memory_format=dense), new(inputs.v, memory_format=dense))
    dscores, bias = None, inputs.bias
    if wanted[3] and bias is not None:
        shape = (
            size.batches,
            size.heads,
            *(max(bias.shape[n], x) for n, x in ((2, call.layout.sq), (3, call.layout.skv))),
        )
        dscores = bias.new_zeros(shape, dtype=torch.float32)
    delta = torch.zeros_like(lse)
    gradients = (dq, dkv, dscores)
    dout = readable(upstream[0], ROWS_AXIS[plan.layout])
    launches = backward_launches(plan, inputs, call.layout, saved, (dout, upstream[1]), delta, gradients)
    ready.once(launches, inputs.q.device)
    dk, dv = dkv or (None, None)
    dbias = None if dscores is None or bias is None else dscores.sum_to_size(bias.shape).to(bias.dtype)
    dsinks = sink_gradient(inputs.sinks, lse, saved[2], delta) if wanted[4] and inputs.sinks is not None else None
    return dq, dk if wanted[1] else None, dv if wanted[2] else None, dbias, dsinks


class BlockKernels:
    """The kernels of a problem without autograd (attnreg's Kernels), by one plan."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self._problem, self._plan = problem, plan

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        out, lse, _ = forward(make_call(self._problem, self._plan, q, k, v, tensors), kept=False)
        return (out, lse) if self._problem.spec.return_lse else out

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse, low); see attnreg's Kernels."""
        return forward(make_call(self._problem, self._plan, q, k, v, tensors), kept=for_backward)

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor | None],
        upstream: tuple[Tensor, Tensor | None],
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        """The gradients of the wanted names; the layout is found again by what its tensors hold."""
        given = dict(zip("qkv", inputs, strict=True)) | dict(tensors)
        call = make_call(self._problem, self._plan, *inputs, tensors)
        out, lse, low = results
        saved = (out, lse, low if natural(call.inputs) else None)
        found = backward(call, saved, upstream, tuple(name in wanted for name in GRADIENTS))
        named = {n: x for n, x in zip(GRADIENTS, found, strict=True) if n in wanted and x is not None}
        return {n: x.reshape(given[n].shape).to(given[n].dtype) for n, x in named.items()}


def empty_layout(problem: Problem, block_q: int, block_kv: int) -> blocks.BlockLayout:
    """A layout of the problem's sizes without entries: kernels are compiled with the types of its tensors."""

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    lines = -(-problem.sq // block_q)
    return blocks.BlockLayout(
        problem.sq, problem.skv, block_q, block_kv, problem.batch, problem.q_heads, 1, 1, 0, None, None, 0,
        ints(lines + 1), ints(lines), ints(0), ints(0), ints(0, block_q, -(-block_kv // 32)),
    )  # fmt: skip


def compile_specs(problem: Problem, plan: Plan) -> list[CompileSpec]:
    """Compiler input of every launch of a plan; loads Triton, compiles nothing."""
    from .block_sparse_launch import backward_launches, forward_launches
    from .flash import meta_inputs
    from .flash_launch import low_like, output_like
    from .signatures import compile_spec

    inputs = replace(meta_inputs(problem), prefix_lengths=None, document_first=None, document_last=None)
    layout = empty_layout(problem, plan.forward.m, plan.forward.n)
    out, lse = output_like(plan, inputs, sizes(plan, inputs))
    low = low_like(inputs, lse) if problem.needs_grad else None
    launches = forward_launches(plan, inputs, layout, out, lse, low)
    if problem.needs_grad:
        grads = problem.grads
        dq = torch.empty_like(inputs.q) if "q" in grads else None
        dkv = (torch.empty_like(inputs.k), torch.empty_like(inputs.v)) if grads & {"k", "v"} else None
        shape = (problem.batch, problem.q_heads, problem.sq, problem.skv)
        dscores = torch.empty(shape, device="meta") if "bias" in grads else None
        launches += backward_launches(plan, inputs, layout, (out, lse, low), (out, None), lse, (dq, dkv, dscores))
    return [compile_spec(launch) for launch in launches]
