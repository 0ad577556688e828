"""Gradients of a call: each tile is computed again in the backward, and the gradients add up in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnreg_eager.chunks import ALL, Call, Operands, Slab, bias_rows, has_tangent
from attnreg_eager.keys import scatter
from attnreg_eager.plan import Sizes

__all__ = ["Recomputed"]

SHARED = ("k", "v", "weight", "sinks", "slopes")
Pair = tuple[Tensor, Tensor]


class Recomputed(torch.autograd.Function):
    """`call.walk(x, sizes)` that keeps its operands and nothing else for the backward.

    One node for the whole call, not one a tile: the forward writes into its output, so that no small results stay
    between the large temporaries and keep the allocator from using their memory again.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, sizes: Sizes, *operands: Any) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.sizes = call, sizes
        ctx.save_for_backward(*operands)
        return call.walk(Operands(*operands), sizes)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        x, wanted = Operands(*ctx.saved_tensors), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or has_tangent(d_out, d_lse) or _batched(d_out) or _batched(d_lse):
            return None, None, *_again(ctx.call, ctx.sizes, x, wanted, (d_out, d_lse))
        return None, None, *_Sums(ctx.call, ctx.sizes, x, wanted).run(d_out, d_lse)


def _again(call: Call, sizes: Sizes, x: Operands, wanted: tuple[bool, ...], grads: Pair) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated in turn: an ordinary graph of the same tiles, whose memory grows."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [y for y, need in zip(x, wanted, strict=True) if y is not None and need]
        results, weights = _reached(call.walk(x, sizes), grads)
        if not results:
            pairs = zip(x, wanted, strict=True)
            return tuple(torch.zeros_like(y) if y is not None and need else None for y, need in pairs)
        some = iter(torch.autograd.grad(results, leaves, weights, create_graph=graph, allow_unused=True))
    return tuple(next(some) if need else None for need in wanted)


def _batched(grad: Tensor) -> bool:
    """Is the backward pass one of many at once (is_grads_batched, vmap)? Then sums in place have no room for all."""
    return bool(_functorch.is_functorch_wrapped_tensor(grad) or _functorch.is_legacy_batchedtensor(grad))


_functorch: Any = torch._C._functorch


def _reached(results: Pair, grads: Pair) -> tuple[list[Tensor], list[Tensor]]:
    """The results that depend on a leaf, and their gradients: v alone reaches out but not lse; no key, neither."""
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
    return [result for result, _ in pairs], [grad for _, grad in pairs]


class _Sums:
    """The sums of one backward, in the dtype of the computation, and the walk that adds to them."""

    def __init__(self, call: Call, sizes: Sizes, x: Operands, wanted: tuple[bool, ...]) -> None:
        self.call, self.sizes, self.x = call, sizes, x
        self.sums: dict[str, Tensor] = {
            name: torch.zeros(y.shape, dtype=call.tile.dtype, device=y.device)
            for name, y, need in zip(Operands._fields, x, wanted, strict=True)
            if y is not None and need
        }

    def run(self, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        call = self.call
        for slab in call.slabs(self.x, self.sizes):
            part = call.cut(self.x, slab)
            # All rows of a slab share these: converted once, and their gradients add up on the leaf.
            shared = {name: self._leaf(name, getattr(part, name)) for name in SHARED}
            frame = call.frame.cut(slab.batch, slab.heads, ALL, ALL)
            for rows in slab.rows:
                at = (slab.batch, slab.heads, rows.at)
                q, bias = self._leaf("q", part.q[:, :, rows.at]), self._leaf("bias", bias_rows(part.bias, rows.at))
                step = part._replace(q=q, bias=bias, **shared)
                with torch.enable_grad():
                    results = call.rows(step, frame.cut(ALL, ALL, rows.at, ALL), self.sizes.keys, rows.n)
                leaves = [y for y in step if y is not None and y.requires_grad]
                reached, weights = _reached(results, (d_out[at], d_lse[at]))
                if reached:
                    torch.autograd.backward(reached, weights, inputs=leaves)
                self._add("q", at, q)
                self._add("bias", at, bias)
            self._share(slab, shared)
        named = zip(Operands._fields, self.x, strict=True)
        return tuple(self.sums[name].to(y.dtype) if y is not None and name in self.sums else None for name, y in named)

    def _leaf(self, name: str, y: Any) -> Any:
        """The operand as a leaf of a tile's own small graph; as it is where no gradient is wanted."""
        return y.detach().to(self.call.tile.dtype).requires_grad_() if name in self.sums else y

    def _share(self, slab: Slab, shared: dict[str, Any]) -> None:
        for name in ("k", "v"):
            grad = None if shared[name] is None else shared[name].grad
            if name in self.sums and self.call.table is not None and grad is not None:
                scatter(self.sums[name], slab.kv, self.call.table[slab.batch], grad)
            else:
                self._add(name, (slab.batch, slab.kv), shared[name])
        self._add("weight", (slab.heads,), shared["weight"])
        self._add("sinks", (ALL, slab.heads), shared["sinks"])
        self._add("slopes", (), shared["slopes"])

    def _add(self, name: str, at: tuple[slice, ...], leaf: Any) -> None:
        """Add a leaf's gradient at its place; a dimension of size 1 is shared by all."""
        if name in self.sums and leaf.grad is not None:
            total = self.sums[name]
            total[tuple(ALL if n == 1 else c for n, c in zip(total.shape, at, strict=False))] += leaf.grad
