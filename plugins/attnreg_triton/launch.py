"""Bind tensors and a plan to kernel launches: one description that runs a kernel or cross-compiles it.

Everything here works on tensors of any device, meta included: `run` starts the kernels, `signatures` turns the same
launches into compiler input, so what is checked for a target is what runs there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import Bias, Dropout, Lengths, Lse, Mask, Pages, Score, Strided
from .plan import Plan, Tile

ROWS_AXIS = {"bhsd": 2, "bshd": 1, "thd": 0}
"""The axis of queries or keys of a tensor, by layout."""


@dataclass(frozen=True)
class Launch:
    """One kernel start: `kernel` loads the function, `grid` programs, arguments in the kernel's names, options."""

    kernel: Callable[[], Any]
    grid: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, int]

    def run(self) -> Any:
        """Start the kernel on the current stream; an empty grid is no launch.

        Returns the compiled kernel, () for an empty grid, or None where kernels are interpreted.
        """
        if self.grid <= 0:
            return ()
        return self.kernel()[(self.grid,)](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call; names as in the spec, None where the spec has none.

    `document_first`/`document_last` [B, Skv] int32: see `documents.spans`. `seed`: one int64 on the device.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    prefix_lengths: Tensor | None = None
    document_first: Tensor | None = None
    document_last: Tensor | None = None
    kv_lengths: Tensor | None = None
    query_offset: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    seed: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of the fields."""
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Sizes:
    """Sizes read off the tensors; `q_len` is the packed total under thd, `kv_len` the longest a sequence can be."""

    batches: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.heads // self.kv_heads

    def query_tiles(self, block: int, packed: bool, group: int) -> int:
        """Tiles of `block` packed rows in a sequence; packed: an upper bound for all sequences together."""
        rows = self.q_len * group
        return rows // block + self.batches if packed else -(-rows // block)

    def key_tiles(self, block: int, packed: bool) -> int:
        """Tiles of `block` keys in a sequence; packed: an upper bound for all sequences together."""
        return self.kv_len // block + self.batches if packed else -(-self.kv_len // block)


def sizes(plan: Plan, inputs: Inputs) -> Sizes:
    """Sizes of a call."""
    heads_axis = 2 if plan.layout == "bshd" else 1
    rows_axis = ROWS_AXIS[plan.layout]
    q, k, v = inputs.q, inputs.k, inputs.v
    if plan.layout == "thd":
        assert inputs.cu_seqlens_q is not None
        batches = inputs.cu_seqlens_q.shape[0] - 1
    else:
        batches = q.shape[0]
    if plan.page_size is not None:
        assert inputs.block_table is not None
        kv_heads, kv_len = k.shape[1], inputs.block_table.shape[1] * plan.page_size
    else:
        kv_heads, kv_len = k.shape[heads_axis], k.shape[rows_axis]
    return Sizes(batches, q.shape[heads_axis], kv_heads, q.shape[rows_axis], kv_len, q.shape[-1], v.shape[-1])


def strided(tensor: Tensor, layout: str) -> Strided:
    """A tensor of `layout` ("pages" for a paged cache) as the [batch, head, row, column] view kernels read."""
    if layout == "thd":
        return Strided(tensor, 0, tensor.stride(1), tensor.stride(0))
    head, row = (2, 1) if layout == "bshd" else (1, 2)
    return Strided(tensor, tensor.stride(0), tensor.stride(head), tensor.stride(row))


def row_values(tensor: Tensor) -> Strided:
    """A float32 value a row: [B, Hq, Sq], or packed [Hq, T]."""
    batch = tensor.stride(0) if tensor.dim() == 3 else 0
    return Strided(tensor, batch, tensor.stride(-2), tensor.stride(-1))


def natural(inputs: Inputs) -> bool:
    """Are scores kept in natural units, and lse in two words for the backward pass?

    Where a bias may lie at the lowest numbers, and in float32, whose weights a rounded lse would show in. Weights of
    half precision are rounded to 2**-9 themselves: without a bias its kernels take the shorter way.
    """
    return inputs.bias is not None or inputs.q.dtype == torch.float32


def lse_values(lse: Tensor, low: Tensor | None = None) -> Lse:
    """lse [B, Hq, Sq] or packed [Hq, T] with what its rounding left, contiguous both."""
    return Lse(*row_values(lse), low)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def head_blocks(head_dim: int) -> tuple[int, int]:
    """(block, tail): a head as one padded block, or as a power of two and a tail where that wastes less."""
    whole = max(16, next_power_of_two(head_dim))
    half = whole // 2
    tail = max(16, next_power_of_two(head_dim - half))
    return (half, tail) if half >= 16 and half < head_dim and half + tail < whole else (whole, 0)


def _broadcast(tensor: Tensor, axis: int) -> int:
    return 0 if tensor.shape[axis] == 1 else tensor.stride(axis)


def bias_view(bias: Tensor) -> Bias:
    """A [1 or B, 1 or Hq, 1 or Sq, 1 or Skv] bias to read, with stride 0 along broadcast axes."""
    batch, head, row, column = (_broadcast(bias, axis) for axis in range(4))
    return Bias(bias, batch, head, row, None if column == 1 else column)


def common_arguments(plan: Plan, inputs: Inputs, size: Sizes) -> dict[str, Any]:
    """Arguments that every flash kernel takes, forward and backward."""
    packed = plan.layout == "thd"
    kv_layout = "pages" if plan.page_size is not None else plan.layout
    table = inputs.block_table
    alibi = inputs.alibi_slopes
    first, last = inputs.document_first, inputs.document_last
    return {
        "q": strided(inputs.q, plan.layout),
        "k": strided(inputs.k, kv_layout),
        "v": strided(inputs.v, kv_layout),
        "lengths": Lengths(
            cu_q=inputs.cu_seqlens_q if packed else None,
            cu_k=inputs.cu_seqlens_k if packed and plan.page_size is None else None,
            kv_lengths=inputs.kv_lengths,
            query_offset=inputs.query_offset,
        ),
        "q_len": size.q_len,
        "kv_len": size.kv_len,
        "bottom_right": int(plan.align == "bottom_right"),
        "pages": None if table is None else Pages(table, table.stride(0), plan.page_size),
        "mask": Mask(
            left=plan.left,
            right=plan.right,
            prefix=plan.prefix,
            prefix_lengths=inputs.prefix_lengths,
            document_first=first,
            document_last=last,
            document_stride=None if first is None else first.stride(0),
            document_size=None if first is None else first.shape[1],
        ),
        "score": Score(
            scale=plan.scale,
            softcap=plan.softcap or None,
            descales=None,
            bias=None if inputs.bias is None else bias_view(inputs.bias),
            alibi=alibi,
            alibi_batch=None if alibi is None else (_broadcast(alibi, 0) if alibi.dim() == 2 else 0),
            stored=None,
            natural=1 if natural(inputs) else None,
        ),
        "dropout": None if inputs.seed is None else Dropout(inputs.seed, plan.dropout_p),
        "batches": size.batches,
        "num_kv_heads": size.kv_heads,
    }


def constants(plan: Plan, size: Sizes, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments that every flash kernel takes."""
    block, tail = head_blocks(size.head_dim)
    return {
        "GROUP": size.group,
        "D": size.head_dim,
        "BLOCK_D": block,
        "TAIL": tail,
        "DV": size.value_dim,
        "BLOCK_DV": max(16, next_power_of_two(size.value_dim)),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "PRECISION": plan.precision,
    }


def options(tile: Tile) -> dict[str, int]:
    """Compiler options of a tile."""
    # Fused multiply-adds are meant: scale and maximum of the softmax are one instruction with them.
    chosen = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return {**chosen, "waves_per_eu": tile.waves} if tile.waves else chosen
