"""Quantisation kernels: the largest magnitudes of blocks of rows, and rows rounded to 8 bits, optionally rotated.

Steps 1 to 4 of attnreg_eager.fp8, bit for bit: the rotation is the same butterflies in the same order.
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .tile import narrow


@triton.jit
def load_rows(x, used, batch, head, row, count, norm, D: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr):
    """Rows as float32 [N, WIDTH]; a row that is not `used` is 0. Rotated where ROTATE: `norm` is WIDTH ** -0.5."""
    columns = tl.arange(0, WIDTH)
    valid = row < count
    if used is not None:
        valid = valid & (tl.load(used + batch.to(tl.int64) * count + row, mask=valid, other=0) != 0)
    base = x.data + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head
    pointers = base + row.to(tl.int64)[:, None] * x.row + columns[None, :]
    value = tl.load(pointers, mask=valid[:, None] & (columns[None, :] < D), other=0.0).to(tl.float32)
    if ROTATE:
        value = rotate(tl.where(flips(columns)[None, :], -value, value), WIDTH) * norm
    return value


@triton.jit
def flips(columns):
    """True where the rotation turns a column's sign: one bit of a hash of its index."""
    mixed = (columns + 1).to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    return ((mixed ^ (mixed >> 13)) & 1) != 0


@triton.jit
def rotate(value, WIDTH: tl.constexpr):
    """Walsh-Hadamard butterflies (a + b, a - b) at strides 1, 2, 4, ... along the rows of [N, WIDTH]."""
    ROWS: tl.constexpr = value.shape[0]
    STEPS: tl.constexpr = tl.constexpr((WIDTH - 1).bit_length())
    for step in tl.static_range(STEPS):
        value = tl.reshape(value, [ROWS, WIDTH // (2 << step), 2, 1 << step])
        a, b = tl.split(tl.permute(value, (0, 1, 3, 2)))
        value = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [ROWS, WIDTH])
    return value


@triton.jit
def amax_kernel(
    x,
    used,
    amax,
    heads,
    count,
    blocks,
    norm,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Largest magnitude of BLOCK rows, or NaN, to amax [B, H, blocks] float32. Grid: blocks x heads x batches."""
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks % heads
    batch = program // blocks // heads
    row = block * BLOCK + tl.arange(0, BLOCK)
    value = load_rows(x, used, batch, head, row, count, norm, D, WIDTH, ROTATE)
    # As integers magnitudes have the same order, with NaN above all: a maximum of floats would pass it over.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.store(amax + program, tl.max(tl.max(bits, 1), 0).to(tl.float32, bitcast=True))


@triton.jit
def quantise_kernel(
    x,
    used,
    inverse,
    out,
    column_stride,
    heads,
    count,
    blocks,
    norm,
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """`round(clamp(x * inverse))` of BLOCK rows, to `out` with any column stride. Grid: blocks x heads x batches."""
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks % heads
    batch = program // blocks // heads
    row = block * BLOCK + tl.arange(0, BLOCK)
    value = load_rows(x, used, batch, head, row, count, norm, D, WIDTH, ROTATE)
    line = inverse.data + batch * inverse.batch + head * inverse.head
    value = value * tl.load(line + row // inverse.block, mask=row < count, other=1.0)[:, None]
    value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    columns = tl.arange(0, WIDTH)
    base = out.data + batch.to(tl.int64) * out.batch + head.to(tl.int64) * out.head
    pointers = base + row.to(tl.int64)[:, None] * out.row + columns[None, :].to(tl.int64) * column_stride
    tl.store(pointers, narrow(value, out.data.dtype.element_ty), mask=(row < count)[:, None])
