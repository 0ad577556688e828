"""The `triton_fp8` backend: 8-bit products, and 8-bit KV caches under 16-bit products, on the flash forward kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnreg import Hardware, Problem, SearchSpace, block_of, masks, sparsity

from . import flash_space
from .arguments import Descale, Descales
from .calls import call_tensors
from .crosscompile import CrossCompiled
from .flash import Config, Run, make_plan
from .fp8_launch import FLOAT8, MIN_COLUMNS, WEIGHTS, WHOLE, Quantiser, Start, described, with_descales
from .launch import Inputs, Launch, head_blocks, sizes
from .plan import Plan
from .signatures import CompileSpec
from .support import DTYPES, MAX_HEAD_DIM, head_dim_reasons, machine_reasons, score_reasons, size_reasons

E4M3 = "float8_e4m3fn"
CARDS = {E4M3: (89, ("gfx950", "gfx1200", "gfx1201")), "float8_e5m2": (89, ("gfx950", "gfx1200", "gfx1201"))}


class TritonFp8(CrossCompiled):
    """FP8 attention with float32 accumulation. The numerics are attnreg_eager.fp8's, step by step.

    With 16- or 32-bit q, k, v and `dtype.compute` in FP8 it quantises them (per tensor, head or block, rotated where
    asked) and multiplies in 8 bits. Tensors that come as FP8 keep their descales. An FP8 cache beside a 16- or 32-bit q
    is widened to q's dtype, which is exact.
    """

    name = "triton_fp8"
    version, earlier = "5", "3"

    def version_for(self, problem: Problem, hardware: Hardware) -> str:
        """5 changed what quantises; 4 what all backends here changed then, and tensors that all come as FP8."""
        if _quantises(problem):
            return self.version
        untouched = problem.dtype not in FLOAT8 and super().version_for(problem, hardware) == self.earlier
        return self.earlier if untouched else "4"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason against; empty if the kernels compute the problem as said."""
        spec = problem.spec
        out = [
            *machine_reasons(problem, hardware),
            *score_reasons(problem),
            *size_reasons(problem),
            *head_dim_reasons(problem, MAX_HEAD_DIM),
        ]
        band = masks.as_band(spec.mask)
        if band is None or not isinstance(spec.sparsity, sparsity.Dense):
            out.append(f"mask {spec.mask!r} with sparsity {spec.sparsity!r} is no band; triton_block_sparse takes it")
        if problem.needs_grad:
            out.append(f"FP8 kernels have no backward pass; {', '.join(sorted(problem.grads))} need one")
        if problem.traced:
            out.append("traced: quantisation runs as plain kernels, which a trace does not see")
        return out + _dtype_reasons(problem, hardware)

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """Tiles; `block_n` keys and `block_q` rows share a factor under scaling="block"."""
        space = flash_space.flash_space(replace(problem, grads=frozenset()), hardware)
        if not _quantises(problem):
            return space
        fits = [n for n in space.choices["block_n"] if int(n) >= 32] or [32]
        choices = {**space.choices, "block_n": fits, "block_q": (64, 128, 32, 16)}
        points = [space.default, *space.seeds]
        seeds = [{**p, "block_q": 64, "block_n": max(int(p["block_n"]), int(fits[0]))} for p in points]
        return SearchSpace(choices, seeds[0], space.constraints, seeds)

    def prepare(self, problem: Problem, config: Config) -> Run:
        """A callable that serves the problem's bucket; kernels compile at its first call."""
        from . import ready

        plan, spec = make_plan(problem, config), problem.spec
        block_q = int(config.get("block_q", 64))

        def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
            def begin(launches: list[Launch]) -> None:
                ready.once(launches, q.device)

            out, lse = attend(problem, plan, block_q, bind(problem, plan, q, k, v, tensors), tensors, begin)
            return (out, lse) if spec.return_lse else out

        return run

    def plan(self, problem: Problem, config: Config) -> Plan:
        """The plan of a problem, cut as the configuration says."""
        return make_plan(problem, config)

    def compile_specs(self, problem: Problem, config: Config) -> list[CompileSpec]:
        """Compiler input of every kernel that a call of the problem starts."""
        from .flash import meta_inputs
        from .signatures import compile_spec

        launches: list[Launch] = []
        plan, stored = make_plan(problem, config), {}
        for name in ("q_descale", "k_descale", "v_descale"):
            if problem.info(name) is not None or name in problem.spec.tensors():
                one = problem.spec.dtype.scaling == "tensor"
                stored[name] = torch.empty((1,) if one else (problem.batch, problem.kv_heads), device="meta")
        attend(problem, plan, int(config.get("block_q", 64)), meta_inputs(problem), stored, launches.extend)
        return [compile_spec(launch) for launch in launches]


def _stored(problem: Problem) -> bool:
    return problem.kv_dtype in FLOAT8


def _quantises(problem: Problem) -> bool:
    """Do q, k and v come wider than the 8 bits they are multiplied in?"""
    return problem.spec.dtype.compute in FLOAT8 and not _stored(problem)


def _dtype_reasons(problem: Problem, hardware: Hardware) -> list[str]:
    """Reasons in the dtypes that come, the dtype that is asked for, and what the hardware multiplies."""
    spec, out = problem.spec, []
    wanted = problem.kv_dtype if _stored(problem) else spec.dtype.compute
    if wanted not in FLOAT8:
        return [f"dtype.compute is {spec.dtype.compute!r} and k comes as {problem.kv_dtype}: nothing here is FP8"]
    if problem.dtype not in DTYPES and problem.dtype != problem.kv_dtype:
        out.append(f"q comes as {problem.dtype} beside k and v in {problem.kv_dtype}")
    if not _stored(problem) and problem.kv_dtype != problem.dtype:
        out.append(f"k and v come as {problem.kv_dtype} beside q in {problem.dtype}; the kernels quantise one dtype")
    if spec.dtype.rotate and _stored(problem):
        out.append("rotate=True, but k is stored in float8 already: rotate before storing")
    if _quantises(problem):
        if spec.layout == "thd" or spec.page_size is not None:
            out.append("quantises dense batches only: a paged cache or packed sequences come as FP8 with descales")
        if "document_ids" in spec.tensors():
            out.append("documents: which keys no row attends, and so no scale sees, is not known before the kernel")
    if hardware.kind == "cuda":
        least, number = CARDS[wanted][0], hardware.arch.removeprefix("sm_").rstrip("af")
        if number.isdigit() and int(number) < least:
            out.append(f"{wanted} needs sm_{least} or newer, this is {hardware.arch}")
    elif hardware.kind == "hip" and hardware.arch not in CARDS[wanted][1]:
        out.append(f"{hardware.arch} has no {wanted} (CDNA 3 has the fnuz formats); there are {CARDS[wanted][1]}")
    return out


def bind(problem: Problem, plan: Plan, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Inputs:
    """The call's tensors as the flash kernels take them."""
    from . import operators

    band = masks.as_band(problem.spec.mask)
    assert band is not None, "supports() refuses a mask that is no band"
    named = call_tensors(problem.spec, band, q, tensors) | {"q": q, "k": k, "v": v}
    return operators.make_inputs(plan, *(named.get(name) for name in operators.FIELDS))


def attend(
    problem: Problem, plan: Plan, block_q: int, inputs: Inputs, tensors: Mapping[str, Any], begin: Start
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call; `begin` starts launches, or collects them for a compiler."""
    from .flash_launch import forward_launches, partials_like

    size = sizes(plan, inputs)
    q = inputs.q
    shape = (*q.shape[:-1], size.value_dim)
    dtype = problem.out_dtype
    if plan.layout == "thd":
        out = q.new_zeros(shape, dtype=dtype)
        lse = q.new_full((size.heads, size.q_len), -torch.inf, dtype=torch.float32)
    else:
        out = q.new_empty(shape, dtype=dtype)
        lse = q.new_empty((size.batches, size.heads, size.q_len), dtype=torch.float32)
    if _quantises(problem):
        inputs, descales = quantised(problem, plan, block_q, inputs, begin)
    else:
        inputs, descales = stored(problem, plan, inputs, tensors)
    # Padded columns of v are no columns of out: the kernel writes out's.
    launches = forward_launches(plan, inputs, out, lse, partials_like(plan, inputs, size, lse))
    begin(with_descales(launches, descales))
    return out, lse


def quantised(problem: Problem, plan: Plan, block_q: int, inputs: Inputs, begin: Start) -> tuple[Inputs, Descales]:
    """The inputs in 8 bits, v with its keys side by side, and what they stand for."""
    wanted = problem.spec.dtype
    dtype = FLOAT8[wanted.compute]
    used = keys_in_use(plan, inputs)
    size = sizes(plan, inputs)
    by_key = Quantiser(dtype, wanted.scaling, plan.forward.n, rotate=wanted.rotate)
    by_row = replace(by_key, block=block_q, group=size.group)
    q, q_scale = by_row(inputs.q, plan.layout, None, begin)
    k, k_scale = by_key(inputs.k, plan.layout, used, begin)
    v, v_scale = replace(by_key, rotate=False)(inputs.v, plan.layout, used, begin, transpose=True)
    v = v[..., : size.value_dim]
    return replace(inputs, q=q, k=k, v=v), Descales(q_scale, k_scale, v_scale, v.stride(-1), WEIGHTS[dtype], 1)


def stored(problem: Problem, plan: Plan, inputs: Inputs, tensors: Mapping[str, Any]) -> tuple[Inputs, Descales]:
    """The inputs with what their stored values stand for; 8-bit products only where q is 8-bit and k and v can be."""
    size = sizes(plan, inputs)
    block = WHOLE
    if problem.spec.dtype.scaling == "block":
        block = plan.page_size or block_of(_longest(inputs, size.kv_len, tensors), tensors["k_descale"].shape[-1])
    k_scale, v_scale = (_given(tensors[name], block) for name in ("k_descale", "v_descale"))
    q, q_scale, columns, weights = inputs.q, None, None, None
    if q.dtype in WEIGHTS:
        q_scale = _given(tensors["q_descale"], WHOLE, size.group)
        piece, tail = head_blocks(size.head_dim)
        # q.k multiplies columns of the head's shorter piece, weights @ v the keys of a tile.
        wide = min(tail or piece, plan.forward.n) >= MIN_COLUMNS
        if wide and plan.page_size is None and plan.layout != "thd" and block % plan.forward.n == 0:
            weights = WEIGHTS[q.dtype]
            v = inputs.v.transpose(-1, -2).contiguous().transpose(-1, -2)
            inputs, columns = replace(inputs, v=v), v.stride(-1)
        else:
            inputs = replace(inputs, q=q.to(torch.bfloat16))
    return inputs, Descales(q_scale, k_scale, v_scale, columns, weights, None if weights is None else 1)


def _longest(inputs: Inputs, keys: int, tensors: Mapping[str, Any]) -> int:
    """Keys of the longest sequence, from which blocks of factors count."""
    if inputs.cu_seqlens_k is None:
        return keys
    given = tensors.get("max_seqlen_k")
    return int(given) if given is not None else int(inputs.cu_seqlens_k.diff().max())


def _given(value: Tensor, block: int, group: int = 1) -> Descale:
    """The factors of a call: one value, [B, Hkv], or [B, Hkv, N] of `block` keys each; for q by query head."""
    value = value.float()
    if value.numel() == 1:
        return described(value.reshape(1, 1, 1))
    value = value.unsqueeze(-1) if value.dim() == 2 else value
    return described((value.repeat_interleave(group, 1) if value.shape[1] > 1 else value).contiguous(), block)


def keys_in_use(plan: Plan, inputs: Inputs) -> Tensor | None:
    """Keys that some row may attend, bool [B, Skv] contiguous; None where all are. No device synchronisation."""
    size = sizes(plan, inputs)
    right_open = plan.right is None and inputs.prefix_lengths is None
    if inputs.kv_lengths is None and inputs.query_offset is None and plan.left is None and right_open:
        return None
    device = inputs.q.device
    lengths = torch.full((size.batches,), size.kv_len, dtype=torch.int64, device=device)
    if inputs.kv_lengths is not None:
        lengths = torch.minimum(lengths, inputs.kv_lengths.long())
    first = torch.zeros_like(lengths) if plan.align == "top_left" else lengths - size.q_len
    if inputs.query_offset is not None:
        first = inputs.query_offset.long()
    last = first + size.q_len - 1
    keys = torch.arange(size.kv_len, device=device)
    used = keys < lengths[:, None]
    if plan.left is not None:
        used &= keys >= (first - plan.left)[:, None]
    if plan.right is not None:
        reach = last + plan.right + 1
        if plan.prefix is not None:
            reach = reach.clamp_min(plan.prefix)
        if inputs.prefix_lengths is not None:
            reach = torch.maximum(reach, inputs.prefix_lengths.long())
        used &= keys < reach[:, None]
    if size.q_len == 0:
        used = torch.zeros_like(used)
    return used.contiguous()
