"""The block-sparse kernels: the flash kernels' loops over lists of live blocks instead of ranges of keys.

One program owns a tile of one query head (or, for dk and dv, of one KV head and all the query heads that share it).
Full blocks skip the mask; partial blocks, and full ones that the last key or row cuts, read it. No atomics: gradients
repeat bit for bit. Block lists: attnreg.blocks.BlockLayout, in the manner of FlexAttention (Dong et al., 2024).
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .band import load_sequence, make_rows
from .flash_backward import load_low, load_lse, visit_keys, visit_rows
from .flash_bias import bias_tile
from .flash_forward import attend
from .tile import (
    kernel,
    key_pointers,
    load_head,
    load_matrix,
    low_of,
    low_word,
    normalise,
    row_pointers,
    start_sinks,
    store_matrix,
)


@triton.jit
def entries(blocks, batch, head, tile, limit, BLOCK: tl.constexpr):
    """Entries of one line: begin, end of the full ones that nothing cuts, end of all.

    `limit` is the last key or row that exists plus 1: a full block that reaches beyond it comes last of the full.
    """
    line = batch * blocks.batch_lines + head * blocks.head_lines + tile
    begin = tl.load(blocks.ptr + line)
    end = tl.load(blocks.ptr + line + 1)
    split = tl.load(blocks.split + line)
    last = tl.load(blocks.index + split - 1, mask=split > begin, other=-1)
    split = tl.where((split > begin) & ((last + 1) * BLOCK > limit), split - 1, split)
    return begin, split, end


@kernel
def block_forward_kernel(
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
    heads,
    tiles,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of BLOCK_M rows of one head. Grid: heads x tiles x batches; heads of a group run side by side."""
    program = tl.program_id(0)
    head = program % heads
    tile = tiles - 1 - program // heads % tiles
    batch = program // heads // tiles
    sequence = load_sequence(lengths, q_len, kv_len, bottom_right, batch)
    if tile * BLOCK_M >= sequence.q_len:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = make_rows(sequence, head, row, 1)
    valid = index.valid
    rows = make_rows(sequence, head, row[:, None], 1)
    q_tile, q_tail = load_head(row_pointers(q, sequence, index.query, index.head), valid, D, BLOCK_D, TAIL, True)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        maximum, total = start_sinks(sinks, index.head, valid, score)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    begin, split, end = entries(mask.blocks, batch, head, tile, sequence.kv_len, BLOCK_N)
    accumulator, maximum, total = attend(
        accumulator, maximum, total, q_tile, q_tail, k, v, sequence, head // GROUP, rows, mask, 0, score, dropout,
        pages, begin, split, False, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, FOLD, PRECISION,
    )  # fmt: skip
    accumulator, maximum, total = attend(
        accumulator, maximum, total, q_tile, q_tail, k, v, sequence, head // GROUP, rows, mask, 0, score, dropout,
        pages, split, end, True, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, FOLD, PRECISION,
    )  # fmt: skip
    accumulator, natural = normalise(accumulator, maximum, total, score, dropout)
    # The rows once more, as in the flash kernel: no addresses stay alive over the loops.
    row = tile * BLOCK_M + tl.minimum(sequence.q_len, 0) + tl.arange(0, BLOCK_M)
    index = make_rows(sequence, head, row, 1)
    valid = index.valid
    store_matrix(row_pointers(out, sequence, index.query, index.head), tl.arange(0, BLOCK_DV), accumulator, valid, DV)
    tl.store(row_pointers(lse, sequence, index.query, index.head), natural, mask=valid)
    if lse.low is not None:
        low = low_word(maximum, total, natural)
        tl.store(row_pointers(low_of(lse), sequence, index.query, index.head), low, mask=valid)


@kernel
def block_q_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    lengths,
    q_len,
    kv_len,
    bottom_right,
    mask,
    score,
    dropout,
    heads,
    tiles,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of BLOCK_M rows of one head. Grid: heads x tiles x batches."""
    program = tl.program_id(0)
    head = program % heads
    tile = tiles - 1 - program // heads % tiles
    batch = program // heads // tiles
    sequence = load_sequence(lengths, q_len, kv_len, bottom_right, batch)
    if tile * BLOCK_M >= sequence.q_len:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = make_rows(sequence, head, row, 1)
    valid = index.valid
    rows = make_rows(sequence, head, row[:, None], 1)
    q_tile, q_tail = load_head(row_pointers(q, sequence, index.query, index.head), valid, D, BLOCK_D, TAIL, True)
    do_rows = row_pointers(dout, sequence, index.query, index.head)
    do = load_matrix(do_rows, tl.arange(0, BLOCK_DV), valid, DV, BLOCK_DV, True)
    row_lse = load_lse(lse, sequence, index.query, index.head, valid, score)[:, None]
    row_low = None
    if lse.low is not None:
        row_low = load_low(lse, sequence, index.query, index.head, valid)
    row_delta = tl.load(row_pointers(delta, sequence, index.query, index.head), mask=valid, other=0.0)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_tail = acc
    if TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    begin, split, end = entries(mask.blocks, batch, head, tile, sequence.kv_len, BLOCK_N)
    acc, acc_tail = visit_keys(
        acc, acc_tail, q_tile, q_tail, do, k, v, row_lse, row_low, row_delta, sequence, head // GROUP, rows, mask, 0,
        score, dropout, begin, split, False, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, PRECISION,
    )  # fmt: skip
    acc, acc_tail = visit_keys(
        acc, acc_tail, q_tile, q_tail, do, k, v, row_lse, row_low, row_delta, sequence, head // GROUP, rows, mask, 0,
        score, dropout, split, end, True, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, PRECISION,
    )  # fmt: skip
    row = tile * BLOCK_M + tl.minimum(sequence.q_len, 0) + tl.arange(0, BLOCK_M)
    index = make_rows(sequence, head, row, 1)
    valid = index.valid
    pointers = row_pointers(dq, sequence, index.query, index.head)
    if TAIL > 0:
        store_matrix(pointers, tl.arange(0, BLOCK_D), acc * score.scale, valid, BLOCK_D)
        store_matrix(pointers + BLOCK_D, tl.arange(0, TAIL), acc_tail * score.scale, valid, D - BLOCK_D)
    else:
        store_matrix(pointers, tl.arange(0, BLOCK_D), acc * score.scale, valid, D)


@kernel
def block_kv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    lengths,
    q_len,
    kv_len,
    bottom_right,
    mask,
    score,
    dropout,
    num_kv_heads,
    tiles,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BLOCK_N keys, summed over the query heads of a group. Grid: KV heads x tiles x batches."""
    program = tl.program_id(0)
    kv_head = program % num_kv_heads
    tile = program // num_kv_heads % tiles
    batch = program // num_kv_heads // tiles
    limit = kv_len
    if lengths.cu_k is not None:
        limit = tl.load(lengths.cu_k + batch + 1).to(tl.int32) - tl.load(lengths.cu_k + batch).to(tl.int32)
    sequence = load_sequence(lengths, q_len, kv_len, bottom_right, batch)
    start = tile * BLOCK_N
    if start >= limit:
        return

    keys = start + tl.arange(0, BLOCK_N)
    inside = keys < sequence.kv_len
    k_tile, k_tail = load_head(key_pointers(k, sequence, kv_head, keys, start, None), inside, D, BLOCK_D, TAIL, True)
    v_pointers = key_pointers(v, sequence, kv_head, keys, start, None)
    v_tile = load_matrix(v_pointers, tl.arange(0, BLOCK_DV), inside, DV, BLOCK_DV, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_tail = dk_acc
    if TAIL > 0:
        dk_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        begin, split, end = entries(mask.blocks, batch, head, tile, sequence.q_len, BLOCK_M)
        if start + BLOCK_N > sequence.kv_len:
            split = begin
        dk_acc, dk_tail, dv_acc = visit_rows(
            dk_acc, dk_tail, dv_acc, k_tile, k_tail, v_tile, q, dout, lse, delta, sequence, head, keys[:, None],
            mask, 0, score, dropout, begin, split, False, 1, BLOCK_M, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV,
            PRECISION,
        )  # fmt: skip
        dk_acc, dk_tail, dv_acc = visit_rows(
            dk_acc, dk_tail, dv_acc, k_tile, k_tail, v_tile, q, dout, lse, delta, sequence, head, keys[:, None],
            mask, 0, score, dropout, split, end, True, 1, BLOCK_M, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV,
            PRECISION,
        )  # fmt: skip
    start = start + tl.minimum(limit, 0)
    keys = start + tl.arange(0, BLOCK_N)
    valid = keys < limit
    pointers = key_pointers(dk, sequence, kv_head, keys, start, None)
    if TAIL > 0:
        store_matrix(pointers, tl.arange(0, BLOCK_D), dk_acc * score.scale, valid, BLOCK_D)
        store_matrix(pointers + BLOCK_D, tl.arange(0, TAIL), dk_tail * score.scale, valid, D - BLOCK_D)
    else:
        store_matrix(pointers, tl.arange(0, BLOCK_D), dk_acc * score.scale, valid, D)
    pointers = key_pointers(dv, sequence, kv_head, keys, start, None)
    store_matrix(pointers, tl.arange(0, BLOCK_DV), dv_acc, valid, DV)


@kernel
def block_bias_kernel(
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
    mask,
    score,
    dropout,
    heads,
    tiles,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Live blocks of the gradient of the scores, [B, Hq, Sq, Skv] float32. Grid: heads x tiles x batches."""
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads % tiles
    batch = program // heads // tiles
    sequence = load_sequence(lengths, q_len, kv_len, bottom_right, batch)
    if tile * BLOCK_M >= sequence.q_len:
        return
    blocks = mask.blocks
    line = batch * blocks.batch_lines + head * blocks.head_lines + tile
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    base = dbias.data + batch.to(tl.int64) * dbias.batch + head.to(tl.int64) * dbias.head
    base += row.to(tl.int64) * dbias.row
    for step in range(tl.load(blocks.ptr + line), tl.load(blocks.ptr + line + 1)):
        start = tl.load(blocks.index + step) * BLOCK_N
        gradient = bias_tile(
            q, k, v, dout, lse, delta, sequence, head, tile * BLOCK_M, start, step, mask, score, dropout, GROUP,
            BLOCK_M, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, PRECISION,
        )  # fmt: skip
        keys = start + tl.arange(0, BLOCK_N)
        inside = (row[:, None] < sequence.q_len) & (keys[None, :] < sequence.kv_len)
        tl.store(base[:, None] + keys[None, :], gradient, mask=inside)
