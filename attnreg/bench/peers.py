"""Peers: other ways to compute a case, each exact for the problems that it takes; the tricks included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnreg.bench.runtimes import UnfitError, onnxruntime_peer, openvino_peer, refuse_whole_matrix
from attnreg.masks import Causal, Coords, Full, as_band
from attnreg.problem import Problem
from attnreg.scores import ScaledDot
from attnreg.sparsity import Dense
from attnreg.testing import Inputs

__all__ = ["PEERS", "UnfitError", "copied"]

Run = Callable[..., Any]


def allowed(p: Problem, tensors: Mapping[str, Any], q_rows: slice | None = None, keys: slice | None = None) -> Tensor:
    """The dense bool mask of a problem, [B, H, Sq, Skv] with 1 where it does not depend on batch or head."""
    rows, columns = torch.arange(p.sq)[q_rows or slice(None)], torch.arange(p.skv)[keys or slice(None)]
    batch = p.batch if tensors else 1
    heads = 1 if isinstance(p.spec.sparsity, Dense) else p.q_heads
    i, j = rows[None, None, :, None], columns[None, None, None, :]
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
    at = Coords(b, h, i, i + p.skv - p.sq, j, tensors)
    out = p.spec.mask.allows(at)
    if not isinstance(p.spec.sparsity, Dense):
        out = out & p.spec.sparsity.allows(at, p.skv)
    return out.expand(-1, -1, len(rows), len(columns))


def copied(run: Run) -> Run:
    """For the check alone: a runtime may give the same output buffer every time, which a backend may not."""

    def call(*inputs: Any, **tensors: Any) -> Any:
        out = run(*inputs, **tensors)
        return tuple(x.clone() for x in out) if isinstance(out, tuple) else out.clone()

    return call


def _plain(p: Problem) -> None:
    spec = p.spec
    if spec.softcap or spec.bias or spec.alibi or spec.sinks or spec.dropout_p or spec.page_size or spec.return_lse:
        raise UnfitError("only scores, mask and softmax")
    if spec.layout != "bhsd" or not isinstance(spec.score, ScaledDot) or p.kv_dtype != p.dtype:
        raise UnfitError("only bhsd, scaled dot product, unquantised")


def sdpa(p: Problem, inputs: Inputs) -> Run:
    """torch SDPA as a user would call it: is_causal where that is exact, no mask for one query, else a dense mask."""
    _plain(p)
    said: dict[str, Any] = {"scale": p.scale, "enable_gqa": p.group > 1}
    dense = isinstance(p.spec.sparsity, Dense)
    if dense and isinstance(p.spec.mask, Causal) and p.square:
        said["is_causal"] = True
    elif not (dense and (isinstance(p.spec.mask, Full) or (isinstance(p.spec.mask, Causal) and p.sq == 1))):
        said["attn_mask"] = allowed(p, inputs.tensors)
    return lambda q, k, v, **named: F.scaled_dot_product_attention(q, k, v, **said)


def sdpa_math(p: Problem, inputs: Inputs) -> Run:
    """The same through torch's math path."""
    refuse_whole_matrix(p.batch * p.q_heads * p.sq * p.skv)
    call = sdpa(p, inputs)

    def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return call(q, k, v)

    return run


def sdpa_packed(p: Problem, inputs: Inputs) -> Run:
    """One query a head: the group's queries as rows of their KV head, so that K and V are read once."""
    _plain(p)
    if p.sq != 1 or p.group == 1 or not isinstance(p.spec.mask, (Full, Causal)):
        raise UnfitError("only grouped heads with one query")
    shape = (p.batch, p.kv_heads, p.group, p.head_dim)
    scale = p.scale
    return lambda q, k, v, **named: F.scaled_dot_product_attention(q.view(shape), k, v, scale=scale).reshape(
        p.batch, p.q_heads, 1, p.head_dim_v
    )


def _upcast(inner: Callable[[Problem, Inputs], Run], p: Problem, inputs: Inputs) -> Run:
    """The same in float32, conversions counted."""
    if p.dtype not in ("float16", "bfloat16"):
        raise UnfitError("only half precision")
    call, dtype = inner(p, inputs), p.out_dtype
    return lambda q, k, v, **named: call(q.float(), k.float(), v.float()).to(dtype)


def sdpa_chunks(p: Problem, inputs: Inputs) -> Run:
    """A causal window by query chunks, each on the keys that it can see."""
    _plain(p)
    band = as_band(p.spec.mask)
    if band is None or band.left is None or band.right != 0 or not p.square or p.group > 1 or band.document:
        raise UnfitError("only causal windows")
    size = 512
    cuts = [(n, max(n - band.left, 0), min(n + size, p.sq)) for n in range(0, p.sq, size)]
    windowed = [allowed(p, {}, slice(n, end), slice(first, end)) for n, first, end in cuts]
    scale = p.scale

    def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(q[:, :, n:end], k[:, :, a:end], v[:, :, a:end], attn_mask=m, scale=scale)
            for (n, a, end), m in zip(cuts, windowed, strict=True)
        ]
        return torch.cat(parts, dim=2)

    return run


def documents_as_batch(p: Problem, inputs: Inputs) -> Run:
    """Documents of one length as the rows of a batch."""
    _plain(p)
    ids = inputs.tensors.get("document_ids")
    band = as_band(p.spec.mask)
    if ids is None or band is None or not band.document or not band.causal or not p.square or p.batch != 1:
        raise UnfitError("only causal documents")
    lengths = torch.unique_consecutive(ids[0], return_counts=True)[1]
    if not bool((lengths == lengths[0]).all()):
        raise UnfitError("documents differ in length")
    count, length, scale = len(lengths), int(lengths[0]), p.scale

    def fold(x: Tensor) -> Tensor:
        return x.view(x.shape[1], count, length, x.shape[-1]).transpose(0, 1)

    def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        out = F.scaled_dot_product_attention(fold(q), fold(k), fold(v), is_causal=True, scale=scale)
        return out.transpose(0, 1).reshape(1, p.q_heads, p.sq, -1)

    return run


def gather(p: Problem, inputs: Inputs) -> Run:
    """Block sparsity by gathering each block row's live key blocks; rows that see nearly all run densely."""
    _plain(p)
    block = getattr(p.spec.sparsity, "block", None)
    if block is None or not isinstance(p.spec.mask, Full) or p.batch != 1 or p.group > 1 or p.sq % block:
        raise UnfitError("only BigBird-like patterns of whole blocks, batch 1")
    n = p.sq // block
    table = allowed(p, {})[0, :, ::block, ::block]
    wide = table.sum(-1).amax(0) > n // 2
    narrow = (~wide).nonzero()[:, 0]
    count = int(table[:, narrow].sum(-1).max())
    order = table[:, narrow].int().argsort(dim=-1, descending=True, stable=True)[..., :count]
    live = torch.gather(table[:, narrow], 2, order)
    mask = live.repeat_interleave(block, -1).flatten(0, 1)[:, None, None, :]
    head = torch.arange(p.q_heads)[:, None, None]
    full_rows = (wide.nonzero()[:, 0, None] * block + torch.arange(block)).flatten()
    narrow_rows = (narrow[:, None] * block + torch.arange(block)).flatten()
    scale = p.scale

    def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        blocks = [x[0].view(p.q_heads, n, block, -1) for x in (k, v)]
        near_k, near_v = (x[head, order].flatten(2, 3).flatten(0, 1)[:, None] for x in blocks)
        rows = q[0].view(p.q_heads, n, block, -1)[:, narrow].flatten(0, 1)[:, None]
        near = F.scaled_dot_product_attention(rows, near_k, near_v, attn_mask=mask, scale=scale)
        out = torch.empty(1, p.q_heads, p.sq, p.head_dim_v, dtype=q.dtype)
        out[0, :, narrow_rows] = near.view(p.q_heads, -1, p.head_dim_v)
        out[:, :, full_rows] = F.scaled_dot_product_attention(q[:, :, full_rows], k, v, scale=scale)
        return out

    return run


@functools.cache
def _compiled_flex(shape: Any) -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _flex(block: int, p: Problem, inputs: Inputs) -> Run:
    """Compiled FlexAttention with a block mask of that block size."""
    _plain(p)
    if p.grads:
        raise UnfitError("FlexAttention has no backward on the CPU")
    spec, tensors, shift = p.spec, inputs.tensors, p.skv - p.sq

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = Coords(b, h, i, i + shift, j, tensors)
        out = spec.mask.allows(at)
        return out if isinstance(spec.sparsity, Dense) else out & dense[h, i // size, j // size]

    mask = None
    if not (isinstance(spec.sparsity, Dense) and (isinstance(spec.mask, Full) or p.sq == 1)):
        heads = None if isinstance(spec.sparsity, Dense) else p.q_heads
        refuse_whole_matrix(
            (heads or 1) * p.sq * p.skv, most=1 << 29
        )  # making the blocks takes ten bytes a pair (measured)
        size = getattr(spec.sparsity, "block", 1)
        dense = allowed(p, {})[0, :, ::size, ::size].clone() if size > 1 else torch.ones(1, 1, 1, dtype=torch.bool)
        mask = create_block_mask(mod, None, heads, p.sq, p.skv, device="cpu", BLOCK_SIZE=block)
    call, said = _compiled_flex((str(p), block)), {"scale": p.scale, "enable_gqa": p.group > 1}
    return lambda q, k, v, **named: call(q, k, v, block_mask=mask, **said)


def eager(p: Problem, inputs: Inputs) -> Run:
    """Two products and a softmax in the inputs' dtype, K and V repeated, as models write it."""
    _plain(p)
    refuse_whole_matrix(p.batch * p.q_heads * p.sq * p.skv)
    whole = isinstance(p.spec.mask, Full) and isinstance(p.spec.sparsity, Dense)
    mask = None if whole or p.sq == 1 else ~allowed(p, inputs.tensors)
    group, scale = p.group, p.scale

    def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        score = torch.matmul(q, k.transpose(-1, -2)) * scale
        if mask is not None:
            score = score.masked_fill(mask, -torch.inf)
        return torch.matmul(score.softmax(-1), v)

    return run


PEERS: Mapping[str, Callable[[Problem, Inputs], Run]] = {
    "sdpa": sdpa,
    "sdpa math": sdpa_math,
    "sdpa packed": sdpa_packed,
    "sdpa in float32": functools.partial(_upcast, sdpa),
    "sdpa packed in float32": functools.partial(_upcast, sdpa_packed),
    "sdpa in chunks": sdpa_chunks,
    "documents as a batch": documents_as_batch,
    "gather": gather,
    "flex 64": functools.partial(_flex, 64),
    "flex 128": functools.partial(_flex, 128),
    "eager": eager,
    "onnxruntime": onnxruntime_peer,
    "openvino": openvino_peer,
}
"""Contestants by name; each gives a callable, or raises UnfitError."""
