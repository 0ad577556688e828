"""The flash backward kernels: delta, dq and dk/dv, without atomics, so that gradients repeat bit for bit.

Weights are recomputed from lse. dq visits keys for a tile of packed query rows; dk and dv visit the query rows of each
head of a group for a tile of keys, and so sum over them. Algorithm: FlashAttention-2 (Dao, 2023), with
`ds = w * (dp - delta)` and `delta = rowsum(o * do) - dlse`, which carries the gradient of lse too.
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .band import allow, find_tile, key_range, load_sequence, make_rows, prefix_length, query_range, tile_start
from .tile import (
    LOG2E,
    finish_scores,
    head_pointers,
    head_products,
    keep_mask,
    kernel,
    key_pointers,
    load_head,
    load_matrix,
    low_of,
    multiply,
    narrow,
    product,
    row_pointers,
    score_gradient,
    store_matrix,
)


@kernel
def delta_kernel(out, dout, dlse, delta, heads, q_len, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr):
    """`delta = rowsum(out * dout) - dlse` of BLOCK_M rows of one head. Grid: row tiles x (batch x heads)."""
    tiles = (q_len + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    query = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    valid = query < q_len
    columns = tl.arange(0, BLOCK_DV)
    query = query.to(tl.int64)
    out_rows = out.data + batch * out.batch + head * out.head + query * out.row
    dout_rows = dout.data + batch * dout.batch + head * dout.head + query * dout.row
    o = load_matrix(out_rows, columns, valid, DV, BLOCK_DV, True).to(tl.float32)
    do = load_matrix(dout_rows, columns, valid, DV, BLOCK_DV, True).to(tl.float32)
    value = tl.sum(o * do, 1)
    if dlse is not None:
        value -= tl.load(dlse.data + batch * dlse.batch + head * dlse.head + query * dlse.row, mask=valid, other=0.0)
    tl.store(delta.data + batch * delta.batch + head * delta.head + query * delta.row, value, mask=valid)


@triton.jit
def load_lse(lse, sequence, query, head, valid, score):
    """lse of the rows in the scores' units."""
    return in_units(tl.load(row_pointers(lse, sequence, query, head), mask=valid, other=float("-inf")), score)


@triton.jit
def load_low(lse, sequence, query, head, valid):
    """What the rounding of the rows' lse left, [M, 1]; not to be called where that is not kept."""
    return tl.load(row_pointers(low_of(lse), sequence, query, head), mask=valid, other=0.0)[:, None]


@triton.jit
def in_units(value, score):
    """A natural lse in the scores' units; +inf for an empty row, whose weights are then exp2(-inf) = 0."""
    if score.natural is not None:
        return tl.where(value == float("-inf"), float("inf"), value)
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def visit_keys(
    dq,
    dq_tail,
    q,
    q_tail,
    do,
    k,
    v,
    lse,
    low,
    delta,
    sequence,
    kv_head,
    rows,
    mask,
    prefix,
    score,
    dropout,
    begin,
    end,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add `ds @ k` of keys begin..end, or of entries begin..end of a list of blocks, to dq."""
    STEP: tl.constexpr = BLOCK_N if mask.blocks is None else 1
    for step in range(begin, end, STEP):
        start = tile_start(mask, step, BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < sequence.kv_len
        k_tile, k_tail = load_head(
            key_pointers(k, sequence, kv_head, keys, start, None), inside, D, BLOCK_D, TAIL, MASKED
        )
        v_pointers = key_pointers(v, sequence, kv_head, keys, start, None)
        v_tile = load_matrix(v_pointers, tl.arange(0, BLOCK_DV), inside, DV, BLOCK_DV, MASKED)
        scores, capped = finish_scores(
            head_products(q, q_tail, k_tile, k_tail, TAIL, PRECISION), score, sequence, rows, keys[None, :], False
        )
        dp = product(do, tl.trans(v_tile), PRECISION)
        allowed = None
        if MASKED:
            allowed = allow(mask, sequence, rows, keys[None, :], prefix, step, BLOCK_N)
        keep = None
        if dropout is not None:
            keep = keep_mask(dropout, sequence, rows, keys[None, :])
        _, ds, _ = score_gradient(scores, capped, dp, lse, low, delta, allowed, keep, score, dropout)
        ds = narrow(ds, k_tile.dtype)
        dq = multiply(ds, k_tile, dq, PRECISION)
        if TAIL > 0:
            dq_tail = multiply(ds, k_tail, dq_tail, PRECISION)
    if TAIL == 0:
        dq_tail = dq  # nobody reads it: a kernel function cannot return None
    return dq, dq_tail


@kernel
def backward_q_kernel(
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
    pages,
    mask,
    score,
    dropout,
    batches,
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
    """dq of BLOCK_M packed rows. Grid: tiles x KV heads (x batches where sequences are dense)."""
    tl.static_assert(pages is None, "a paged cache has no gradient")
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    program = program // tiles
    kv_head = program % num_kv_heads
    if lengths.cu_q is not None:
        batch, tile = find_tile(lengths.cu_q, tile, batches, GROUP, BLOCK_M)
    else:
        batch = program // num_kv_heads
    sequence = load_sequence(lengths, q_len, kv_len, bottom_right, batch)
    if tile * BLOCK_M >= sequence.q_len * GROUP:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = make_rows(sequence, kv_head, row, GROUP)
    valid = index.valid
    rows = make_rows(sequence, kv_head, row[:, None], GROUP)
    q_tile, q_tail = load_head(row_pointers(q, sequence, index.query, index.head), valid, D, BLOCK_D, TAIL, True)
    do_rows = row_pointers(dout, sequence, index.query, index.head)
    do = load_matrix(do_rows, tl.arange(0, BLOCK_DV), valid, DV, BLOCK_DV, True)
    row_lse = load_lse(lse, sequence, index.query, index.head, valid, score)[:, None]
    row_low = None
    if lse.low is not None:
        row_low = load_low(lse, sequence, index.query, index.head, valid)
    row_delta = tl.load(row_pointers(delta, sequence, index.query, index.head), mask=valid, other=0.0)[:, None]

    first = tile * BLOCK_M // GROUP + sequence.offset
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, sequence.q_len - 1) + sequence.offset
    prefix = prefix_length(mask, sequence)
    begin, full_begin, full_end, end = key_range(mask, sequence, index.position, first, last, prefix, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_tail = acc
    if TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    if (mask.left is not None) and (mask.document_first is None):
        acc, acc_tail = visit_keys(
            acc, acc_tail, q_tile, q_tail, do, k, v, row_lse, row_low, row_delta, sequence, kv_head, rows, mask, prefix,
            score, dropout, begin, full_begin, True, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, PRECISION,
        )  # fmt: skip
    if mask.document_first is None:
        acc, acc_tail = visit_keys(
            acc, acc_tail, q_tile, q_tail, do, k, v, row_lse, row_low, row_delta, sequence, kv_head, rows, mask, prefix,
            score, dropout, full_begin, full_end, False, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, PRECISION,
        )  # fmt: skip
    acc, acc_tail = visit_keys(
        acc, acc_tail, q_tile, q_tail, do, k, v, row_lse, row_low, row_delta, sequence, kv_head, rows, mask, prefix,
        score, dropout, full_end, end, True, BLOCK_N, D, BLOCK_D, TAIL, DV, BLOCK_DV, PRECISION,
    )  # fmt: skip
    # The rows once more, as in the forward kernel: no addresses stay alive over the loops.
    row = tile * BLOCK_M + tl.minimum(sequence.q_len, 0) + tl.arange(0, BLOCK_M)
    index = make_rows(sequence, kv_head, row, GROUP)
    valid = index.valid
    pointers = row_pointers(dq, sequence, index.query, index.head)
    if TAIL > 0:
        store_matrix(pointers, tl.arange(0, BLOCK_D), acc * score.scale, valid, BLOCK_D)
        store_matrix(pointers + BLOCK_D, tl.arange(0, TAIL), acc_tail * score.scale, valid, D - BLOCK_D)
    else:
        store_matrix(pointers, tl.arange(0, BLOCK_D), acc * score.scale, valid, D)


@triton.jit
def visit_rows(
    dk,
    dk_tail,
    dv,
    k,
    k_tail,
    v,
    q,
    dout,
    lse,
    delta,
    sequence,
    kv_head,
    keys,
    mask,
    prefix,
    score,
    dropout,
    begin,
    end,
    MASKED: tl.constexpr,
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
    """Add `ds^T @ q` and `w^T @ do` of rows begin..end of each head of a group to dk and dv; keys are rows of the tile
    here. With a list of blocks, begin..end are its entries, GROUP is 1 and `kv_head` the query head.

    Head by head in one loop: the rows of a head lie a stride apart, so that their addresses cost little, and a loop
    over heads around one over rows would keep more alive than there are registers.
    """
    STEP: tl.constexpr = BLOCK_M if mask.blocks is None else 1
    count = tl.maximum(end - begin + STEP - 1, 0) // STEP
    per_head = tl.maximum(count, 1)  # a pipeline loads ahead, and must not divide by 0 where there is nothing to visit
    for index in range(count * GROUP):
        head, step = kv_head, begin + index * STEP
        if GROUP > 1:
            head, step = kv_head * GROUP + index // per_head, begin + index % per_head * STEP
        start = tile_start(mask, step, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        rows = make_rows(sequence, head, row[None, :], 1)
        valid = row < sequence.q_len
        q_tile, q_tail = load_head(head_pointers(q, sequence, head, row, start), valid, D, BLOCK_D, TAIL, MASKED)
        do_rows = head_pointers(dout, sequence, head, row, start)
        do = load_matrix(do_rows, tl.arange(0, BLOCK_DV), valid, DV, BLOCK_DV, MASKED)
        row_lse = tl.load(head_pointers(lse, sequence, head, row, start), mask=valid, other=float("-inf"))
        row_lse = in_units(row_lse, score)
        row_low = None
        if lse.low is not None:
            row_low = tl.load(head_pointers(low_of(lse), sequence, head, row, start), mask=valid, other=0.0)[None, :]
        row_delta = tl.load(head_pointers(delta, sequence, head, row, start), mask=valid, other=0.0)
        products = head_products(k, k_tail, q_tile, q_tail, TAIL, PRECISION)
        scores, capped = finish_scores(products, score, sequence, rows, keys, False)
        dp = product(v, tl.trans(do), PRECISION)
        allowed = None
        if MASKED:
            allowed = allow(mask, sequence, rows, keys, prefix, step, BLOCK_N)
        keep = None
        if dropout is not None:
            keep = keep_mask(dropout, sequence, rows, keys)
        weights, ds, _ = score_gradient(
            scores, capped, dp, row_lse[None, :], row_low, row_delta[None, :], allowed, keep, score, dropout
        )
        dv = multiply(narrow(weights, do.dtype), do, dv, PRECISION)
        ds = narrow(ds, q_tile.dtype)
        dk = multiply(ds, q_tile, dk, PRECISION)
        if TAIL > 0:
            dk_tail = multiply(ds, q_tail, dk_tail, PRECISION)
    if TAIL == 0:
        dk_tail = dk  # as above
    return dk, dk_tail, dv


@kernel
def backward_kv_kernel(
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
    pages,
    mask,
    score,
    dropout,
    batches,
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
    """dk and dv of BLOCK_N keys. Grid: tiles x KV heads (x batches where sequences are dense)."""
    tl.static_assert(pages is None, "a paged cache has no gradient")
    program = tl.program_id(0)
    tile = program % tiles
    program = program // tiles
    kv_head = program % num_kv_heads
    limit = kv_len
    if lengths.cu_k is not None:
        batch, tile = find_tile(lengths.cu_k, tile, batches, 1, BLOCK_N)
        limit = tl.load(lengths.cu_k + batch + 1).to(tl.int32) - tl.load(lengths.cu_k + batch).to(tl.int32)
    else:
        batch = program // num_kv_heads
    sequence = load_sequence(lengths, q_len, kv_len, bottom_right, batch)
    start = tile * BLOCK_N
    if start >= limit:
        return

    keys = start + tl.arange(0, BLOCK_N)
    inside = keys < sequence.kv_len
    k_tile, k_tail = load_head(key_pointers(k, sequence, kv_head, keys, start, None), inside, D, BLOCK_D, TAIL, True)
    v_pointers = key_pointers(v, sequence, kv_head, keys, start, None)
    v_tile = load_matrix(v_pointers, tl.arange(0, BLOCK_DV), inside, DV, BLOCK_DV, True)
    prefix = prefix_length(mask, sequence)
    begin, full_begin, full_end, end = query_range(mask, sequence, keys, start, start + BLOCK_N - 1, prefix, BLOCK_M)
    if start >= sequence.kv_len:
        end = begin
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_tail = dk_acc
    if TAIL > 0:
        dk_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if (mask.right is not None) and (mask.document_first is None):
        dk_acc, dk_tail, dv_acc = visit_rows(
            dk_acc, dk_tail, dv_acc, k_tile, k_tail, v_tile, q, dout, lse, delta, sequence, kv_head, keys[:, None],
            mask, prefix, score, dropout, begin, full_begin, True, GROUP, BLOCK_M, BLOCK_N, D, BLOCK_D,
            TAIL, DV, BLOCK_DV, PRECISION,
        )  # fmt: skip
    if mask.document_first is None:
        dk_acc, dk_tail, dv_acc = visit_rows(
            dk_acc, dk_tail, dv_acc, k_tile, k_tail, v_tile, q, dout, lse, delta, sequence, kv_head, keys[:, None],
            mask, prefix, score, dropout, full_begin, full_end, False, GROUP, BLOCK_M, BLOCK_N, D, BLOCK_D,
            TAIL, DV, BLOCK_DV, PRECISION,
        )  # fmt: skip
    dk_acc, dk_tail, dv_acc = visit_rows(
        dk_acc, dk_tail, dv_acc, k_tile, k_tail, v_tile, q, dout, lse, delta, sequence, kv_head, keys[:, None],
        mask, prefix, score, dropout, full_end, end, True, GROUP, BLOCK_M, BLOCK_N, D, BLOCK_D,
        TAIL, DV, BLOCK_DV, PRECISION,
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
