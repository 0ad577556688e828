"""Gradients by the native kernels: of q, k, v, bias, sinks and score_weight, through out and lse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnreg_cpu.arguments import dense_rows, longest, strides_of
from attnreg_cpu.threads import thread_count
from attnreg_cpu.variant import Kernel

if TYPE_CHECKING:
    from attnreg_cpu.prefill import Forward

LANES = 16  # rows of float32 sums are padded to a multiple of the widest vector


class Backward:
    """The kernels of one prepared problem whose inputs may need gradients; attnreg puts autograd around them."""

    def __init__(self, forward: Forward, kernel: Kernel) -> None:
        self.forward = forward
        self._kernel = kernel

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse, low); see attnreg's Kernels."""
        return self.forward.compute(q, k, v, tensors, for_backward)

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor],
        upstream: tuple[Tensor, Tensor | None],
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        """The gradients of the names in `wanted`, each shaped and typed like its tensor; see attnreg's Kernels."""
        named = {name: x for name, x in tensors.items() if name != "sinks"}
        d_out, d_lse = upstream
        d_q, d_k, d_v, d_bias, d_weight = self._gradients(inputs, named, results, d_out, d_lse, wanted)
        found = {"q": d_q, "k": d_k, "v": d_v}
        if d_bias is not None:
            bias = tensors["bias"]
            found["bias"] = d_bias.sum_to_size(bias.shape).to(bias.dtype)
        if "sinks" in wanted:
            found["sinks"] = _sink_gradient(tensors["sinks"], *results, d_out, d_lse, self.forward.layout)
        if d_weight is not None:
            weight = tensors["score_weight"]
            total = d_weight.sum((0, 1))[:, : weight.shape[1]]
            found["score_weight"] = total.sum_to_size(weight.shape).to(weight.dtype)
        return found

    def _gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor],
        d_out: Tensor,
        d_lse: Tensor | None,
        wanted: frozenset[str],
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
        if "score_weight" in wanted:
            d_weight = _sums(q.new_empty(batch, lse.shape[-2], q.shape[-1]), shares)
            more |= {"d_weight": d_weight.data_ptr(), "d_weight_row": d_weight.stride(-2)}
        if "bias" in wanted:
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
