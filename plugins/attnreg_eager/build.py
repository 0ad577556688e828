"""Run the attention of bhsd operands over a frame: in one tile, in recomputed tiles, or into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from attnreg import AttentionSpec, scores
from attnreg_eager.chunks import Call, Operands, has_tangent
from attnreg_eager.dropout import Keep, draw_seed, keeps, keeps_traced
from attnreg_eager.frame import Frame
from attnreg_eager.gradient import Recomputed
from attnreg_eager.keys import Scales
from attnreg_eager.plan import plan
from attnreg_eager.tile import Tile

__all__ = ["compute", "compute_dtype", "keep_of", "operands", "traced"]

transform: Callable[[], object | None] = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
"""The innermost torch.func transform (vmap, grad, jvp) in force, or None: under one, values cannot be read either."""


def compute_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def operands(q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> tuple[Operands, dict[str, Any]]:
    """What may need a gradient, at full rank, and the other named tensors."""
    rest = {name: x for name, x in tensors.items() if x is not None}
    bias, weight, sinks, slopes = (rest.pop(name, None) for name in ("bias", "score_weight", "sinks", "alibi_slopes"))
    dtype = compute_dtype(q)
    return Operands(
        q,
        k,
        v,
        bias=None if bias is None else bias[(None,) * (4 - bias.dim())],
        weight=None if weight is None else weight.to(dtype),
        sinks=None if sinks is None else sinks.to(dtype).view(1, -1, 1),
        slopes=None if slopes is None else slopes.to(dtype).view(-1, slopes.shape[-1]),
    ), rest


def compute(
    x: Operands, frame: Frame, *, longest: int, keep: Callable[[int], Keep] | None, table: Tensor | None, tracing: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, Dv] and lse [B, Hq, Sq] in the dtype of the computation.

    longest: keys of the longest sequence, which block scales cut. table: of a paged cache, [B, P].
    """
    spec = frame.spec
    scales = Scales.of(spec, frame.tensors, longest)
    tile = Tile(spec, scales, compute_dtype(x.q), spec.score.factor(x.q.shape[-1]))
    call = Call(tile, frame, table, keep)
    if tracing:
        return call.whole(x)
    batch, q_heads, sq, head_dim = x.q.shape
    skv, kv_heads = frame.j.shape[-1], q_heads // frame.group
    hidden = head_dim if isinstance(spec.score, scores.Additive) else 0
    sizes = plan(batch, kv_heads, frame.group, sq, skv, x.k.shape[-1] + x.v.shape[-1], hidden)
    if sizes.one_tile(batch, kv_heads, sq, skv):
        return call.whole(x)
    # Forward mode goes through the tiles themselves.
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in x) and not has_tangent(*x):
        done: tuple[Tensor, Tensor] = Recomputed.apply(call, sizes, *x)  # type: ignore[no-untyped-call]  # torch's own
        return done
    return call.walk(x, sizes)


def keep_of(
    spec: AttentionSpec, tensors: Mapping[str, Any], device: torch.device, tracing: bool
) -> Callable[[int], Keep] | None:
    """Where the dropout masks of a call come from; None without dropout."""
    if not spec.dropout_p:
        return None
    generator = tensors.get("generator")
    if tracing:
        return keeps_traced(spec.dropout_p, device, generator)
    return keeps(draw_seed(generator), spec.dropout_p, device)


def traced(*xs: Tensor) -> bool:
    """Is a graph being captured, so that values cannot be read and sizes may be symbols?"""
    if torch.compiler.is_compiling() or transform() is not None:
        return True
    return any(
        isinstance(x, (FakeTensor, FunctionalTensor)) or any(isinstance(n, torch.SymInt) for n in x.shape) for x in xs
    )
