"""The flash kernels as functions of tensors, forward and backward, which attnreg wraps for autograd and for recorders.

They synchronise nothing and allocate only through torch, so they record into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, masks

from . import ready
from .calls import call_tensors
from .flash_launch import backward_launches, forward_launches, low_like, output_like, partials_like
from .launch import ROWS_AXIS, Inputs, Launch, natural, sizes
from .plan import Plan
from .support import GRADIENTS, MAX_INDEX

FIELDS = (
    "q", "k", "v", "bias", "alibi_slopes", "sinks", "prefix_lengths", "document_first", "document_last", "kv_lengths",
    "query_offset", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seed",
)  # fmt: skip
LONGEST_TILE = 256
"""No kernel's tile has more rows or keys."""


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


def forward_for_gradients(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """`forward`, and what the rounding of lse left, of its shape; None where the backward kernels read no such."""
    out, lse = output_like(plan, inputs, sizes(plan, inputs))
    low = low_like(inputs, lse)

    def make(tensors: Sequence[Any]) -> list[Launch]:
        *given, out, lse, low = tensors
        return forward_launches(plan, Inputs(*given), out, lse, None, low)

    ready.start(("forward for gradients", plan), inputs.tensors(), (out, lse, low), make)
    return out, lse, low


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
    first, second, third, fourth, fifth = (inputs.q.new_empty(0) if x is None else x for x in found)
    return first, second, third, fourth, fifth


def sink_gradient(sinks: Tensor, lse: Tensor, low: Tensor | None, delta: Tensor) -> Tensor:
    """Gradient of the sinks [Hq]: a key of score `sink` and value 0, so `-sum(exp(sink - lse) * delta)`."""
    heads = sinks.to(torch.float32).view(-1, 1)
    above = heads - lse if low is None else heads - lse - low
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(above))
    summed = (share * delta).sum(-1)
    return -(summed.sum(0) if summed.dim() == 2 else summed)


class FlashKernels:
    """The kernels of a problem without autograd (attnreg's Kernels), by one plan."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        band = masks.as_band(problem.spec.mask)
        assert band is not None, "supports() refuses a mask that is no band"
        self._spec, self._band, self._plan, self._with_lse = problem.spec, band, plan, problem.spec.return_lse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        out, lse = forward(self._plan, self._inputs(q, k, v, tensors))
        return (out, lse) if self._with_lse else out

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse, low); see attnreg's Kernels."""
        given = self._inputs(q, k, v, tensors)
        return forward_for_gradients(self._plan, given) if for_backward else (*forward(self._plan, given), None)

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor | None],
        upstream: tuple[Tensor, Tensor | None],
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        """The gradients of the wanted names; see attnreg's Kernels."""
        given, read = dict(zip("qkv", inputs, strict=True)) | dict(tensors), self._inputs(*inputs, tensors)
        out, lse, low = results
        saved = (out, lse, low if natural(read) else None)
        found = backward(self._plan, read, saved, upstream, [name in wanted for name in GRADIENTS])
        named = zip(GRADIENTS, found, strict=True)
        return {n: x.reshape(given[n].shape).to(given[n].dtype) for n, x in named if n in wanted}

    def _inputs(self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Inputs:
        named = call_tensors(self._spec, self._band, q, tensors)
        return make_inputs(self._plan, q, k, v, *(named.get(name) for name in FIELDS[3:]))
