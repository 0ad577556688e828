"""Make a Call out of the tensors of one, in layout bhsd, and its frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from attnreg import AttentionSpec
from attnreg_eager.chunks import Call
from attnreg_eager.dropout import Keep, draw_seed, keeps, keeps_traced
from attnreg_eager.frame import Frame
from attnreg_eager.keys import Scales
from attnreg_eager.tile import Tile, any_grad

transform: Callable[[], object | None] = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
"""The innermost torch.func transform (vmap, grad, jvp) in force, or None: under one, values cannot be read either."""

__all__ = ["compute_dtype", "computed", "full_rank", "keep_of", "make_call", "traced"]


def compute_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def make_call(
    frame: Frame,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    longest: int,
    keep: Callable[[int], Keep] | None,
    table: Tensor | None = None,
) -> Call:
    """The call of `frame`; `longest` counts the keys of the longest sequence, which block scales cut."""
    spec, tensors = frame.spec, frame.tensors
    dtype = compute_dtype(q)
    weight, sinks = tensors.get("score_weight"), tensors.get("sinks")
    # Many tiles add to these gradients: they add up in the dtype of the computation, not in half precision.
    k, v = (x.to(dtype) if any_grad(x) else x for x in (k, v))
    return Call(
        tile=Tile(spec, Scales.of(spec, tensors, longest), dtype, spec.score.factor(q.shape[-1])),
        frame=frame,
        q=q,
        k=k,
        v=v,
        table=table,
        bias=bias,
        weight=weight,
        sinks=None if sinks is None else sinks.view(1, -1, 1),
        keep=keep,
    )


def computed(tensors: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The named tensors that were given, with those that may need a gradient in the dtype of the computation.

    A bias that needs none is converted tile by tile: it may be the largest tensor of the call.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    wide = {name: x.to(dtype) for name, x in given.items() if name in ("sinks", "score_weight", "bias")}
    if "bias" in wide and not any_grad(given["bias"]):
        del wide["bias"]
    return {**given, **wide}


def keep_of(spec: AttentionSpec, tensors: Any, device: torch.device, tracing: bool) -> Callable[[int], Keep] | None:
    """Where the dropout masks of a call come from; None without dropout."""
    if not spec.dropout_p:
        return None
    generator = tensors.get("generator")
    if tracing:
        return keeps_traced(spec.dropout_p, device, generator)
    return keeps(draw_seed(generator), spec.dropout_p, device)


def full_rank(bias: Tensor | None) -> Tensor | None:
    """The bias with all four dimensions."""
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def traced(*xs: Tensor) -> bool:
    """Is a graph being captured, so that values cannot be read and sizes may be symbols?"""
    if torch.compiler.is_compiling() or transform() is not None:
        return True
    return any(
        isinstance(x, (FakeTensor, FunctionalTensor)) or any(isinstance(n, torch.SymInt) for n in x.shape) for x in xs
    )
