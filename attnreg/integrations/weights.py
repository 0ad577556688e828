"""Attention weights for a transformers layer: who asks for them, and their computation by the definition."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers.utils.output_capturing import _active_collector as collector
except ImportError:  # an older transformers, whose wrappers hold the argument in their own frames
    collector = None

__all__ = ["asked_for", "weights"]

NAME = "output_attentions"


def asked_for(module: nn.Module, said: Any) -> bool:
    """Whether the model returns this layer's weights to its user. said: `output_attentions` as the layer got it.

    A model either records what its layers return through hooks, and says so in a context variable, or collects it in
    a loop of its own, of which only the config and the calling frames tell. In a graph of Dynamo's that does not begin
    at the model neither can be read: the answer is then yes, and weights that nobody takes are dead code there.
    """
    if said or getattr(getattr(module, "config", None), NAME, None):
        return True
    if torch.compiler.is_dynamo_compiling():
        recording = collector.get() if collector is not None and collector.compiling else None
        return recording is None or _records(recording)
    recording = collector.get() if collector is not None else None
    return _records(recording) if recording is not None else _said_above()


def _records(recording: dict[str, Any]) -> bool:
    return any(key.endswith("attentions") for key in recording)


def _said_above() -> bool:
    """Whether a caller holds output_attentions=True, as the loops over layers of models without hooks do."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if NAME in code.co_varnames or "kwargs" in code.co_varnames:
            known = frame.f_locals
            options = known.get("kwargs")
            if known.get(NAME) or (isinstance(options, dict) and options.get(NAME)):
                return True
        frame = frame.f_back
    return False


def weights(
    q: Tensor,
    k: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """softmax of the scores, [B, Hq, Sq, Skv] in q's dtype; 0 in a row with nothing to attend. Before dropout.

    q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D]; allowed: bool and bias: floats that broadcast to the result; sinks: [Hq]
    or [B, Hq, Sq, 1]. Computed in float32 at least, so in Sq x Skv memory a head, and differentiable.
    """
    if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
        return _weights(q, k, allowed, bias, sinks, scale, softcap)
    with _kept():
        return _weights(q, k, allowed, bias, sinks, scale, softcap)


def _weights(
    q: Tensor,
    k: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    batch, heads, rows, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(exact).reshape(batch, k.shape[1], heads // k.shape[1], rows, q.shape[-1])
        scores = (grouped @ k.to(exact).unsqueeze(2).mT).flatten(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(exact)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            sink = sinks.to(exact).reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks.to(exact)
            scores = torch.cat([scores, sink.expand(batch, heads, rows, 1)], -1)
        # A row of -inf has no softmax: its gradients would be NaN as well.
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        probabilities = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        shown: Tensor = probabilities if sinks is None else probabilities[..., :-1]
        return shown.to(q.dtype)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Backward's tensors stay as they are: activation checkpointing computes a layer again, and then nobody records."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # inside torch.func transforms, where there are no such hooks
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        yield


def _same(x: Tensor) -> Tensor:
    return x
