"""The flash forward kernel: one tile of packed query rows against the keys its mask can reach, or a split of them.

Query heads that share a KV head are packed as rows, so each K and V tile is read once per KV head. With SPLITS the
keys are cut into `splits` equal runs and each program writes a normalised partial result; `flash_merge` joins them.
Algorithm: FlashAttention-2 (Dao, 2023); splits: Flash-Decoding (Dao et al., 2023).
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .band import allow, find_tile, key_range, load_sequence, make_rows, prefix_length, tile_start
from .fp8_tile import add_stored_values, stored_products
from .tile import (
    finish_scores,
    head_products,
    keep_mask,
    kernel,
    key_pointers,
    load_head,
    load_matrix,
    low_of,
    low_word,
    multiply,
    narrow,
    normalise,
    row_pointers,
    softmax_step,
    start_sinks,
    store_matrix,
)


@triton.jit
def attend(
    accumulator,
    maximum,
    total,
    q,
    q_tail,
    k,
    v,
    sequence,
    kv_head,
    rows,
    mask,
    prefix,
    score,
    dropout,
    pages,
    begin,
    end,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys begin..end, in tiles of BLOCK_N, or entries begin..end of a list of blocks into the softmax state."""
    STEP: tl.constexpr = BLOCK_N if mask.blocks is None else 1
    for step in range(begin, end, STEP):
        start = tile_start(mask, step, BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < sequence.kv_len
        k_tile, k_tail = load_head(
            key_pointers(k, sequence, kv_head, keys, start, pages), inside, D, BLOCK_D, TAIL, MASKED
        )
        if score.stored is not None:
            products = stored_products(
                q, q_tail, k_tile, k_tail, score.descales, sequence, kv_head, rows, keys, TAIL, PRECISION
            )
        else:
            products = head_products(q, q_tail, k_tile, k_tail, TAIL, PRECISION)
        scores, _ = finish_scores(products, score, sequence, rows, keys[None, :], FOLD)
        if MASKED:
            scores = tl.where(allow(mask, sequence, rows, keys[None, :], prefix, step, BLOCK_N), scores, float("-inf"))
        weights, decay, maximum, total = softmax_step(scores, maximum, total, score, FOLD)
        if dropout is not None:
            weights = tl.where(keep_mask(dropout, sequence, rows, keys[None, :]), weights, 0.0)
        pointers = key_pointers(v, sequence, kv_head, keys, start, pages)
        accumulator = accumulator * decay[:, None]
        if score.stored is not None:
            accumulator = add_stored_values(
                accumulator, weights, pointers, score.descales, sequence, kv_head, keys, start, inside, q.dtype, DV,
                BLOCK_DV, PRECISION,
            )  # fmt: skip
        else:
            v_tile = load_matrix(pointers, tl.arange(0, BLOCK_DV), inside, DV, BLOCK_DV, MASKED)
            accumulator = multiply(narrow(weights, v_tile.dtype), v_tile, accumulator, PRECISION)
    return accumulator, maximum, total


@triton.jit
def split_range(begin, full_begin, full_end, end, split, splits, BLOCK: tl.constexpr):
    """The part of a visit that belongs to split `split` of `splits`: whole tiles, as equal as can be."""
    tiles = (tl.maximum(end - begin, 0) + BLOCK - 1) // BLOCK
    size = (tiles + splits - 1) // splits * BLOCK
    first = begin + split * size
    last = tl.minimum(end, first + size)
    full_begin = tl.maximum(first, tl.minimum(full_begin, last // BLOCK * BLOCK))
    full_end = tl.maximum(full_begin, tl.minimum(full_end, last // BLOCK * BLOCK))
    return first, full_begin, full_end, last


@kernel
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    lengths,
    q_len,
    kv_len,
    bottom_right,
    pages,
    mask,
    score,
    dropout,
    sinks,
    batches,
    num_kv_heads,
    tiles,
    splits,
    partial_rows,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of BLOCK_M packed rows. Grid: tiles x splits x KV heads (x batches where sequences are dense)."""
    program = tl.program_id(0)
    # Later tiles have more keys under a causal mask: start them first, so that the last wave is short.
    tile = tiles - 1 - program % tiles
    program = program // tiles
    split = 0
    if SPLITS:
        split = program % splits
        program = program // splits
    kv_head = program % num_kv_heads
    if lengths.cu_q is not None:
        batch, tile = find_tile(lengths.cu_q, tile, batches, GROUP, BLOCK_M)
    else:
        batch = program // num_kv_heads
    sequence = load_sequence(lengths, q_len, kv_len, bottom_right, batch)
    if tile * BLOCK_M >= sequence.q_len * GROUP:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_index = make_rows(sequence, kv_head, row, GROUP)
    valid = row_index.valid
    rows = make_rows(sequence, kv_head, row[:, None], GROUP)
    q_tile, q_tail = load_head(
        row_pointers(q, sequence, row_index.query, row_index.head), valid, D, BLOCK_D, TAIL, True
    )

    first = tile * BLOCK_M // GROUP + sequence.offset
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, sequence.q_len - 1) + sequence.offset
    prefix = prefix_length(mask, sequence)
    begin, full_begin, full_end, end = key_range(mask, sequence, row_index.position, first, last, prefix, BLOCK_N)
    if SPLITS:
        begin, full_begin, full_end, end = split_range(begin, full_begin, full_end, end, split, splits, BLOCK_N)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # noqa: SIM102  # one condition is known to the compiler, the other at run time
        if split == 0:
            maximum, total = start_sinks(sinks, row_index.head, valid, score)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if (mask.left is not None) and (mask.document_first is None):
        accumulator, maximum, total = attend(
            accumulator, maximum, total, q_tile, q_tail, k, v, sequence, kv_head, rows, mask, prefix, score, dropout,
            pages, begin, full_begin, True, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, FOLD, PRECISION,
        )  # fmt: skip
    if mask.document_first is None:
        accumulator, maximum, total = attend(
            accumulator, maximum, total, q_tile, q_tail, k, v, sequence, kv_head, rows, mask, prefix, score, dropout,
            pages, full_begin, full_end, False, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, FOLD, PRECISION,
        )  # fmt: skip
    accumulator, maximum, total = attend(
        accumulator, maximum, total, q_tile, q_tail, k, v, sequence, kv_head, rows, mask, prefix, score, dropout,
        pages, full_end, end, True, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, FOLD, PRECISION,
    )  # fmt: skip

    accumulator, natural = normalise(accumulator, maximum, total, score, dropout)
    # The rows once more: written so that the compiler computes them here and keeps no addresses alive over the loops.
    row = tile * BLOCK_M + tl.minimum(sequence.q_len, 0) + tl.arange(0, BLOCK_M)
    row_index = make_rows(sequence, kv_head, row, GROUP)
    valid = row_index.valid
    out_pointers = row_pointers(out, sequence, row_index.query, row_index.head)
    lse_pointers = row_pointers(lse, sequence, row_index.query, row_index.head)
    if SPLITS:
        # Partial results stand one split after another: `partial_rows` rows of DV columns each.
        out_pointers += split.to(tl.int64) * partial_rows * DV
        lse_pointers += split.to(tl.int64) * partial_rows
    store_matrix(out_pointers, tl.arange(0, BLOCK_DV), accumulator, valid, DV)
    tl.store(lse_pointers, natural, mask=valid)
    if lse.low is not None:
        low_pointers = row_pointers(low_of(lse), sequence, row_index.query, row_index.head)
        if SPLITS:
            low_pointers += split.to(tl.int64) * partial_rows
        tl.store(low_pointers, low_word(maximum, total, natural), mask=valid)
