"""Which keys a tile of queries may see, and which tiles to visit: band masks inside a kernel.

A sequence is found from a program's index without any host knowledge of the lengths: with packed sequences, tile t
of a grid of `total // block + sequences` tiles belongs to the last sequence i with `start_i // block + i <= t`.
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Rows, Sequence
from .plan import FAR_POSITION

FAR = tl.constexpr(FAR_POSITION)


@triton.jit
def load_sequence(lengths, q_len, kv_len, bottom_right, batch):
    """Sizes and positions of sequence `batch`; `q_len`, `kv_len`: of dense sequences."""
    q_start = 0
    if lengths.cu_q is not None:
        q_start = tl.load(lengths.cu_q + batch).to(tl.int32)
        q_len = tl.load(lengths.cu_q + batch + 1).to(tl.int32) - q_start
    kv_start = 0
    if lengths.cu_k is not None:
        kv_start = tl.load(lengths.cu_k + batch).to(tl.int32)
        kv_len = tl.load(lengths.cu_k + batch + 1).to(tl.int32) - kv_start
    if lengths.kv_lengths is not None:
        kv_len = tl.minimum(kv_len, tl.load(lengths.kv_lengths + batch).to(tl.int32))
    if lengths.query_offset is not None:
        # Keys and windows end at FAR / 2, so a farther offset means the same.
        offset = tl.minimum(tl.maximum(tl.load(lengths.query_offset + batch), -FAR), FAR).to(tl.int32)
    else:
        offset = (kv_len - q_len) * bottom_right
    return Sequence(batch, q_start, q_len, kv_start, kv_len, offset)


@triton.jit
def find_tile(starts, tile, batches, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that packed tile `tile` belongs to, and the tile's number in that sequence."""
    low = 0
    high = batches
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(starts + middle).to(tl.int32) * GROUP // BLOCK + middle
        if first <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(starts + low).to(tl.int32) * GROUP // BLOCK + low)


@triton.jit
def make_rows(sequence, kv_head, row, GROUP: tl.constexpr):
    """Packed row r is query r // GROUP of head kv_head * GROUP + r % GROUP."""
    query = row // GROUP
    return Rows(query, kv_head * GROUP + row % GROUP, query + sequence.offset, query < sequence.q_len)


@triton.jit
def prefix_length(mask, sequence):
    """Keys below this are seen by every query of the sequence."""
    length = 0
    if mask.prefix is not None:
        length = mask.prefix
    if mask.prefix_lengths is not None:
        length = tl.minimum(tl.load(mask.prefix_lengths + sequence.batch), FAR).to(tl.int32)
    return length


@triton.jit
def load_document(table, mask, sequence, index, missing):
    """`table[batch, index]`, or `missing` where no key stands at `index`."""
    inside = (index >= 0) & (index < mask.document_size)
    return tl.load(table + sequence.batch.to(tl.int64) * mask.document_stride + index, mask=inside, other=missing)


@triton.jit
def tile_start(mask, step, BLOCK: tl.constexpr):
    """First key (or row) of the tile that a loop visits at `step`: `step` itself, or where a list of blocks says."""
    start = step
    if mask.blocks is not None:
        start = tl.load(mask.blocks.index + step) * BLOCK
    return start


@triton.jit
def allow(mask, sequence, rows, keys, prefix, step, BLOCK_N: tl.constexpr):
    """True where the row may attend the key; rows behind the last query are not asked.

    Their weights are never stored, and in the backward pass are 0 by their lse. Bounds meet in one number a row, so
    that a tile costs one comparison a side. `step` is the loop's, BLOCK_N the keys of a tile.
    """
    last = sequence.kv_len - 1
    if mask.right is not None:
        last = tl.minimum(tl.maximum(rows.position + mask.right, prefix - 1), last)
    allowed = keys <= last
    if mask.left is not None:
        allowed = allowed & (keys >= rows.position - mask.left)
    if mask.document_first is not None:
        mine = load_document(mask.document_first, mask, sequence, rows.position, -1)
        allowed = allowed & (mine == load_document(mask.document_first, mask, sequence, keys, -2))
    if mask.blocks is not None:
        allowed = allowed & listed(mask.blocks, rows, keys, step, BLOCK_N)
    return allowed


@triton.jit
def listed(blocks, rows, keys, step, BLOCK_N: tl.constexpr):
    """What entry `step` of a list of blocks says of each pair of its tile; everything where the block is full."""
    WORDS: tl.constexpr = (BLOCK_N + 31) // 32
    tile = tl.load(blocks.tile + step)
    row = tl.maximum(tile, 0).to(tl.int64) * (blocks.row_bits + 1) + (rows.query & blocks.row_bits)
    column = keys & (BLOCK_N - 1)
    found = (rows.query + keys) < 0
    for word in tl.static_range(WORDS):
        # A layout of full blocks alone has no bits to read.
        held = tl.load(blocks.bits + row * WORDS + word, mask=(rows.query * 0 + tile) >= 0, other=0) >> (column & 31)
        found = found | ((column // 32 == word) & ((held & 1) != 0))
    return found | (tile < 0)


@triton.jit
def document_span(mask, sequence, index):
    """First and last key of the documents of the keys (or positions) `index`; an empty span where there is none."""
    first = tl.min(load_document(mask.document_first, mask, sequence, index, 2147483647))
    last = tl.max(load_document(mask.document_last, mask, sequence, index, -1))
    return first, last


@triton.jit
def key_range(mask, sequence, position, first, last, prefix, BLOCK: tl.constexpr):
    """Keys to visit for queries at positions first..last: begin, full begin, full end, end.

    [full begin, full end) needs no mask. All but `end` are multiples of BLOCK. `position` holds each row's
    position, for documents.
    """
    begin = 0
    end = sequence.kv_len
    full_begin = 0
    full_end = sequence.kv_len
    if mask.left is not None:
        begin = tl.maximum(begin, first - mask.left)
        full_begin = tl.maximum(full_begin, last - mask.left)
    if mask.right is not None:
        end = tl.minimum(end, tl.maximum(last + mask.right + 1, prefix))
        full_end = tl.minimum(full_end, tl.maximum(first + mask.right + 1, prefix))
    if mask.document_first is not None:
        document_first, document_last = document_span(mask, sequence, position)
        begin = tl.maximum(begin, document_first)
        end = tl.minimum(end, document_last + 1)
        # Which rows share a document is known only row by row: nothing is full.
        full_begin = 0
        full_end = 0
    return round_range(begin, full_begin, full_end, end, BLOCK)


@triton.jit
def query_range(mask, sequence, keys, first, last, prefix, BLOCK: tl.constexpr):
    """Rows to visit for keys first..last, as `key_range` gives keys for queries."""
    begin = 0
    end = sequence.q_len
    full_begin = 0
    full_end = sequence.q_len
    if mask.left is not None:
        end = tl.minimum(end, last + mask.left + 1 - sequence.offset)
        full_end = tl.minimum(full_end, first + mask.left + 1 - sequence.offset)
    if mask.right is not None:
        begin = tl.where(first < prefix, 0, tl.maximum(begin, first - mask.right - sequence.offset))
        full_begin = tl.where(last < prefix, 0, tl.maximum(full_begin, last - mask.right - sequence.offset))
    if mask.document_first is not None:
        document_first, document_last = document_span(mask, sequence, keys)
        begin = tl.maximum(begin, document_first - sequence.offset)
        end = tl.minimum(end, document_last + 1 - sequence.offset)
        full_begin = 0
        full_end = 0
    if last >= sequence.kv_len:
        full_end = 0
    return round_range(begin, full_begin, full_end, end, BLOCK)


@triton.jit
def round_range(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Align a visit to tiles: begins round down, the full part rounds inwards, and all four come in order."""
    begin = begin // BLOCK * BLOCK
    full_begin = tl.maximum(begin, tl.minimum((full_begin + BLOCK - 1) // BLOCK * BLOCK, end // BLOCK * BLOCK))
    full_end = tl.maximum(full_begin, tl.minimum(full_end, end) // BLOCK * BLOCK)
    return begin, full_begin, full_end, end
