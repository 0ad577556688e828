"""Calls whose tensors are DTensors: each rank computes its own sequences or heads, and nothing is sent.

Sharding the batch or the heads leaves attention whole on each rank. Sharding the sequence or the columns does not: that
is refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import masks
from attnreg.errors import InputError
from attnreg.sparsity import BigBird
from attnreg.spec import AttentionSpec

__all__ = ["attend_sharded", "is_sharded"]

_AXES = {"bhsd": {"batch": 0, "heads": 1}, "bshd": {"batch": 0, "heads": 2}, "thd": {"heads": 1}}
_LSE_AXES = {"bhsd": {"batch": 0, "heads": 1}, "bshd": {"batch": 0, "heads": 1}, "thd": {"heads": 0}}
_PAIRS = ("attn_mask", "bias")  # broadcast to [B, Hq, Sq, Skv] from the right
_BY_BATCH = ("prefix_lengths", "global_mask", "document_ids", "kv_lengths", "query_offset", "block_table", "seqused_k")
_BY_HEAD = ("sinks", "score_weight")
_BY_BOTH = ("block_mask", "q_descale", "k_descale", "v_descale")


def is_sharded(q: object, k: object, v: object, tensors: Mapping[str, Any]) -> bool:
    """Is one of the call's tensors a DTensor?"""
    return any(_is_dtensor(x) for x in (q, k, v, *tensors.values()))


def _is_dtensor(x: object) -> bool:
    kind = type(x)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


def attend_sharded(
    call: Callable[..., Any], spec: AttentionSpec, q: Any, k: Any, v: Any, tensors: Mapping[str, Any]
) -> Any:
    """The output (and lse) of `call` as DTensors, placed like q. Named tensors that are no DTensor count as replicated.

    Raises InputError that names the argument and says what to do where the placements leave no attention whole.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _is_dtensor(x):
            raise InputError(name, f"expected a DTensor like the others of the call, got {type(x).__name__}")
        if x.device_mesh != q.device_mesh:
            raise InputError(name, f"expected a DTensor on q's mesh {q.device_mesh}, got {x.device_mesh}")
    by = [_cut(spec, dim, q, k, v) for dim in range(q.device_mesh.ndim)]
    _check_spec(spec, q.device_mesh, by)
    axes = _AXES[spec.layout]
    kv_axes = {"heads": 1} if spec.page_size is not None else axes
    local = [_local(x, q.device_mesh, by, own) for x, own in ((q, axes), (k, kv_axes), (v, kv_axes))]
    named = {
        name: _local(x, q.device_mesh, by, _named_axes(spec, name, x)) if isinstance(x, Tensor) else x
        for name, x in tensors.items()
    }
    out = call(spec, *local, **named)
    shape = (*q.shape[:-1], v.shape[-1])
    if not spec.return_lse:
        return _whole(out, q.device_mesh, by, axes, shape)
    *batch, a, b = q.shape[:-1]
    lse_shape = (*batch, a, b) if spec.layout == "bhsd" else (*batch, b, a)
    return (
        _whole(out[0], q.device_mesh, by, axes, shape),
        _whole(out[1], q.device_mesh, by, _LSE_AXES[spec.layout], lse_shape),
    )


def _cut(spec: AttentionSpec, dim: int, q: Any, k: Any, v: Any) -> str:
    """What this dimension of the mesh cuts: "batch", "heads" or "" for nothing."""
    axes, paged = _AXES[spec.layout], spec.page_size is not None
    found = {name: _kind(name, x, dim, {"heads": 1} if paged and name != "q" else axes) for name, x in
             (("q", q), ("k", k), ("v", v))}  # fmt: skip
    kind, ranks = found["q"], q.device_mesh.size(dim)
    heads = 1 if spec.layout != "bshd" or paged else 2
    kv_heads = k.shape[heads]
    if kind == "batch" and paged:
        found |= {"k": "batch", "v": "batch"} if not (found["k"] or found["v"]) else {}
    if kind == "heads" and kv_heads == 1 and not (found["k"] or found["v"]):
        found |= {"k": "heads", "v": "heads"}  # one KV head serves all query heads, whole on each rank
    for name in ("k", "v"):
        if found[name] != kind:
            raise InputError(
                name,
                f"expected q, k and v cut alike, got {q.placements[dim]} for q and "
                f"{(k if name == 'k' else v).placements[dim]} for {name} over mesh dimension {dim}; "
                f"redistribute() {name} first",
            )
    if kind == "heads" and kv_heads > 1:
        for name, count in (("q", q.shape[_AXES[spec.layout]["heads"]]), ("k", kv_heads)):
            if count % ranks:
                raise InputError(
                    name,
                    f"expected a number of heads that {ranks} ranks divide, so that each query head finds its KV head "
                    f"on its own rank; got {count}: redistribute() to Shard over the batch, or to Replicate()",
                )
    return kind


def _kind(name: str, x: Any, dim: int, axes: Mapping[str, int]) -> str:
    placement = x.placements[dim]
    if placement.is_replicate():
        return ""
    if type(placement).__name__ == "Shard":
        axis = placement.dim % x.dim()
        for kind, own in axes.items():
            if axis == own:
                return kind
    said = ", ".join(f"Shard({axis}) ({kind})" for kind, axis in axes.items())
    raise InputError(
        name,
        f"expected {said} or Replicate() over mesh dimension {dim}, got {placement}: attention is not whole on a rank; "
        "redistribute() it, or, for a sequence in parts, attend to each part of the keys with return_lse=True and join "
        "the results with merge_states",
    )


def _check_spec(spec: AttentionSpec, mesh: Any, by: list[str]) -> None:
    cut = [kind for dim, kind in enumerate(by) if kind and mesh.size(dim) > 1]
    if not cut:
        return
    if spec.dropout_p:
        raise InputError(
            "dropout_p", "expected 0 for sharded tensors: ranks would draw alike; call on to_local() tensors"
        )
    if any(isinstance(part, masks.Custom) for part in masks.walk(spec.mask)):
        raise InputError("mask", "Custom(mask_mod) may read batch and head, which a rank counts from 0; use Dense()")
    if "heads" in cut and isinstance(spec.sparsity, BigBird) and spec.sparsity.random_blocks:
        raise InputError("sparsity", "BigBird draws by head, which a rank counts from 0; shard the batch instead")


def _named_axes(spec: AttentionSpec, name: str, x: Tensor) -> dict[str, int]:
    """The axes of a named tensor that go with the batch and the heads."""
    if name in _PAIRS:
        return {"batch": x.dim() - 4, "heads": x.dim() - 3}
    if name == "alibi_slopes":
        return {"batch": x.dim() - 2, "heads": x.dim() - 1}
    if name in _BY_BATCH:
        return {"batch": 0}
    if name in _BY_HEAD:
        return {"heads": 0}
    if name in _BY_BOTH and not (x.numel() == 1 or (spec.dtype.scaling == "tensor" and name.endswith("descale"))):
        return {"batch": 0, "heads": 1}
    return {}


def _placements(x: Tensor, by: list[str], axes: Mapping[str, int]) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    out: list[Any] = []
    for kind in by:
        axis = axes.get(kind, -1)
        out.append(Shard(axis) if axis >= 0 and x.shape[axis] != 1 else Replicate())
    return out


def _local(x: Any, mesh: Any, by: list[str], axes: Mapping[str, int]) -> Tensor:
    """This rank's part of a tensor. Where a cut call shares it, its gradient is a sum over the ranks."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not _is_dtensor(x):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    wanted = _placements(x, by, axes)
    x = x if list(x.placements) == wanted else x.redistribute(mesh, wanted)
    if not x.dtype.is_floating_point:
        return x.to_local()  # type: ignore[no-any-return]  # torch has no types here
    grads = [Partial() if p.is_replicate() and kind else p for p, kind in zip(wanted, by, strict=True)]
    return x.to_local(grad_placements=grads)  # type: ignore[no-any-return]  # as above


def _whole(x: Tensor, mesh: Any, by: list[str], axes: Mapping[str, int], shape: tuple[int, ...]) -> Any:
    """A result's parts as one DTensor of its whole shape."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(axes[kind]) if kind and shape[axes[kind]] > 1 else Replicate() for kind in by]
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return DTensor.from_local(
        x.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(reversed(strides))
    )
