"""A problem's tensors on the meta device, so that a launch can be described where the problem cannot run."""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg import Problem, masks

from .launch import Inputs


def inputs(problem: Problem) -> Inputs:
    """Tensors with the problem's shapes and dtypes and no storage; strides as for contiguous tensors."""
    spec = problem.spec

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(heads: int, length: int, total: int, dim: int, dtype: torch.dtype) -> Tensor:
        if spec.layout == "thd":
            return empty(total, heads, dim, dtype=dtype)
        pair = (heads, length) if spec.layout == "bhsd" else (length, heads)
        return empty(problem.batch, *pair, dim, dtype=dtype)

    def named(name: str, shape: tuple[int, ...], plain: torch.dtype = torch.int32) -> Tensor | None:
        info = problem.info(name)
        if info is None:
            # A problem written by hand may leave out what the spec implies.
            return empty(*shape, dtype=plain) if name in spec.tensors() else None
        # A dimension of size 1 is broadcast; missing leading dimensions are too.
        sizes = shape[len(shape) - len(info.dims) :]
        cut = tuple(1 if one else size for one, size in zip(info.dims, sizes, strict=True))
        return empty(*cut, dtype=getattr(torch, info.dtype))

    dtype, kv_dtype = getattr(torch, problem.dtype), getattr(torch, problem.kv_dtype)
    batch, heads, skv = problem.batch, problem.q_heads, problem.skv
    table = None
    if spec.page_size is not None:
        shape = (problem.pages, problem.kv_heads, spec.page_size)
        k, v = (empty(*shape, dim, dtype=kv_dtype) for dim in (problem.head_dim_k, problem.head_dim_v))
        table = named("block_table", (batch, skv // spec.page_size))
    else:
        k, v = (
            rows(problem.kv_heads, skv, problem.total_k, dim, kv_dtype)
            for dim in (problem.head_dim_k, problem.head_dim_v)
        )
    spans = empty(batch, skv, dtype=torch.int32) if _documents(problem) else None
    lengths = named("kv_lengths", (batch,))
    if lengths is None:
        lengths = named("seqused_k", (batch,))
    bias = named("bias", (batch, heads, problem.sq, skv), dtype)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    slopes = named("alibi_slopes", (batch, heads)) if problem.info("alibi_slopes") else named("alibi_slopes", (heads,))
    band = masks.as_band(spec.mask)
    return Inputs(
        q=rows(heads, problem.sq, problem.total_q, problem.head_dim, dtype),
        k=k,
        v=v,
        bias=bias,
        alibi_slopes=None if slopes is None else slopes.to(torch.float32),
        sinks=empty(heads, dtype=torch.float32) if spec.sinks else None,
        prefix_lengths=named("prefix_lengths", (batch,)) if band is not None and band.prefix_tensor else None,
        document_first=spans,
        document_last=spans,
        kv_lengths=lengths,
        query_offset=named("query_offset", (batch,)),
        cu_seqlens_q=named("cu_seqlens_q", (batch + 1,)),
        cu_seqlens_k=named("cu_seqlens_k", (batch + 1,)),
        block_table=table,
        seed=empty(1, dtype=torch.int64) if spec.dropout_p > 0 else None,
    )


def _documents(problem: Problem) -> bool:
    return "document_ids" in problem.spec.tensors()
