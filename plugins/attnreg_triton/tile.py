"""One attention tile: load, score, mask, softmax step and gradient step, shared by every kernel.

Row and key indices come in shaped to broadcast ([M, 1] against [1, N], or [1, M] against [N, 1]), so the same code
serves kernels that hold queries as rows and kernels that hold keys as rows. Scores are in units of log2: the weight
of a key is `exp2(score - lse * log2(e))`. With `score.natural` they are in natural units and lse has a second word:
`exp2((score - lse - low) * log2(e))`. Online softmax: Milakov and Gimelshein (2018), Dao (2023).
"""

# mypy: ignore-errors
# Device code: Triton gives these names their types, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Strided

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST_TF32 = tl.constexpr(3.4e38)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
COUNTS = ("bottom_right", "batches", "heads", "num_kv_heads", "rows", "tiles", "splits", "partial_rows")
"""Arguments for whose values no kernel is compiled anew. Not the lengths: that 16 divides one saves registers, for want
of which tiles spill that do not otherwise. Triton hears this of plain arguments only, not of what stands in a tuple."""


def kernel(fn):
    """`triton.jit` of a kernel that the host starts."""
    return triton.jit(fn, do_not_specialize=COUNTS, do_not_specialize_on_alignment=COUNTS)


@triton.jit
def multiply(a, b, accumulator, PRECISION: tl.constexpr):
    """`accumulator + a @ b` in float32."""
    if INTERPRETED:
        # The interpreter multiplies bfloat16 operands as integers: widen them first.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    if a.dtype.is_fp8():
        # Hopper's 8-bit products keep few bits of a sum: add what each instruction (32 columns) makes in float32.
        return tl.dot(a, b, max_num_imprecise_acc=32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 `value` as `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts off instead of rounding, and loses denormals: round the bits here, as hardware does.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if INTERPRETED and dtype.is_fp8():
        return narrow_float8(value, dtype)
    return value.to(dtype)


@triton.jit
def narrow_float8(value, dtype: tl.constexpr):
    """float32 `value` within the range of e4m3 or e5m2, or NaN, rounded to nearest even as hardware does.

    The interpreter's own conversion loses the carry into the exponent, denormals and NaN.
    """
    MANTISSA: tl.constexpr = 3 if dtype == tl.float8e4nv else 2
    BIAS: tl.constexpr = 7 if dtype == tl.float8e4nv else 15
    UNIT: tl.constexpr = 512.0 if dtype == tl.float8e4nv else 65536.0
    exponent = ((value.to(tl.uint32, bitcast=True) >> 23) & 255).to(tl.int32) - 127
    step = tl.maximum(exponent, 1 - BIAS) - MANTISSA
    # Adding and taking away 1.5 * 2**23 steps rounds to a whole number of steps.
    large = (((step + 150) << 23) | 0x400000).to(tl.float32, bitcast=True)
    rounded = (value + large) - large
    bits = rounded.to(tl.uint32, bitcast=True)
    exponent = ((bits >> 23) & 255).to(tl.int32) - 127
    normal = ((exponent + BIAS) << MANTISSA) | ((bits >> (23 - MANTISSA)).to(tl.int32) & ((1 << MANTISSA) - 1))
    low = tl.minimum(tl.abs(rounded) * UNIT, 128.0).to(tl.int32)
    code = tl.where(exponent < 1 - BIAS, low, normal) | ((bits >> 24).to(tl.int32) & 128)
    code = tl.where(value != value, 127, code)
    return code.to(tl.uint8).to(dtype, bitcast=True)


@triton.jit
def load_matrix(pointers, columns, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """Load `pointers[:, None] + columns`: rows where `valid`, columns below SIZE; zero elsewhere."""
    tile = pointers[:, None] + columns[None, :]
    if CHECK and SIZE % BLOCK != 0:
        value = tl.load(tile, mask=valid[:, None] & (columns[None, :] < SIZE), other=0.0)
    elif CHECK:
        value = tl.load(tile, mask=valid[:, None], other=0.0)
    elif SIZE % BLOCK != 0:
        value = tl.load(tile, mask=columns[None, :] < SIZE, other=0.0)
    else:
        value = tl.load(tile)
    if CHECK and value.dtype == tl.float32:
        # A masked key may hold the largest float32, which a TF32 product rounds to inf, and 0 * inf is NaN.
        # Finite ones only: a visible inf or NaN is the caller's, and shows in the result.
        size = tl.abs(value)
        beyond = (size > LARGEST_TF32) & (size < float("inf"))
        value = tl.where(beyond, tl.where(value < 0, -LARGEST_TF32, LARGEST_TF32), value)
    return value


@triton.jit
def load_head(pointers, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, CHECK: tl.constexpr):
    """Load a head of SIZE columns as BLOCK columns and, where TAIL > 0, TAIL more (192 = 128 + 64).

    Without a tail the second value repeats the first and nobody reads it: a kernel function cannot return None.
    """
    WIDTH: tl.constexpr = BLOCK if TAIL > 0 else SIZE
    main = load_matrix(pointers, tl.arange(0, BLOCK), valid, WIDTH, BLOCK, CHECK)
    rest = main
    if TAIL > 0:
        rest = load_matrix(pointers + BLOCK, tl.arange(0, TAIL), valid, SIZE - BLOCK, TAIL, CHECK)
    return main, rest


@triton.jit
def store_matrix(pointers, columns, value, valid, SIZE: tl.constexpr):
    """Store `value` at `pointers[:, None] + columns`, rows where `valid`, columns below SIZE."""
    tile = pointers[:, None] + columns[None, :]
    tl.store(tile, narrow(value, pointers.dtype.element_ty), mask=valid[:, None] & (columns[None, :] < SIZE))


@triton.jit
def key_pointers(tensor, sequence, kv_head, keys, start, pages):
    """Addresses of the rows `keys` of k or v; `start` is the tile's first key, `keys` = start + 0, 1, ..."""
    head = kv_head.to(tl.int64) * tensor.head
    if pages is not None:
        slot = pages.table + sequence.batch.to(tl.int64) * pages.stride + keys // pages.size
        # Slots that no key in range needs may hold -1: read page 0 there, the mask drops what it holds.
        page = tl.maximum(tl.load(slot, mask=keys < sequence.kv_len, other=0), 0)
        return tensor.data + head + page.to(tl.int64) * tensor.batch + (keys % pages.size) * tensor.row
    first = sequence.batch.to(tl.int64) * tensor.batch + head + (sequence.kv_start + start).to(tl.int64) * tensor.row
    # A 64-bit base with 32-bit offsets inside the tile: fewer registers, and buffer loads on AMD.
    return tensor.data + first + (keys - start) * tensor.row


@triton.jit
def row_pointers(tensor, sequence, query, head):
    """Addresses of query rows (q, o, do, dq) given the query index in its sequence and the query head."""
    base = tensor.data + sequence.batch.to(tl.int64) * tensor.batch
    return base + (sequence.q_start + query).to(tl.int64) * tensor.row + head.to(tl.int64) * tensor.head


@triton.jit
def head_pointers(tensor, sequence, head, rows, start):
    """Addresses of the query rows `rows` = start + 0, 1, ... of one head (q, do), or of their values (lse, delta)."""
    first = sequence.batch.to(tl.int64) * tensor.batch + head.to(tl.int64) * tensor.head
    first += (sequence.q_start + start).to(tl.int64) * tensor.row
    return tensor.data + first + (rows - start) * tensor.row


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: the exponential form loses digits near 0, where the odd series is exact."""
    square = x * x
    series = x + x * square * (-0.33333333 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488)))
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def bias_pointers(bias, sequence, rows, keys):
    """Addresses of the bias of each (row, key)."""
    base = bias.data + sequence.batch.to(tl.int64) * bias.batch
    base += rows.head.to(tl.int64) * bias.head + rows.query.to(tl.int64) * bias.row
    columns = keys
    if bias.column is not None:
        columns = keys.to(tl.int64) * bias.column
    return base + columns


@triton.jit
def natural_scores(products, score, sequence, rows, keys):
    """`finish_scores` in natural units."""
    capped = products
    if score.softcap is not None:
        capped = tanh(products * (score.scale / score.softcap))
        scores = capped * score.softcap
    else:
        scores = products * score.scale
    if score.bias is not None:
        inside = rows.valid & (keys < sequence.kv_len)
        bias = tl.load(bias_pointers(score.bias, sequence, rows, keys), mask=inside, other=0.0)
        scores += bias.to(tl.float32)
    if score.alibi is not None:
        slope = tl.load(score.alibi + sequence.batch * score.alibi_batch + rows.head, mask=rows.valid, other=0.0)
        distance = tl.abs(rows.position - keys).to(tl.float32)
        scores -= slope.to(tl.float32) * distance
    return scores, capped


@triton.jit
def finish_scores(products, score, sequence, rows, keys, FOLD: tl.constexpr):
    """Turn q.k into scores in their units; also the softcap's tanh, which its gradient needs (else a stand-in).

    FOLD leaves the scale to `softmax_step`, which multiplies and subtracts in one instruction; it holds only where
    nothing but a positive scale stands between q.k and the softmax.
    """
    if FOLD:
        return products, products
    capped = products
    if score.natural is not None:
        return natural_scores(products, score, sequence, rows, keys)
    if score.softcap is not None:
        capped = tanh(products * (score.scale / score.softcap))
        scores = capped * (score.softcap * LOG2E)
    else:
        scores = products * (score.scale * LOG2E)
    if score.alibi is not None:
        slope = tl.load(score.alibi + sequence.batch * score.alibi_batch + rows.head, mask=rows.valid, other=0.0)
        distance = tl.abs(rows.position - keys).to(tl.float32)
        scores -= slope.to(tl.float32) * LOG2E * distance
    return scores, capped


@triton.jit
def head_products(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b^T` over a head that may come in two pieces."""
    products = product(a, tl.trans(b), PRECISION)
    if TAIL > 0:
        products = multiply(a_tail, tl.trans(b_tail), products, PRECISION)
    return products


@triton.jit
def keep_mask(dropout, sequence, rows, keys):
    """True where dropout keeps the weight: Philox keyed by the seed, counted by (key, query, head, batch).

    It depends on no tile size, so forward and backward draw the same mask under different configurations.
    """
    shape = rows.query + keys
    zero = shape * 0
    bits, _, _, _ = tl.philox(
        tl.load(dropout.seed), zero + keys, zero + rows.query, zero + rows.head, zero + sequence.batch
    )
    return tl.uint_to_uniform_float(bits) >= dropout.p


@triton.jit
def softmax_step(scores, maximum, total, score, FOLD: tl.constexpr):
    """One online-softmax step over [M, N] scores: weights, the factor for older sums, new maximum and total."""
    row_maximum = tl.max(scores, 1)
    if FOLD:
        row_maximum = row_maximum * (score.scale * LOG2E)
    new_maximum = tl.maximum(maximum, row_maximum)
    # A row that has seen no key yet has maximum -inf; 0 instead keeps -inf - -inf from making NaN.
    safe = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    if FOLD:
        scores = scores * (score.scale * LOG2E)
    if score.natural is not None:
        weights = tl.exp2((scores - safe[:, None]) * LOG2E)
        decay = tl.exp2((maximum - safe) * LOG2E)
    else:
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(maximum - safe)
    return weights, decay, new_maximum, total * decay + tl.sum(weights, 1)


@triton.jit
def start_sinks(sinks, head, valid, score):
    """Maximum and total of rows that have met their heads' sinks alone."""
    maximum = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32)
    if score.natural is None:
        maximum = maximum * LOG2E
    return maximum, tl.where(maximum == float("-inf"), 0.0, 1.0)


@triton.jit
def low_of(lse):
    """The second word of an lse as the view that the first is."""
    return Strided(lse.low, lse.batch, lse.head, lse.row)


@triton.jit
def low_word(maximum, total, natural):
    """What the rounding of a natural lse left of maximum + log(total): with the larger first, this is exact."""
    logarithm = tl.log2(tl.where(total == 0.0, 1.0, total)) * LN2
    apart = tl.abs(maximum) >= tl.abs(logarithm)
    large = tl.where(apart, maximum, logarithm)
    low = (large - natural) + tl.where(apart, logarithm, maximum)
    return tl.where((total == 0.0) | (low != low), 0.0, low)


@triton.jit
def normalise(accumulator, maximum, total, score, dropout):
    """Output rows and their natural lse from a softmax state; 0 and -inf for a row that saw no key."""
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    if dropout is not None:
        divisor = divisor * (1.0 - dropout.p)
    accumulator = accumulator / divisor[:, None]
    logarithm = tl.log2(tl.where(empty, 1.0, total))
    natural = maximum + logarithm * LN2 if score.natural is not None else (maximum + logarithm) * LN2
    return accumulator, tl.where(empty, float("-inf"), natural)


@triton.jit
def score_gradient(scores, capped, dp, lse, low, delta, allowed, keep, score, dropout):
    """Weights (after dropout), gradient of `scale * q.k`, gradient of the bias; zero wherever `allowed` is False.

    lse is in the scores' units, +inf for an empty row; `low` what its rounding left, or None. `allowed` None means
    every key of the tile is.
    """
    if score.natural is not None:
        # lse is near the scores that count, so their difference is exact, and low joins where it is not lost.
        above = scores - lse
        if low is not None:
            above -= low
        weights = tl.exp2(above * LOG2E)
    else:
        weights = tl.exp2(scores - lse)
    if allowed is not None:
        # Select, never multiply: a masked key may have made inf or NaN on the way here.
        weights = tl.where(allowed, weights, 0.0)
    dropped = weights
    if dropout is not None:
        kept = 1.0 / (1.0 - dropout.p)
        dropped = tl.where(keep, weights * kept, 0.0)
        dp = tl.where(keep, dp * kept, 0.0)
    bias_gradient = weights * (dp - delta)
    gradient = bias_gradient
    if score.softcap is not None:
        gradient = gradient * (1.0 - capped * capped)
    if allowed is not None:
        # Last: the softcap of a masked key may be NaN, and 0 * NaN is NaN.
        gradient = tl.where(allowed, gradient, 0.0)
        bias_gradient = tl.where(allowed, bias_gradient, 0.0)
    return dropped, gradient, bias_gradient
