"""The `triton_flash` and `triton_decode` backends: from a problem and a configuration to a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnreg import Hardware, Problem, SearchSpace, differentiable, masks, recorded

from . import flash_space
from .crosscompile import CrossCompiled
from .launch import Inputs
from .plan import MAX_KEYS, ConfigValue, Plan
from .signatures import CompileSpec
from .support import MAX_HEAD_DIM, flash_reasons, head_dim_reasons, machine_reasons

MAX_DECODE_QUERIES = 64
MAX_DECODE_HEAD_DIM = 576
Config = Mapping[str, ConfigValue]
Run = Callable[..., Any]


def _reach(bound: int | None) -> int | None:
    """A window's side; one as long as any time line is no bound."""
    return None if bound is None or bound >= MAX_KEYS else bound


def make_plan(problem: Problem, config: Config) -> Plan:
    """The plan of a problem that the flash kernels support, cut as the configuration says."""
    spec = problem.spec
    band = masks.as_band(spec.mask)
    assert band is not None, "supports() refuses a mask that is no band"
    fixed_prefix = band.prefix > 0 and not band.prefix_tensor
    return Plan(
        layout=spec.layout,
        scale=float(problem.scale),
        align=spec.align,
        left=_reach(band.left),
        right=_reach(band.right),
        prefix=min(band.prefix, MAX_KEYS) if fixed_prefix else None,
        softcap=float(spec.softcap),
        dropout_p=float(spec.dropout_p),
        page_size=spec.page_size,
        **flash_space.plan_fields(config),
    )


def make_run(problem: Problem, plan: Plan) -> Any:
    """`run(q, k, v, **tensors)` for every call of the problem's bucket: kernels without autograd."""
    from .operators import FlashKernels

    return FlashKernels(problem, plan)


class _FlashKernels(CrossCompiled):
    """What the two backends share: the kernels, and how a plan becomes a callable or compiler input."""

    name: str
    version, earlier = "4", "2"

    def prepare(self, problem: Problem, config: Config) -> Run:
        """A callable that serves the problem's bucket; kernels compile at its first call."""
        if problem.traced:
            return recorded(problem, self.name, config)
        kernels = make_run(problem, make_plan(problem, config))
        return differentiable(self.name, kernels, problem) if problem.needs_grad else kernels

    def plan(self, problem: Problem, config: Config) -> Plan:
        """The plan of a problem, cut as the configuration says."""
        return make_plan(problem, config)

    def compile_specs(self, problem: Problem, config: Config) -> list[CompileSpec]:
        """Compiler input of every kernel that a call of the problem starts."""
        return compile_specs(problem, make_plan(problem, config))


class TritonFlash(_FlashKernels):
    """FlashAttention-2 in Triton, forward and backward, for every band mask."""

    name = "triton_flash"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason against; empty if the kernels compute the problem as said."""
        return [
            *machine_reasons(problem, hardware),
            *flash_reasons(problem),
            *head_dim_reasons(problem, MAX_HEAD_DIM),
        ]

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """Tiles, warps and stages of each kernel that the problem needs."""
        return flash_space.flash_space(problem, hardware)


class TritonDecode(_FlashKernels):
    """Split-KV decoding (Flash-Decoding): few query rows against a long cache, paged or not."""

    name = "triton_decode"
    splits = True

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason against; empty if the kernels compute the problem as said."""
        out = [
            *machine_reasons(problem, hardware),
            *flash_reasons(problem),
            *head_dim_reasons(problem, MAX_DECODE_HEAD_DIM),
        ]
        if problem.head_dim_v > 512:
            out.append(f"head_dim of v is {problem.head_dim_v}; the kernels hold at most 512")
        if problem.sq > MAX_DECODE_QUERIES:
            out.append(f"{problem.sq} queries a sequence: splitting the keys pays for at most {MAX_DECODE_QUERIES}")
        if problem.needs_grad:
            out.append(f"decoding has no gradient; {', '.join(sorted(problem.grads))} need one")
        return out

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """Tiles and the number of KV splits."""
        return flash_space.decode_space(problem, hardware)


def meta_inputs(problem: Problem) -> Inputs:
    """The problem's tensors on the meta device: shapes, strides and dtypes, no storage."""
    from .meta import inputs

    return inputs(problem)


def compile_specs(problem: Problem, plan: Plan) -> list[CompileSpec]:
    """Compiler input of every launch of a plan; loads Triton, compiles nothing."""
    from .flash_launch import backward_launches, forward_launches, low_like, output_like, partials_like
    from .launch import sizes
    from .signatures import compile_spec

    inputs = meta_inputs(problem)
    size = sizes(plan, inputs)
    out, lse = output_like(plan, inputs, size)
    low = low_like(inputs, lse) if problem.needs_grad else None
    launches = forward_launches(plan, inputs, out, lse, partials_like(plan, inputs, size, lse), low)
    if problem.needs_grad:
        grads = problem.grads
        dq = torch.empty_like(inputs.q) if "q" in grads else None
        dkv = (torch.empty_like(inputs.k), torch.empty_like(inputs.v)) if grads & {"k", "v"} else None
        dbias = torch.empty_like(inputs.bias) if "bias" in grads and inputs.bias is not None else None
        launches += backward_launches(plan, inputs, (out, lse, low), (out, None), lse, (dq, dkv, dbias))
    return [compile_spec(launch) for launch in launches]
