"""The gradient of the bias: one program owns a tile of the bias and sums over whatever the bias broadcasts over.

No atomics and no [B, Hq, Sq, Skv] buffer: a tile of a [1, Hq, Sq, Skv] bias visits every batch, a [1, 1, 1, Skv] bias
every query of every head of every batch, always in the same order.
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .band import allow, key_range, load_sequence, make_rows, prefix_length
from .flash_backward import load_low, load_lse
from .tile import (
    finish_scores,
    head_products,
    keep_mask,
    kernel,
    key_pointers,
    load_head,
    load_matrix,
    narrow,
    product,
    row_pointers,
    score_gradient,
)


@triton.jit
def bias_tile(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    sequence,
    head,
    start_m,
    start_n,
    step,
    mask,
    score,
    dropout,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the scores of one head's tile, [BLOCK_M, BLOCK_N] float32; zero where masked.

    `step` is the entry of a list of blocks, where there is one.
    """
    row = start_m + tl.arange(0, BLOCK_M)
    index = make_rows(sequence, head, row, 1)
    rows = make_rows(sequence, head, row[:, None], 1)
    keys = start_n + tl.arange(0, BLOCK_N)
    inside = keys < sequence.kv_len
    kv_head = head // GROUP
    q_tile, q_tail = load_head(row_pointers(q, sequence, index.query, index.head), index.valid, D, BLOCK_D, TAIL, True)
    k_tile, k_tail = load_head(key_pointers(k, sequence, kv_head, keys, start_n, None), inside, D, BLOCK_D, TAIL, True)
    v_pointers = key_pointers(v, sequence, kv_head, keys, start_n, None)
    v_tile = load_matrix(v_pointers, tl.arange(0, BLOCK_DV), inside, DV, BLOCK_DV, True)
    do_rows = row_pointers(dout, sequence, index.query, index.head)
    do = load_matrix(do_rows, tl.arange(0, BLOCK_DV), index.valid, DV, BLOCK_DV, True)
    row_lse = load_lse(lse, sequence, index.query, index.head, index.valid, score)[:, None]
    row_low = None
    if lse.low is not None:
        row_low = load_low(lse, sequence, index.query, index.head, index.valid)
    row_delta = tl.load(row_pointers(delta, sequence, index.query, index.head), mask=index.valid, other=0.0)[:, None]
    products = head_products(q_tile, q_tail, k_tile, k_tail, TAIL, PRECISION)
    scores, capped = finish_scores(products, score, sequence, rows, keys[None, :], False)
    dp = product(do, tl.trans(v_tile), PRECISION)
    allowed = allow(mask, sequence, rows, keys[None, :], prefix_length(mask, sequence), step, BLOCK_N)
    keep = None
    if dropout is not None:
        keep = keep_mask(dropout, sequence, rows, keys[None, :])
    _, _, gradient = score_gradient(scores, capped, dp, row_lse, row_low, row_delta, allowed, keep, score, dropout)
    return gradient


@kernel
def bias_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dbias,
    lengths,
    q_len,
    kv_len,
    bottom_right,
    pages,
    mask,
    score,
    dropout,
    bias_heads,
    q_tiles,
    k_tiles,
    bias_rows,
    bias_keys,
    sum_batches,
    sum_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dbias. Grid: key tiles x query tiles x bias heads x bias batches; a summed axis has one tile."""
    tl.static_assert(pages is None, "a paged cache has no gradient")
    program = tl.program_id(0)
    tile_n = program % k_tiles
    program = program // k_tiles
    tile_m = program % q_tiles
    program = program // q_tiles
    bias_head = program % bias_heads
    bias_batch = program // bias_heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(bias_batch, bias_batch + sum_batches):
        sequence = load_sequence(lengths, q_len, kv_len, bottom_right, bias_batch * 0 + batch)
        last_m = (tile_m + 1) * BLOCK_M
        last_n = (tile_n + 1) * BLOCK_N
        if SUM_ROWS:
            last_m = sequence.q_len
        if SUM_KEYS:
            last_n = sequence.kv_len
        for head in range(bias_head, bias_head + sum_heads):
            for start_m in range(tile_m * BLOCK_M, last_m, BLOCK_M):
                position = start_m + tl.arange(0, BLOCK_M) + sequence.offset
                first = start_m + sequence.offset
                last = tl.minimum(start_m + BLOCK_M, sequence.q_len) - 1 + sequence.offset
                prefix = prefix_length(mask, sequence)
                begin, _, _, end = key_range(mask, sequence, position, first, last, prefix, BLOCK_N)
                first_n = tl.maximum(tile_n * BLOCK_N, begin)
                for start_n in range(first_n, tl.minimum(last_n, end), BLOCK_N):
                    total += bias_tile(
                        q, k, v, dout, lse, delta, sequence, bias_head * 0 + head, start_m, start_n, start_n, mask,
                        score, dropout, GROUP, BLOCK_M, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, PRECISION,
                    )  # fmt: skip
    base = dbias.data + bias_batch.to(tl.int64) * dbias.batch + bias_head.to(tl.int64) * dbias.head
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    keys = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = dbias.data.dtype.element_ty
    if SUM_ROWS and SUM_KEYS:
        tl.store(base, narrow(tl.sum(tl.sum(total, 1), 0), dtype))
    elif SUM_ROWS:
        tl.store(base + keys * dbias.column, narrow(tl.sum(total, 0), dtype), mask=keys < bias_keys)
    elif SUM_KEYS:
        tl.store(base + rows * dbias.row, narrow(tl.sum(total, 1), dtype), mask=rows < bias_rows)
    else:
        pointers = base + rows[:, None] * dbias.row + keys[None, :] * dbias.column
        tl.store(pointers, narrow(total, dtype), mask=(rows[:, None] < bias_rows) & (keys[None, :] < bias_keys))
