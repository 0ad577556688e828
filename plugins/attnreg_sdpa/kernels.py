"""torch's SDPA kernels behind one signature: kernel(q, k, v, mask, causal, scale, dropout_p) -> output."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

__all__ = ["Kernel", "kernel", "seeded", "with_lse"]

Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool, float, float], Tensor]

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_MATH = torch.ops.aten._scaled_dot_product_attention_math


def kernel(name: str, device: str, *, grouped: bool) -> Kernel:
    """The kernel of that name: "auto" (torch chooses), "flash", "math", and on GPUs "efficient" and "cudnn".

    `grouped` lets q have more heads than k. On the CPU the named kernels are called as such: the
    context manager that asks for one costs more than a small attention.
    """

    def auto(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout_p: float
    ) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=grouped)

    if name == "auto":
        return auto
    if device == "cpu":
        return _cpu_flash if name == "flash" else _cpu_math(grouped)
    chosen = {
        "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
    }[name]  # fmt: skip

    def named(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout_p: float
    ) -> Tensor:
        with sdpa_kernel(chosen):
            return auto(q, k, v, mask, causal, scale, dropout_p)

    return named


def _cpu_math(gqa: bool) -> Kernel:
    def math(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout_p: float
    ) -> Tensor:
        out: Tensor = _MATH(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=gqa)[0]
        return out

    return math


def _cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout_p: float
) -> Tensor:
    return _flash(q, k, v, mask, causal, scale)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The CPU flash kernel, which wants one head_dim, dense last dimensions and at least one row and key."""
    if _empty(q, k):
        return _nothing(q, k, v)
    dim, dim_v = q.shape[-1], v.shape[-1]
    if dim != dim_v:
        # Columns of zeros change no product; the output's are cut off again.
        most = max(dim, dim_v)
        q, k, v = (pad(x, (0, most - x.shape[-1])) if x.shape[-1] < most else x for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = _FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return (out if dim_v == out.shape[-1] else out[..., :dim_v]), lse


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output 0 and lse -inf, still functions of all three, so that their gradients are 0 and not missing."""
    held = 0 * (q.sum() + k.sum() + v.sum())
    return held.expand(*q.shape[:3], v.shape[-1]).clone(), (held - torch.inf).expand(q.shape[:3]).clone()


def _empty(q: Tensor, k: Tensor) -> bool:
    return any(isinstance(n, int) and n == 0 for n in (*q.shape[:3], k.shape[2]))


class _FlashWithLse(torch.autograd.Function):
    """The CPU flash kernel with a gradient for lse as well, which torch's own formula leaves out.

    dS = P * (dP - sum(dO * O) + dlse). A value column of ones whose output gradient is dlse and whose output
    counts as 0 adds dlse to dP and nothing to the sum: so torch's backward kernel computes this too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, mask, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        dim, columns = v.shape[-1], 8  # a multiple of the vector width, of which one is used
        q, k, out = (pad(x, (0, columns)) for x in (q, k, out))
        v = pad(v, (0, columns), value=1.0)
        extra = pad(grad_lse.to(grad_out.dtype).unsqueeze(-1), (0, columns - 1))
        dq, dk, dv = _FLASH_BACKWARD(
            torch.cat([grad_out, extra], -1), q, k, v, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        return dq[..., :dim], dk[..., :dim], dv[..., :dim], None, None, None


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, grad: bool
) -> tuple[Tensor, Tensor]:
    """Output and natural-log lse [B, Hq, Sq] by the CPU flash kernel; -inf where a row attends nothing."""
    if _empty(q, k):
        return _nothing(q, k, v)
    if grad:
        dim_v = v.shape[-1]
        most = max(q.shape[-1], dim_v)
        q, k, v = (pad(x, (0, most - x.shape[-1])).contiguous() for x in (q, k, v))
        out, lse = _FlashWithLse.apply(q, k, v, mask, causal, scale)  # type: ignore[no-untyped-call]  # torch's
        out = out[..., :dim_v]
    else:
        out, lse = _flash(q, k, v, mask, causal, scale)
    if mask is not None:
        lse = torch.where((mask > -torch.inf).any(-1), lse, -torch.inf)
    return out, lse


_SEEDING = threading.Lock()


def seeded(run: Kernel, generator: torch.Generator) -> Kernel:
    """`run` with its dropout drawn from `generator`, which SDPA has no argument for.

    The device's default generator is seeded with a number drawn from `generator` for the length of the call,
    and then put back as it was.
    """

    def call(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout_p: float
    ) -> Tensor:
        drawn = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device)
        with _SEEDING, torch.random.fork_rng([q.device] if q.is_cuda else [], device_type="cuda"):
            if q.is_cuda:
                torch.cuda.manual_seed(int(drawn))
            else:
                torch.default_generator.manual_seed(int(drawn))
            return run(q, k, v, mask, causal, scale, dropout_p)

    return call
