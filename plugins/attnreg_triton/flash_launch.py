"""The launches of a flash call: forward (and merge of splits) and backward, from one plan and its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import Bias, Lse, Strided
from .launch import (
    Inputs,
    Launch,
    Sizes,
    common_arguments,
    constants,
    lse_values,
    natural,
    next_power_of_two,
    options,
    row_values,
    sizes,
    strided,
)
from .plan import Plan, Tile

BIAS_TILE = Tile(32, 32, 4, 1)
"""The gradient of a bias is rare and bound by recomputing scores: one small tile that fits every head and target."""


def forward_kernel() -> Any:
    """The forward kernel; loads Triton."""
    from . import flash_forward

    return flash_forward.forward_kernel


def merge_kernel() -> Any:
    """The merge kernel; loads Triton."""
    from . import flash_merge

    return flash_merge.merge_kernel


def output_like(plan: Plan, inputs: Inputs, size: Sizes) -> tuple[Tensor, Tensor]:
    """Storage for out (q's layout with Dv columns) and lse (float32, [B, Hq, Sq] or [Hq, T])."""
    q = inputs.q
    shape = (*q.shape[:-1], size.value_dim)
    if plan.layout == "thd":
        # Packed rows behind the last sequence belong to no kernel and mean nothing: 0 and -inf.
        return q.new_zeros(shape), q.new_full((size.heads, size.q_len), -torch.inf, dtype=torch.float32)
    return q.new_empty(shape), q.new_empty((size.batches, size.heads, size.q_len), dtype=torch.float32)


def low_like(inputs: Inputs, lse: Tensor) -> Tensor | None:
    """Storage for what the rounding of lse leaves, where a backward pass needs it; of rows of no sequence 0."""
    return torch.zeros_like(lse) if natural(inputs) else None


Partials = tuple[Tensor, Tensor, "Tensor | None"]


def partials_like(plan: Plan, inputs: Inputs, size: Sizes, lse: Tensor) -> Partials | None:
    """Storage for the results of each split, float32: out [splits, *lse's shape, Dv], lse [splits, *lse's shape], and
    of that shape what the rounding of lse leaves, by which splits of far scores are weighed (else None).
    """
    if plan.splits == 1:
        return None
    shape = (plan.splits, *lse.shape)
    low = lse.new_empty(shape) if natural(inputs) else None
    return lse.new_empty((*shape, size.value_dim)), lse.new_empty(shape), low


def forward_launches(
    plan: Plan,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    partials: Partials | None,
    low: Tensor | None = None,
) -> list[Launch]:
    """The forward kernel and, where the keys are split, the merge of `partials_like`'s partial results.

    low: of `low_like`, for a backward pass, whose forward is not split.
    """
    size = sizes(plan, inputs)
    packed = plan.layout == "thd"
    tiles = size.query_tiles(plan.forward.m, packed, size.group)
    rows = lse.numel()
    grid = tiles * size.kv_heads * (1 if packed else size.batches)
    arguments = common_arguments(plan, inputs, size) | {"sinks": inputs.sinks, "tiles": tiles, "partial_rows": rows}
    plain = not plan.softcap and not natural(inputs) and inputs.alibi_slopes is None
    constant = constants(plan, size, plan.forward) | {"FOLD": plain and plan.scale > 0}
    if partials is None:
        arguments |= {"out": strided(out, plan.layout), "lse": lse_values(lse, low), "splits": 1}
        constant |= {"SPLITS": False}
        return [Launch(forward_kernel, grid, arguments, constant, options(plan.forward))]
    partial, partial_lse, partial_low = partials
    # Strides of one split's rows; the kernel steps from split to split itself.
    batch, (head, row) = (0 if packed else partial.stride(1)), partial.stride()[-3:-1]
    lse_batch, (lse_head, lse_row) = (0 if packed else partial_lse.stride(1)), partial_lse.stride()[-2:]
    arguments |= {
        "out": Strided(partial, batch, head, row),
        "lse": Lse(partial_lse, lse_batch, lse_head, lse_row, partial_low),
        "splits": plan.splits,
    }
    split = Launch(forward_kernel, grid * plan.splits, arguments, constant | {"SPLITS": True}, options(plan.forward))
    merge = {
        "partial": partial,
        "partial_lse": partial_lse,
        "partial_low": partial_low,
        "out": strided(out, plan.layout),
        "lse": lse,
        "heads": size.heads,
        "q_len": size.q_len,
        "rows": rows,
        "splits": plan.splits,
    }
    merge_constant = {
        "DV": size.value_dim,
        "BLOCK_DV": max(16, next_power_of_two(size.value_dim)),
        "BLOCK_SPLITS": next_power_of_two(plan.splits),
    }
    return [split, Launch(merge_kernel, rows, merge, merge_constant, {"num_warps": 4, "num_stages": 1})]


def delta_kernel() -> Any:
    """The delta kernel; loads Triton."""
    from . import flash_backward

    return flash_backward.delta_kernel


def backward_q_kernel() -> Any:
    """The dq kernel; loads Triton."""
    from . import flash_backward

    return flash_backward.backward_q_kernel


def backward_kv_kernel() -> Any:
    """The dk and dv kernel; loads Triton."""
    from . import flash_backward

    return flash_backward.backward_kv_kernel


def bias_kernel() -> Any:
    """The dbias kernel; loads Triton."""
    from . import flash_bias

    return flash_bias.bias_kernel


def delta_launch(plan: Plan, size: Sizes, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> Launch:
    """`delta = rowsum(out * dout) - dlse`, float32, in lse's shape."""
    block = max(16, next_power_of_two(size.value_dim))
    rows = max(1, 2048 // block)
    arguments = {
        "out": strided(out, plan.layout),
        "dout": strided(dout, plan.layout),
        "dlse": None if dlse is None else row_values(dlse),
        "delta": row_values(delta),
        "heads": size.heads,
        "q_len": size.q_len,
    }
    batches = 1 if plan.layout == "thd" else size.batches
    grid = -(-size.q_len // rows) * size.heads * batches
    constant = {"DV": size.value_dim, "BLOCK_DV": block, "BLOCK_M": rows}
    return Launch(delta_kernel, grid, arguments, constant, {"num_warps": 4, "num_stages": 1})


def backward_launches(
    plan: Plan,
    inputs: Inputs,
    saved: tuple[Tensor, Tensor, Tensor | None],
    upstream: tuple[Tensor, Tensor | None],
    delta: Tensor,
    gradients: tuple[Tensor | None, tuple[Tensor, Tensor] | None, Tensor | None],
) -> list[Launch]:
    """Launches that fill `delta` and the wanted `gradients`: dq, (dk, dv), dbias; None where not wanted.

    `saved` is (out, lse, what lse's rounding left), `upstream` gradients of the first two (dlse None for zero).
    """
    size = sizes(plan, inputs)
    (out, lse, low), (dout, dlse), (dq, dkv, dbias) = saved, upstream, gradients
    packed = plan.layout == "thd"
    outer = size.kv_heads * (1 if packed else size.batches)
    shared = common_arguments(plan, inputs, size) | {
        "dout": strided(dout, plan.layout),
        "lse": lse_values(lse, low),
        "delta": row_values(delta),
    }
    launches = [delta_launch(plan, size, out, dout, dlse, delta)]
    if dq is not None:
        tile = plan.backward_q
        tiles = size.query_tiles(tile.m, packed, size.group)
        arguments = shared | {"dq": strided(dq, plan.layout), "tiles": tiles}
        launches.append(Launch(backward_q_kernel, tiles * outer, arguments, constants(plan, size, tile), options(tile)))
    if dkv is not None:
        tile = plan.backward_kv
        tiles = size.key_tiles(tile.n, packed)
        dk, dv = dkv
        arguments = shared | {"dk": strided(dk, plan.layout), "dv": strided(dv, plan.layout), "tiles": tiles}
        launches.append(
            Launch(backward_kv_kernel, tiles * outer, arguments, constants(plan, size, tile), options(tile))
        )
    if dbias is not None:
        launches.append(bias_launch(plan, size, shared, dbias))
    return launches


def bias_launch(plan: Plan, size: Sizes, shared: dict[str, Any], dbias: Tensor) -> Launch:
    """The gradient of a [1 or B, 1 or Hq, 1 or Sq, 1 or Skv] bias."""
    tile = BIAS_TILE
    batch, heads, rows, keys = dbias.shape
    # An axis of size 1 is owned whole by one program, which sums over it.
    q_tiles = 1 if rows == 1 else -(-rows // tile.m)
    k_tiles = 1 if keys == 1 else -(-keys // tile.n)
    arguments = shared | {
        "dbias": Bias(dbias, *dbias.stride()),
        "bias_heads": heads,
        "q_tiles": q_tiles,
        "k_tiles": k_tiles,
        "bias_rows": rows,
        "bias_keys": keys,
        "sum_batches": size.batches if batch == 1 else 1,
        "sum_heads": size.heads if heads == 1 else 1,
    }
    # A program finds its heads and sequences by the bias's own.
    del arguments["batches"], arguments["num_kv_heads"]
    constant = constants(plan, size, tile) | {"SUM_ROWS": rows == 1, "SUM_KEYS": keys == 1}
    return Launch(bias_kernel, batch * heads * q_tiles * k_tiles, arguments, constant, options(tile))
