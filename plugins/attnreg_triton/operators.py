"""The flash kernels as torch operators: forward with autograd and shapes for tracing, so torch.compile sees through.

All that is not a tensor travels as the plan's JSON string: a compiled graph that another process loads means the same.
Operators synchronise nothing and allocate only through torch, so they record into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnreg import transformable

from . import ready
from .flash_launch import backward_launches, forward_launches, low_like, output_like, partials_like
from .launch import ROWS_AXIS, Inputs, Launch, sizes
from .plan import Plan, decode
from .support import GRADIENTS, MAX_INDEX, no_second_derivative

FIELDS = (
    "q", "k", "v", "bias", "alibi_slopes", "sinks", "prefix_lengths", "document_first", "document_last", "kv_lengths",
    "query_offset", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seed",
)  # fmt: skip
LONGEST_TILE = 256
"""No kernel's tile has more rows or keys."""
SCHEMA = ", ".join(f"Tensor{'' if name in 'qkv' else '?'} {name}" for name in FIELDS)

_library: Any = torch.library.Library("attnreg_triton", "DEF")  # type: ignore[no-untyped-call]  # torch has no types here
_library.define(f"flash_forward({SCHEMA}, str plan) -> (Tensor, Tensor)")
# The same for a backward pass, and what the rounding of lse left; empty where the backward kernels read no such.
_library.define(f"flash_forward_for_gradients({SCHEMA}, str plan) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"flash_backward({SCHEMA}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, str plan, bool[5] wanted,"
    " Tensor? lse_low=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def readable(tensor: Tensor, axis: int, tile: int = LONGEST_TILE) -> Tensor:
    """The tensor itself where kernels can read it, else a contiguous copy.

    Rows, which follow each other along `axis`, must be dense, and 32 bits hold the offsets in a tile of `tile` rows.
    """
    dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if dense and tensor.stride(axis) <= MAX_INDEX // tile else tensor.contiguous()


def make_inputs(plan: Plan, *tensors: Tensor | None) -> Inputs:
    """Inputs of the tensors in the order of FIELDS, made readable to the kernels."""
    named: dict[str, Any] = dict(zip(FIELDS, tensors, strict=True))
    axis, tile = ROWS_AXIS[plan.layout], LONGEST_TILE
    named["q"] = readable(named["q"], axis)
    if plan.page_size is not None:
        # Rows of a page [pages, Hkv, page_size, D] are counted within the page.
        axis, tile = 2, max(tile, plan.page_size)
    named["k"], named["v"] = readable(named["k"], axis, tile), readable(named["v"], axis, tile)
    if named["bias"] is not None:
        bias = named["bias"]
        named["bias"] = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    for name in ("sinks", "alibi_slopes"):
        if named[name] is not None:
            named[name] = named[name].to(torch.float32)
            if named[name].stride(-1) != 1:
                named[name] = named[name].contiguous()
    for name in ("prefix_lengths", "kv_lengths", "query_offset", "cu_seqlens_q", "cu_seqlens_k", "block_table"):
        if named[name] is not None and named[name].stride(-1) != 1:
            named[name] = named[name].contiguous()
    return Inputs(**named)


def forward(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse): out in q's layout and dtype with Dv columns; lse float32 [B, Hq, Sq] or [Hq, T]."""
    size = sizes(plan, inputs)
    out, lse = output_like(plan, inputs, size)
    partials = partials_like(plan, inputs, size, lse)

    def make(tensors: Sequence[Any]) -> list[Launch]:
        *given, out, lse, first, second, third = tensors
        return forward_launches(plan, Inputs(*given), out, lse, None if first is None else (first, second, third))

    ready.start(("forward", plan), inputs.tensors(), (out, lse, *(partials or (None, None, None))), make)
    return out, lse


def forward_for_gradients(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`, and what the rounding of lse left, of its shape; empty where the backward kernels read no such."""
    out, lse = output_like(plan, inputs, sizes(plan, inputs))
    low = low_like(inputs, lse)

    def make(tensors: Sequence[Any]) -> list[Launch]:
        *given, out, lse, low = tensors
        return forward_launches(plan, Inputs(*given), out, lse, None, low)

    ready.start(("forward for gradients", plan), inputs.tensors(), (out, lse, low), make)
    return out, lse, lse.new_empty(0) if low is None else low


def backward(
    plan: Plan,
    inputs: Inputs,
    saved: tuple[Tensor, Tensor, Tensor | None],
    upstream: tuple[Tensor, Tensor | None],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dsinks); one that is not wanted is an empty tensor."""
    lse = saved[1]
    dout, dlse = readable(upstream[0], ROWS_AXIS[plan.layout]), upstream[1]
    packed = plan.layout == "thd"
    # Packed rows that belong to no sequence are visited by no kernel: their gradient is 0.
    new = torch.zeros_like if packed else torch.empty_like
    dense = torch.contiguous_format
    dq = new(inputs.q, memory_format=dense) if wanted[0] else None
    dkv = None
    if wanted[1] or wanted[2]:
        dkv = (new(inputs.k, memory_format=dense), new(inputs.v, memory_format=dense))
    dbias = None
    if wanted[3]:
        assert inputs.bias is not None
        dbias = torch.empty_like(inputs.bias, memory_format=dense)
    delta = torch.zeros_like(lse)

    def make(tensors: Sequence[Any]) -> list[Launch]:
        *given, out, lse, low, dout, dlse, delta, dq, dk, dv, dbias = tensors
        dkv = None if dk is None else (dk, dv)
        return backward_launches(plan, Inputs(*given), (out, lse, low), (dout, dlse), delta, (dq, dkv, dbias))

    what = ("backward", plan, tuple(wanted))
    made = (delta, dq, *(dkv or (None, None)), dbias)
    ready.start(what, (*inputs.tensors(), *saved, dout, dlse), made, make)
    dsinks = sink_gradient(inputs.sinks, lse, saved[2], delta) if wanted[4] and inputs.sinks is not None else None
    dk, dv = dkv or (None, None)
    found = (dq, dk if wanted[1] else None, dv if wanted[2] else None, dbias, dsinks)
    # An operator returns tensors that share no storage: each absent one is an empty tensor of its own.
    first, second, third, fourth, fifth = (inputs.q.new_empty(0) if x is None else x for x in found)
    return first, second, third, fourth, fifth


def sink_gradient(sinks: Tensor, lse: Tensor, low: Tensor | None, delta: Tensor) -> Tensor:
    """Gradient of the sinks [Hq]: a key of score `sink` and value 0, so `-sum(exp(sink - lse) * delta)`."""
    heads = sinks.to(torch.float32).view(-1, 1)
    above = heads - lse if low is None else heads - lse - low
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(above))
    summed = (share * delta).sum(-1)
    return -(summed.sum(0) if summed.dim() == 2 else summed)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    plan = decode(arguments[-1])
    return forward(plan, make_inputs(plan, *arguments[:-1]))


def _forward_for_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan = decode(arguments[-1])
    return forward_for_gradients(plan, make_inputs(plan, *arguments[:-1]))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (out, lse, dout, dlse, text, wanted, *rest) = arguments[: len(FIELDS)], arguments[len(FIELDS) :]
    plan = decode(text)
    # A graph that was saved when lse had no second word does without.
    low = next((x for x in rest if x is not None and x.numel()), None)
    return backward(plan, make_inputs(plan, *tensors), (out, lse, low), (dout, dlse), list(wanted))


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    plan, inputs = decode(arguments[-1]), Inputs(**dict(zip(FIELDS, arguments[:-1], strict=True)))
    return output_like(plan, inputs, sizes(plan, inputs))


def _forward_for_gradients_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(**dict(zip(FIELDS, arguments[:-1], strict=True)))
    out, lse = _forward_shapes(*arguments)
    low = low_like(inputs, lse)
    return out, lse, lse.new_empty(0) if low is None else low


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    named, wanted = dict(zip(FIELDS, arguments[: len(FIELDS)], strict=True)), arguments[len(FIELDS) + 5]
    like = [named["q"], named["k"], named["v"], named["bias"], named["sinks"]]
    if wanted[3] and named["bias"].dim() < 4:
        like[3] = named["bias"].reshape((1,) * (4 - named["bias"].dim()) + tuple(named["bias"].shape))
    if wanted[4]:
        like[4] = named["sinks"].to(torch.float32)
    q = named["q"]
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else q.new_empty(0)
        for tensor, want in zip(like, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.plan = inputs[-1]
    ctx.save_for_backward(*inputs[:-1], *output)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _differentiate_twice(ctx: Any, *upstream: Tensor | None) -> NoReturn:
    no_second_derivative("triton_flash")


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    tensors, (out, lse, *low) = ctx.saved_tensors[: len(FIELDS)], ctx.saved_tensors[len(FIELDS) :]
    needs = ctx.needs_input_grad
    wanted = [needs[FIELDS.index(name)] for name in GRADIENTS]
    if dout is None:
        dout = torch.zeros_like(out)
    # Dynamo traces no Function inside the backward of another; the operator alone has its autograd there.
    gradients_of = torch.ops.attnreg_triton.flash_backward if torch.compiler.is_dynamo_compiling() else _gradients
    found = gradients_of(*tensors, out, lse, dout, dlse, ctx.plan, wanted, *low)
    gradients: dict[str, Tensor | None] = {}
    for name, want, gradient in zip(GRADIENTS, wanted, found, strict=True):
        given = tensors[FIELDS.index(name)]
        gradients[name] = gradient.reshape(given.shape).to(given.dtype) if want else None
    return (*(gradients.get(name) for name in FIELDS), None)


for _key in ("CPU", "CUDA"):
    _library.impl("flash_forward", _forward, _key)
    _library.impl("flash_forward_for_gradients", _forward_for_gradients, _key)
    _library.impl("flash_backward", _backward, _key)
torch.library.register_fake("attnreg_triton::flash_forward", _forward_shapes, lib=_library)
torch.library.register_fake("attnreg_triton::flash_backward", _backward_shapes, lib=_library)
torch.library.register_fake("attnreg_triton::flash_forward_for_gradients", _forward_for_gradients_shapes, lib=_library)
for _name in ("flash_forward", "flash_forward_for_gradients"):
    torch.library.register_autograd(f"attnreg_triton::{_name}", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "attnreg_triton::flash_backward", _differentiate_twice, setup_context=_save_nothing, lib=_library
)

_gradients = transformable(torch.ops.attnreg_triton.flash_backward, _save_nothing, _differentiate_twice)
attend = transformable(torch.ops.attnreg_triton.flash_forward, _save, _differentiate)
"""(out, lse), differentiable: FIELDS in order, then the plan's text."""
attend_for_gradients = transformable(torch.ops.attnreg_triton.flash_forward_for_gradients, _save, _differentiate)
"""(out, lse, what lse's rounding left), for problems that need gradients."""
