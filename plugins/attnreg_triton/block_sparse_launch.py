"""The launches of a block-sparse call, from a plan, its tensors and its block layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnreg import blocks

from .arguments import Bias, Blocks, Mask
from .flash_launch import delta_launch
from .launch import (
    Inputs,
    Launch,
    Sizes,
    common_arguments,
    constants,
    lse_values,
    natural,
    options,
    row_values,
    sizes,
    strided,
)
from .plan import Plan, Tile

Layout = blocks.BlockLayout


def forward_kernel() -> Any:
    """The forward kernel; loads Triton."""
    from . import block_sparse_kernels

    return block_sparse_kernels.block_forward_kernel


def q_kernel() -> Any:
    """The dq kernel; loads Triton."""
    from . import block_sparse_kernels

    return block_sparse_kernels.block_q_kernel


def kv_kernel() -> Any:
    """The dk and dv kernel; loads Triton."""
    from . import block_sparse_kernels

    return block_sparse_kernels.block_kv_kernel


def bias_kernel() -> Any:
    """The kernel of the scores' gradient; loads Triton."""
    from . import block_sparse_kernels

    return block_sparse_kernels.block_bias_kernel


def _mask(layout: Layout, columns: bool) -> Mask:
    """The row lists of a layout, or its column lists, as the mask of a kernel."""
    lines = layout.n_kv if columns else layout.n_q
    lists = (layout.row_ptr, layout.row_split, layout.col_idx, layout.tile_idx)
    if columns:
        lists = (layout.col_ptr, layout.col_split, layout.row_idx, layout.col_tile)
    held = Blocks(
        *lists,
        bits=layout.bits,
        batch_lines=layout.n_heads * lines if layout.n_batch > 1 else 0,
        head_lines=lines if layout.n_heads > 1 else 0,
        row_bits=layout.block_q - 1,
    )
    return Mask(blocks=held)


def _shared(plan: Plan, inputs: Inputs, size: Sizes, layout: Layout, columns: bool = False) -> dict[str, Any]:
    """Arguments that every block-sparse kernel takes."""
    out = common_arguments(plan, inputs, size) | {"mask": _mask(layout, columns)}
    del out["batches"], out["num_kv_heads"]
    return out


def forward_launches(
    plan: Plan, inputs: Inputs, layout: Layout, out: Tensor, lse: Tensor, low: Tensor | None = None
) -> list[Launch]:
    """The forward launch; fills out and lse, and for a backward pass what lse's rounding left."""
    size = sizes(plan, inputs)
    plain = not plan.softcap and not natural(inputs) and inputs.alibi_slopes is None
    arguments = _shared(plan, inputs, size, layout) | {
        "out": strided(out, plan.layout),
        "lse": lse_values(lse, low),
        "sinks": inputs.sinks,
        "heads": size.heads,
        "tiles": layout.n_q,
    }
    constant = constants(plan, size, plan.forward) | {"FOLD": plain and plan.scale > 0}
    grid = layout.n_q * size.heads * size.batches
    return [Launch(forward_kernel, grid, arguments, constant, options(plan.forward))]


def backward_launches(
    plan: Plan,
    inputs: Inputs,
    layout: Layout,
    saved: tuple[Tensor, Tensor, Tensor | None],
    upstream: tuple[Tensor, Tensor | None],
    delta: Tensor,
    gradients: tuple[Tensor | None, tuple[Tensor, Tensor] | None, Tensor | None],
) -> list[Launch]:
    """Launches that fill `delta` and the wanted `gradients`: dq, (dk, dv), dscores; None where not wanted.

    `saved` is (out, lse, what lse's rounding left), `upstream` gradients of the first two (dlse None for zero).
    dscores: float32 [B, Hq, Sq, Skv] of zeros, whose live blocks are filled.
    """
    size = sizes(plan, inputs)
    (out, lse, low), (dout, dlse), (dq, dkv, dscores) = saved, upstream, gradients
    launches = [delta_launch(plan, size, out, dout, dlse, delta)]
    rows = {"dout": strided(dout, plan.layout), "lse": lse_values(lse, low), "delta": row_values(delta)}
    by_row = _shared(plan, inputs, size, layout) | rows | {"heads": size.heads, "tiles": layout.n_q}
    del by_row["pages"]
    grid = layout.n_q * size.heads * size.batches

    def add(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> None:
        launches.append(Launch(kernel, programs, arguments, constants(plan, size, tile), options(tile)))

    if dq is not None:
        add(q_kernel, grid, by_row | {"dq": strided(dq, plan.layout)}, plan.backward_q)
    if dkv is not None:
        by_column = _shared(plan, inputs, size, layout, columns=True) | rows
        del by_column["pages"]
        by_column |= {"num_kv_heads": size.kv_heads, "tiles": layout.n_kv}
        by_column |= {name: strided(x, plan.layout) for name, x in zip(("dk", "dv"), dkv, strict=True)}
        add(kv_kernel, layout.n_kv * size.kv_heads * size.batches, by_column, plan.backward_kv)
    if dscores is not None:
        add(bias_kernel, grid, by_row | {"dbias": Bias(dscores, *dscores.stride())}, plan.backward_q)
    return launches
