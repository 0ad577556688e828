"""The numerics of FP8 attention, rounding step by rounding step, in plain torch: the oracle of the FP8 kernels.

All arithmetic is float32 and rounds to nearest even; "fp8" is the spec's `dtype.compute`, e4m3 (largest value 448)
or e5m2 (57344). A kernel that follows these steps with the same `block_q` and `block_kv` gives the same bits, up to
the order in which a matrix product adds its terms.

1. Keys in use. A key that no row may attend counts as 0, so that no scale sees it.
2. Rotation (`dtype.rotate`). q and k are padded with zeros to the next power of two D', the signs of some columns are
   turned (`flips`, the same for both), and the rows are multiplied by the Walsh-Hadamard matrix: butterflies
   (a + b, a - b) at strides 1, 2, 4, ..., then one product with float32(D'**-0.5). It leaves q . k as it is and spreads
   outliers over all entries (QuaRot, arXiv:2404.00456; FlashAttention-3, arXiv:2407.08608). Without the signs a row of
   equal entries would become a single outlier.
3. Scales. amax is the largest magnitude of a whole tensor ("tensor"), of one batch and KV head ("head"; q: of the
   query heads of that KV head), or of `block_q` rows of a query head and `block_kv` keys of a KV head ("block").
   inverse = largest / amax and descale = amax / largest; both 1 where amax is 0. Tensors that come as fp8 keep the
   descales of the call, and steps 1 to 4 leave them alone.
4. Quantisation. fp8(clamp(x * inverse, -largest, largest)).
5. Scores. s = (q8 . k8, summed in float32) * ((q_descale * k_descale) * scale); then softcap, bias, ALiBi and mask.
6. Softmax, key block by key block from the left. m' = max(m, largest s of the block), p = exp2((s - m') * log2(e)),
   and l' = l * exp2((m - m') * log2(e)) + sum(p), before p is rounded. A masked s gives p = 0; while m' is -inf, 0
   stands for it.
7. Weights. p8 = fp8(p * 2**8) for e4m3, fp8(p * 2**15) for e5m2: p is at most 1, so this static scale is exact to
   apply and to take back, and never saturates. Dropout zeroes p before that.
8. Values. acc' = acc * exp2((m - m') * log2(e)) + (p8 . v8, summed in float32) * (v_descale * 2**-8). Where a block of
   keys spans several v_descales (stored tensors with blocks of their own), p * v_descale is what step 7 rounds.
9. End. The sink joins l; out = acc / l / (1 - dropout_p) and lse = m + log(l), rounded to the contract's dtypes.

Gradients pass straight through every rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg import masks
from attnreg_eager.chunks import ALL, Call, Operands
from attnreg_eager.frame import Frame
from attnreg_eager.tile import by_kv_head, finish, finite, only_seen, seen_keys

__all__ = ["Descale", "QuantisedCall", "hadamard", "quantise"]

LOG2E = math.log2(math.e)
WEIGHT_SCALE = {torch.float8_e4m3fn: 2.0**8, torch.float8_e5m2: 2.0**15}


class _Straight(torch.autograd.Function):
    """Round to fp8 and back; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        largest = torch.finfo(dtype).max
        return x.clamp(-largest, largest).to(dtype).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    done: Tensor = _Straight.apply(x, dtype)  # type: ignore[no-untyped-call]  # torch's own
    return done


@dataclass(frozen=True)
class Descale:
    """Factors [B or 1, H or 1, N or 1] of one tensor; one serves `block` rows or keys.

    by_kv: H counts KV heads, else query heads.
    """

    value: Tensor
    block: int
    by_kv: bool

    def of(self, b: Tensor, at: Frame, index: Tensor) -> Tensor:
        """The factors of some rows or keys, by batch b and `index` within the sequence."""
        if self.value.numel() == 1:
            return self.value.reshape(1, 1, 1, 1)
        return masks.take(self.value, b, at.kv_head if self.by_kv else at.h, index // self.block)


def flips(size: int, device: torch.device) -> Tensor:
    """Bool [size]: the columns whose sign the rotation turns, one bit of a 32-bit hash of their index."""
    mixed = torch.arange(1, size + 1, dtype=torch.int64, device=device) * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77 & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 13)) & 1) != 0


def hadamard(x: Tensor) -> Tensor:
    """Step 2: x [..., D] float32 -> [..., D'], D' the next power of two."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    x = torch.where(flips(size, x.device), -x, x)
    stride = 1
    while stride < size:
        a, b = x.reshape(*x.shape[:-1], size // (2 * stride), 2, stride).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return x * torch.tensor(size**-0.5, dtype=torch.float32, device=x.device)


def quantise(x: Tensor, dtype: torch.dtype, scaling: str, block: int, group: int = 1) -> tuple[Tensor, Descale]:
    """Steps 3 and 4: fp8 values of x [B, H, N, D], as float32, and their descale.

    group: heads that share a scale under "head": the query heads of a KV head.
    """
    size = x.detach().abs().amax(-1)
    batch, heads, count = size.shape
    if scaling == "tensor":
        amax, block = size.amax().reshape(1, 1, 1) if size.numel() else size.new_zeros(1, 1, 1), max(count, 1)
    elif scaling == "head":
        by_kv = size.reshape(batch, heads // group, group * count)
        amax = by_kv.amax(-1, keepdim=True) if count else size.new_zeros(*by_kv.shape[:2], 1)
        amax, block = amax.repeat_interleave(group, 1), max(count, 1)
    else:
        blocks = -(-count // block)
        size = torch.nn.functional.pad(size, (0, blocks * block - count))
        amax = size.reshape(batch, heads, blocks, block).amax(-1)
    largest = torch.finfo(dtype).max
    none = amax == 0
    inverse = torch.where(none, 1.0, largest / torch.where(none, 1.0, amax))
    # A row of tiny values would have an infinite inverse; the largest float32 saturates it as well.
    inverse = inverse.clamp(max=torch.finfo(torch.float32).max)
    descale = torch.where(none, 1.0, amax / largest)
    per_row = inverse.repeat_interleave(block, -1)[..., :count] if inverse.shape[-1] > 1 else inverse
    return _round(x * per_row.unsqueeze(-1), dtype), Descale(descale, block, by_kv=False)


@dataclass(frozen=True)
class QuantisedCall(Call):
    """A call whose operands are fp8 values held as float32: steps 5 to 9 over them, `block_kv` keys at a time."""

    dtype: torch.dtype = torch.float8_e4m3fn
    block_kv: int = 64
    q_descale: Descale | None = None
    k_descale: Descale | None = None
    v_descale: Descale | None = None

    def rows(self, x: Operands, frame: Frame, size: int, n: int) -> tuple[Tensor, Tensor]:
        """Output and lse of some rows; `size` is the walk's and plays no part, n numbers its first tile."""
        spec, tile = self.tile.spec, self.tile
        if self.q_descale is None or self.k_descale is None or self.v_descale is None:
            raise AssertionError("a quantised call has its descales")
        shape = x.q.shape[:3]
        m = x.q.new_full(shape, -torch.inf)
        total, acc = x.q.new_zeros(shape), x.q.new_zeros((*shape, x.v.shape[-1]))
        keep = None if self.keep is None else self.keep(n)((*shape, frame.j.shape[-1]))
        weight_scale = WEIGHT_SCALE[self.dtype]
        for start in range(0, frame.j.shape[-1], self.block_kv):
            keys = slice(start, start + self.block_kv)
            at = frame.cut(ALL, ALL, ALL, keys)
            live = at.live()
            k, v = x.k[:, :, keys], x.v[:, :, keys]
            k_scale, scale = self.k_descale.of(at.bk, at, at.j), self.v_descale.of(at.bk, at, at.j)
            if live is not None:
                # A weight of 0 does not take away a NaN: what no row attends is not read at all.
                seen = seen_keys(live, at)
                k, v = only_seen(k, seen, at), only_seen(v, seen, at)
                k_scale = torch.where(seen, k_scale, 0.0)
                alone = scale.shape[-1] > 1 and not _constant(self.v_descale, start, self.block_kv)
                scale = torch.where(seen, scale, 0.0) if alone else _of_all(scale, seen)
            factor = (self.q_descale.of(at.bq, at, at.i) * k_scale) * tile.factor
            s = by_kv_head(x.q, k.mT) * factor
            bias = x.bias if x.bias is None or x.bias.shape[3] == 1 else x.bias[..., keys]
            s, live = tile.logits(at, s, bias, x.slopes, live)
            new = torch.maximum(m, s.detach().amax(-1))
            p = torch.exp2((s - finite(new).unsqueeze(-1)) * LOG2E)
            p = p if live is None else torch.where(live, p, 0.0)
            shrink = torch.exp2((m - finite(new)) * LOG2E)
            total, m = total * shrink + p.sum(-1), new
            p = p if keep is None else torch.where(keep[..., keys], p, 0.0)
            if scale.shape[-1] > 1 and not _constant(self.v_descale, start, self.block_kv):
                p, scale = p * scale, scale.new_ones(())
            else:
                scale = scale[..., :1]
            share = by_kv_head(_round(p * weight_scale, self.dtype), v)
            acc = acc * shrink.unsqueeze(-1) + share * (scale / weight_scale)
        out, lse = finish((acc, total, m), x.sinks)
        return (out if keep is None else out / (1 - spec.dropout_p)), lse


def _of_all(scale: Tensor, seen: Tensor) -> Tensor:
    """The one scale of some keys, 0 where none of them is seen."""
    return torch.where(seen.any(-1, keepdim=True), scale[..., :1], 0.0)


def _constant(scale: Descale, start: int, count: int) -> bool:
    """Do the keys from `start` on share one scale?"""
    return start // scale.block == (start + count - 1) // scale.block
