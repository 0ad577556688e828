"""The call of attention that a transformers layer makes: in eager mode, or in torch.compile's graph."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from attnreg.dispatch import attention
from attnreg.masks import Full, Mask, SlidingWindow
from attnreg.masks.expression import And
from attnreg.scores import ScaledDot
from attnreg.spec import AttentionSpec
from attnreg.tracing import opened_at_trace_time

__all__ = ["Said", "Window", "call"]

Window = tuple[()] | tuple[int, int]
"""Keys that a query sees to its left and right, on top of the mask; empty for no bound."""

Said = tuple[str, float, float, float, bool, bool]
"""The rest of the spec: align, scale, softcap, dropout_p, deterministic, return_lse."""

Plain = tuple[tuple[str] | tuple[str, int, int], ...]
"""A conjunction of masks as plain values, which is all that Dynamo puts into a graph: kind, and a window's sizes."""


def call(mask: Mask, window: Window, said: Said, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Any:
    """attention() of bhsd tensors; bias and sinks are meant where `tensors` has them."""
    if torch.compiler.is_dynamo_compiling():
        _open_graph_call()
        return _graph_call(_plain(mask), window, said, q, k, v, tensors)
    return attention(_spec(mask, window, said, "bias" in tensors, "sinks" in tensors), q, k, v, **tensors)


@functools.lru_cache(maxsize=1024)
def _spec(mask: Mask, window: Window, said: Said, bias: bool, sinks: bool) -> AttentionSpec:
    """One spec object a meaning: making one costs far more than a call."""
    if window:
        mask = SlidingWindow(*window) if mask == Full() else mask & SlidingWindow(*window)
    align: Any
    align, scale, softcap, dropout_p, deterministic, return_lse = said
    return AttentionSpec(
        mask=mask,
        align=align,
        score=ScaledDot(scale),
        softcap=softcap,
        bias=bias,
        sinks=sinks,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=return_lse,
    )


def _plain(mask: Mask) -> Plain:
    parts = mask.of if isinstance(mask, And) else (mask,)
    return tuple((p.kind, p.left, p.right) if isinstance(p, SlidingWindow) else (p.kind,) for p in parts)


def _in_graph(plain: Plain, window: Window, said: Said, q: Tensor, k: Tensor, v: Tensor, tensors: Any) -> Any:
    """The call as Dynamo puts it into its graph: its spec is made at trace time."""
    parts = [SlidingWindow(int(p[1]), int(p[2])) if len(p) == 3 else Mask.from_json({"kind": p[0]}) for p in plain]
    mask = functools.reduce(operator.and_, parts)
    align, scale, softcap, dropout_p, deterministic, return_lse = said
    scale, softcap, dropout_p = float(scale), float(softcap), float(dropout_p)  # a module's float may be a symbol
    said = (align, scale, softcap, dropout_p, deterministic, return_lse)
    return attention(_spec(mask, window, said, "bias" in tensors, "sinks" in tensors), q, k, v, **tensors)


_graph_call = _in_graph
_open_graph_call = opened_at_trace_time(globals(), "_graph_call")
