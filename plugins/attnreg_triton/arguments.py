"""Kernel arguments as named tuples: what each kernel reads, in one place and free of Triton.

Triton takes a named tuple as one argument and specialises its leaves one by one; a leaf that is None is a
compile-time absence, so `if score.bias is not None` in a kernel costs nothing at run time.

A tuple inside a tuple stands before a leaf that is always known to the compiler (None or 1): Triton before 3.7 looks at
the types of a tuple's leaves anew only when it sets one that is known, and would keep those of an earlier look.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Strided(NamedTuple):
    """A [batch, head, row, column] view; columns lie next to each other. Strides are in elements."""

    data: Any
    batch: Any
    head: Any
    row: Any


class Lse(NamedTuple):
    """A float32 log-sum-exp a row, [batch, head, row]; `low`: what its rounding left, laid out alike, or None."""

    data: Any
    batch: Any
    head: Any
    row: Any
    low: Any


class Bias(NamedTuple):
    """An additive score [batch, head, query, key]; a broadcast axis has stride 0.

    `column` None: the keys of a score that is read lie next to each other, and 32 bits count them.
    """

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Lengths(NamedTuple):
    """What says where sequences begin and end: packed starts `cu_q`/`cu_k` [B + 1], None for dense sequences.

    `kv_lengths` [B] cuts each sequence's keys; `query_offset` [B] is the position of the first query, otherwise it is
    `kv_len - q_len` where the kernel's argument `bottom_right` is 1 and 0 where it is 0.
    """

    cu_q: Any
    cu_k: Any
    kv_lengths: Any
    query_offset: Any


class Pages(NamedTuple):
    """A paged KV cache: `table` [B, pages of a sequence] with row stride `stride`; `size` keys a page."""

    table: Any
    stride: Any
    size: Any


class Blocks(NamedTuple):
    """Lists of live tiles (attnreg.blocks.BlockLayout, row or column lists) as one kernel reads them.

    Line `batch * batch_lines + head * head_lines + tile` owns the entries ptr[line] .. ptr[line + 1] - 1, full ones
    before split[line]. `index`: the tile of an entry on the other axis; `tile`: -1 or its bit tile in `bits`;
    `row_bits` is block_q - 1, which cuts a query index to its row in a bit tile.
    """

    ptr: Any
    split: Any
    index: Any
    tile: Any
    bits: Any
    batch_lines: Any
    head_lines: Any
    row_bits: Any


class Mask(NamedTuple):
    """A band: `position - left <= key`, `key <= position + right` or `key < prefix`, and the same document.

    None leaves a side open. `document_first`/`document_last` [B, Skv] hold, for each key, the first and the last
    key of its document. Where `blocks` is given it says everything and the rest is None.
    """

    blocks: Any = None
    left: Any = None
    right: Any = None
    prefix: Any = None
    prefix_lengths: Any = None
    document_first: Any = None
    document_last: Any = None
    document_stride: Any = None
    document_size: Any = None


class Descale(NamedTuple):
    """Factors [batch, head, block] of a stored tensor; one serves `block` rows or keys. Strides 0 where shared."""

    data: Any
    batch: Any
    head: Any
    block: Any


class Descales(NamedTuple):
    """What stored 8-bit values stand for. `q` is by query head, `k` and `v` by KV head; q None: q is no 8-bit.

    `columns`: the stride between columns of a v whose keys lie next to each other; None: its columns do. `weights`:
    the factor at which weights are rounded to v's dtype. `eight`: 1 where both products are made in 8 bits; None: k and
    v are widened to q's dtype.
    """

    q: Any
    k: Any
    v: Any
    columns: Any
    weights: Any
    eight: Any


class Score(NamedTuple):
    """`softcap(scale * q.k) + bias - slope * |position - key|`; q.k of what the stored values stand for.

    `stored`: 1 where there are `descales`, else None. `natural`: 1 where scores are kept in natural units, else None
    (log2). At the lowest numbers, which padding masks hold, a factor of log2(e) would make them -inf.
    """

    scale: Any
    softcap: Any
    descales: Any
    bias: Any
    alibi: Any
    alibi_batch: Any
    stored: Any
    natural: Any


class Dropout(NamedTuple):
    """`seed` points at one int64 on the device; `p` is the chance that a weight is dropped."""

    seed: Any
    p: Any


class Sequence(NamedTuple):
    """One sequence inside a kernel: its batch index, first packed token, lengths, and first query position."""

    batch: Any
    q_start: Any
    q_len: Any
    kv_start: Any
    kv_len: Any
    offset: Any


class Rows(NamedTuple):
    """Query rows inside a kernel, shaped to broadcast against keys: query index, head, position, validity."""

    query: Any
    head: Any
    position: Any
    valid: Any
