"""The tile step over stored 8-bit values: products of what they stand for, in 8 bits or widened to q's dtype.

Numerics, step by step: attnreg_eager.fp8, whose steps 5, 7 and 8 these are.
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .tile import head_products, load_matrix, narrow, product


@triton.jit
def key_scale(descale, sequence, kv_head, keys):
    """Factors of k or v for key indices."""
    line = descale.data + sequence.batch * descale.batch + kv_head * descale.head
    return tl.load(line + keys // descale.block, mask=keys < sequence.kv_len, other=0.0)


@triton.jit
def row_scale(descale, sequence, rows):
    """Factors of q for query rows."""
    line = descale.data + sequence.batch * descale.batch + rows.head * descale.head
    return tl.load(line + rows.query // descale.block, mask=rows.valid, other=0.0)


@triton.jit
def stored_products(
    q, q_tail, k, k_tail, descales, sequence, kv_head, rows, keys, TAIL: tl.constexpr, PRECISION: tl.constexpr
):
    """q.k of what the stored values stand for, before the score's scale."""
    products = head_products(q, q_tail, k.to(q.dtype), k_tail.to(q.dtype), TAIL, PRECISION)
    factor = key_scale(descales.k, sequence, kv_head, keys)[None, :]
    if descales.q is not None:
        factor = row_scale(descales.q, sequence, rows) * factor
    return products * factor


@triton.jit
def add_stored_values(
    accumulator,
    weights,
    pointers,
    descales,
    sequence,
    kv_head,
    keys,
    start,
    inside,
    dtype: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`accumulator + weights @ v` of what v's stored values stand for."""
    columns = tl.arange(0, BLOCK_DV)
    if descales.columns is not None:
        # Keys lie next to each other: the only order in which Hopper multiplies 8-bit values.
        tile = pointers[None, :] + columns[:, None] * descales.columns
        v = tl.trans(tl.load(tile, mask=inside[None, :] & (columns[:, None] < DV), other=0.0))
    else:
        v = load_matrix(pointers, columns, inside, DV, BLOCK_DV, True)
    if descales.eight is not None:
        share = product(narrow(weights * descales.weights, v.dtype), v, PRECISION)
        factor = key_scale(descales.v, sequence, kv_head, start)
        accumulator += share * (factor / descales.weights)
    else:
        # Descales are small, and weights times them would be denormal in float16: round relative to the largest one.
        factor = key_scale(descales.v, sequence, kv_head, keys)
        largest = tl.max(tl.abs(factor), 0)
        largest = tl.where(largest == 0.0, 1.0, largest)
        share = product(narrow(weights * (factor / largest)[None, :], dtype), v.to(dtype), PRECISION)
        accumulator += share * largest
    return accumulator
