"""Join the partial results of a split forward: `out = sum_s exp(lse_s - lse) out_s`, always in the same order."""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton.language as tl

from .tile import LN2, LOG2E, kernel, narrow


@kernel
def merge_kernel(
    partial,
    partial_lse,
    partial_low,
    out,
    lse,
    heads,
    q_len,
    rows,
    splits,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One output row [DV] a program; `partial` is [splits, rows, DV] and `partial_lse` [splits, rows], float32.

    With `partial_low`, what the rounding of partial_lse left, lse's are counted from their maximum before they become
    powers of 2, as `Score.natural` has it.
    """
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK_SPLITS)
    parts = tl.load(partial_lse + index.to(tl.int64) * rows + row, mask=index < splits, other=float("-inf"))
    if partial_low is None:
        parts = parts * LOG2E
    maximum = tl.max(parts, 0)
    safe = tl.where(maximum == float("-inf"), 0.0, maximum)
    if partial_low is not None:
        rests = tl.load(partial_low + index.to(tl.int64) * rows + row, mask=index < splits, other=0.0)
        total = tl.sum(tl.exp2((parts - safe + rests) * LOG2E), 0)
    else:
        total = tl.sum(tl.exp2(parts - safe), 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    columns = tl.arange(0, BLOCK_DV)
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    at = row.to(tl.int64)
    for _ in range(splits):
        if partial_low is not None:
            weight = tl.exp2((tl.load(partial_lse + at) - safe + tl.load(partial_low + at)) * LOG2E) / divisor
        else:
            weight = tl.exp2(tl.load(partial_lse + at) * LOG2E - safe) / divisor
        accumulator += weight * tl.load(partial + at * DV + columns, mask=columns < DV, other=0.0)
        at += rows
    query = row % q_len
    head = row // q_len % heads
    batch = (row // q_len // heads).to(tl.int64)
    base = out.data + batch * out.batch + head.to(tl.int64) * out.head + query.to(tl.int64) * out.row
    tl.store(base + columns, narrow(accumulator, out.data.dtype.element_ty), mask=columns < DV)
    logarithm = tl.log2(divisor)
    natural = safe + logarithm * LN2 if partial_low is not None else (safe + logarithm) * LN2
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), natural))
