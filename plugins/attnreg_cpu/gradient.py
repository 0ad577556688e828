"""The native kernels under autograd: gradients of q, k, v and NAMED, also through lse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnreg import errors
from attnreg_cpu.arguments import dense_rows, longest, strides_of
from attnreg_cpu.threads import thread_count
from attnreg_cpu.variant import Kernel

if TYPE_CHECKING:
    from attnreg_cpu.prefill import Forward

NAMED = ("bias", "sinks", "score_weight")
"""Named tensors that have gradients here."""
LANES = 16  # rows of float32 sums are padded to a multiple of the widest vector


class Differentiable:
    """run(q, k, v, **tensors) of one prepared problem whose inputs may need gradients."""

    def __init__(self, forward: Forward, kernel: Kernel) -> None:
        self.forward = forward
        self._kernel = kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        rest = {name: x for name, x in tensors.items() if name not in NAMED}
        out, lse, _ = _Attention.apply(self, rest, q, k, v, *(tensors.get(name) for name in NAMED))  # type: ignore[no-untyped-call]
        return (out, lse) if self.forward.return_lse else out

    def compute(self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, lse_low), without autograd; the backward pass reads all three.

        float32 keeps little of log(sum) where a row's maximum is large, and nothing at the lowest numbers, which
        padding masks hold; lse_low is what is missing. lse alone would make each weight of such a row 1.
        """
        return self.forward.compute_for_gradients(q, k, v, tensors)

    def backward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor],
        upstream: tuple[Tensor, Tensor | None],
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, and the gradients of NAMED where wanted, each shaped and typed like its tensor."""
        bias, sinks, weight = (tensors.get(name) for name in NAMED)
        named = {name: x for name, x in tensors.items() if name != "sinks"}
        d_out, d_lse = upstream
        d_q, d_k, d_v, d_bias, d_weight = self._gradients(inputs, named, results, d_out, d_lse, wanted)
        if d_bias is not None and bias is not None:
            d_bias = d_bias.sum_to_size(bias.shape).to(bias.dtype)
        d_sinks = None
        if wanted[NAMED.index("sinks")] and sinks is not None:
            d_sinks = _sink_gradient(sinks, *results, d_out, d_lse, self.forward.layout)
        if d_weight is not None and weight is not None:
            d_weight = d_weight.sum((0, 1))[:, : weight.shape[1]].sum_to_size(weight.shape).to(weight.dtype)
        return d_q, d_k, d_v, d_bias, d_sinks, d_weight

    def _gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor],
        d_out: Tensor,
        d_lse: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """dq, dk, dv, and where wanted, as float32 sums, of bias [B, Hq, Sq, Skv] and weight [shares, B, Hq, D]."""
        (q, k, v), (out, lse, lse_low) = (dense_rows(x) for x in inputs), results
        forward = self.forward
        batch, skv = forward.sizes(q, k, tensors)
        kv_heads = k.shape[1] if forward.layout != "bshd" else k.shape[2]
        d_out, lse, lse_low = dense_rows(d_out), lse.contiguous(), lse_low.contiguous()
        # Packed rows of no sequence are never written.
        d_q = (q.new_zeros if forward.layout == "thd" else q.new_empty)(q.shape)
        shares = shares_of(batch * kv_heads, thread_count())
        d_k, d_v = _sums(k, shares), _sums(v, shares)
        d_bias = d_weight = None
        more: dict[str, int] = {"splits": shares, "lse_low": lse_low.data_ptr()}
        if wanted[NAMED.index("score_weight")]:
            d_weight = _sums(q.new_empty(batch, lse.shape[-2], q.shape[-1]), shares)
            more |= {"d_weight": d_weight.data_ptr(), "d_weight_row": d_weight.stride(-2)}
        if wanted[NAMED.index("bias")]:
            size = (batch, lse.shape[-2], *_bias_size(q, skv, tensors, forward.layout))
            d_bias = lse.new_zeros(size)
            more |= {"d_bias": d_bias.data_ptr(), "d_bias_rows": d_bias.shape[2], "d_bias_keys": d_bias.shape[3]}
        layout = forward.layout
        _put(more, "d_out", d_out, layout)
        _put(more, "d_q", d_q, layout)
        for name, sums in (("d_k", d_k), ("d_v", d_v)):
            _put(more, name, sums[0], layout)
            more[f"{name}_share"] = sums.stride(0)
        if d_lse is not None:
            d_lse = d_lse.contiguous()
            more["d_lse"] = d_lse.data_ptr()
            more |= {"d_lse_row": d_lse.stride(-1), "d_lse_head": d_lse.stride(-2)}
            more["d_lse_batch"] = d_lse.stride(0) if layout != "thd" else 0
        forward.launch(self._kernel, (q, k, v), out, lse, tensors, more)
        return d_q, _finished(d_k, k), _finished(d_v, v), d_bias, d_weight


def shares_of(units: int, threads: int) -> int:
    """Shares that each of `units` KV heads is cut into: the fewest that keep all threads busy to the end.

    Each share costs float32 memory as large as k and v.
    """
    for shares in range(1, threads + 1):
        if units * shares >= 4 * threads or units * shares % threads == 0:
            return shares
    return 1


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Differentiable,
        tensors: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *own: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        named = {**tensors, **_given(own)}
        out, lse, lse_low = call.compute(q, k, v, named)
        ctx.mark_non_differentiable(lse_low)
        ctx.call = call
        # Saved, all tensors are watched: one that is overwritten before the backward pass is torch's error.
        ctx.names = tuple(name for name, x in tensors.items() if isinstance(x, Tensor))
        ctx.rest = {name: x for name, x in tensors.items() if not isinstance(x, Tensor)}
        ctx.save_for_backward(q, k, v, out, lse, lse_low, *own, *(tensors[name] for name in ctx.names))
        ctx.set_materialize_grads(False)
        return out, lse, lse_low

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, lse_low, *saved = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        if d_out is None:
            d_out = torch.zeros_like(out)
        own, rest = saved[: len(NAMED)], saved[len(NAMED) :]
        named = {**ctx.rest, **dict(zip(ctx.names, rest, strict=True)), **_given(own)}
        wanted = ctx.needs_input_grad[-len(NAMED) :]
        found = _Gradients.apply(ctx.call, named, wanted, q, k, v, out, lse, lse_low, d_out, d_lse)  # type: ignore[no-untyped-call]
        return None, None, *found


def _given(own: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {name: x for name, x in zip(NAMED, own, strict=True) if x is not None}


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, so that a second derivative meets an error, not a missing edge."""

    @staticmethod
    def forward(ctx: Any, call: Differentiable, named: dict[str, Any], wanted: tuple[bool, ...], *x: Any) -> Any:
        q, k, v, out, lse, lse_low, d_out, d_lse = x
        return call.backward((q, k, v), named, (out, lse, lse_low), (d_out, d_lse), wanted)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        never(ctx, *upstream)


def never(ctx: Any, *upstream: Any) -> Any:
    """The backward of a backward pass."""
    raise errors.BackendError("cpu: no second derivative; attnreg.use_backend('eager') computes one")


def _sums(x: Tensor, shares: int) -> Tensor:
    """Float32 zeros shaped like x, once a share, with rows padded to whole vectors."""
    padded = -(-x.shape[-1] // LANES) * LANES
    return x.new_zeros(shares, *x.shape[:-1], padded, dtype=torch.float32)


def _finished(sums: Tensor, x: Tensor) -> Tensor:
    total = sums[0] if sums.shape[0] == 1 else sums.sum(0)
    return total[..., : x.shape[-1]].to(x.dtype).contiguous()


def _put(more: dict[str, int], name: str, x: Tensor, layout: str) -> None:
    """Pointer and strides of a gradient in the spec's layout."""
    more[name] = x.data_ptr()
    for part, stride in zip(("batch", "head", "row"), strides_of(x, layout), strict=True):
        more[f"{name}_{part}"] = stride


def _bias_size(q: Tensor, skv: int, tensors: Mapping[str, Any], layout: str) -> tuple[int, int]:
    """Rows and keys of the bias that a call may read."""
    if layout != "thd":
        return (q.shape[2] if layout == "bhsd" else q.shape[1]), skv
    paged = tensors.get("cu_seqlens_k") is None
    return longest(tensors, "q"), skv if paged else longest(tensors, "k")


def _sink_gradient(
    sinks: Tensor, out: Tensor, lse: Tensor, lse_low: Tensor, d_out: Tensor, d_lse: Tensor | None, layout: str
) -> Tensor:
    """The sink joins the denominator only: its weight times (d_lse - out . d_out), summed over rows and batch."""
    change = -(out.float() * d_out.float()).sum(-1)
    if layout != "bhsd":
        change = change.transpose(-1, -2)
    if d_lse is not None:
        change = change + d_lse
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp((sinks.float().view(-1, 1) - lse) - lse_low))
    total = weight * change
    return (total.sum((0, 2)) if total.dim() == 3 else total.sum(1)).to(sinks.dtype)
