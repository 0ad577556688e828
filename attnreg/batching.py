"""vmap of a recorded call: one call, with the mapped dimension folded into the batch, where the layout has one.

Packed and paged layouts have none, tensors by head alone cannot differ by sample, and under dropout samples that share
a seed draw the same: such calls are made one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnreg.problem import GRADS
from attnreg.spec import AttentionSpec

__all__ = ["backward", "forward"]

BY_HEAD = ("sinks", "score_weight")
"""Named tensors without a batch."""

BROADCAST = ("bias", "attn_mask", "block_mask")
"""Right-aligned to [B, Hq, .., ..], where the batch may be 1 or missing."""

Dims = Mapping[str, int | None]
Out = tuple[Any, Any]


def forward(operator: Callable[..., Any], spec: AttentionSpec, size: int, given: dict[str, Any], dims: Dims) -> Out:
    """(results, mapped dimensions) of the forward operator. given, dims: its arguments and where each is mapped."""
    if not _folds(spec, given, dims):
        return _one_by_one(operator, size, given, dims)
    folded = _folded(spec, size, given, dims, ())
    results = operator(*folded.values())
    # What nobody reads has no rows.
    return tuple(x if x.dim() == 1 else _unfolded(x, size) for x in results), tuple(
        None if x.dim() == 1 else 0 for x in results
    )


def backward(operator: Callable[..., Any], spec: AttentionSpec, size: int, given: dict[str, Any], dims: Dims) -> Out:
    """The same for the operator of its gradients."""
    wanted = tuple(filter(None, given["grads"].split(",")))
    if not _folds(spec, given, dims) or set(wanted) & {"sinks", "score_weight", "alibi_slopes"}:
        return _one_by_one(operator, size, given, dims)
    found = operator(*_folded(spec, size, given, dims, wanted).values())
    out = []
    for name, x in zip(("q", "k", "v", *GRADS), found, strict=True):
        if name not in wanted:
            out.append(x.new_empty((size, 0)))
            continue
        grad, own = _unfolded(x, size), _sample(given[name], dims[name])
        if name in BROADCAST:
            if own.dim() < 4 or own.shape[0] == 1:
                grad = grad.sum(1, keepdim=True)
            grad = grad.reshape(size, *own.shape)
        out.append(grad)
    return tuple(out), (0,) * len(out)


def _folds(spec: AttentionSpec, given: Mapping[str, Any], dims: Dims) -> bool:
    if spec.layout == "thd" or spec.page_size is not None or spec.dropout_p:
        return False
    mapped = {name for name, dim in dims.items() if dim is not None}
    one_value = spec.dtype.scaling == "tensor" and mapped & {"q_descale", "k_descale", "v_descale"}
    return not mapped & set(BY_HEAD) and not one_value


def _one_by_one(operator: Callable[..., Any], size: int, given: Mapping[str, Any], dims: Dims) -> Out:
    results = [
        operator(*(x if dims.get(n) is None else x.select(dims[n], at) for n, x in given.items())) for at in range(size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _sample(x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.select(dim, 0)


def _folded(
    spec: AttentionSpec, size: int, given: Mapping[str, Any], dims: Dims, wanted: Sequence[str]
) -> dict[str, Any]:
    """The arguments of one call whose batch holds every sample's."""
    batch = _sample(given["q"], dims["q"]).shape[0]
    out = {}
    for name, x in given.items():
        dim = dims.get(name)
        if not isinstance(x, Tensor) or name in BY_HEAD or (x.dim() == 1 and x.shape[0] == 0):
            out[name] = x
        elif name in BROADCAST:
            own = 4 - (x.dim() - (dim is not None))
            shared = dim is None and (own or x.shape[0] == 1) and name not in wanted
            out[name] = x if shared else _fold(_padded(x, dim, own), size, batch)
        elif name == "alibi_slopes":
            if dim is None and x.dim() == 1:
                out[name] = x
            else:
                out[name] = _fold(_padded(x, dim, 2 - (x.dim() - (dim is not None))), size, batch)
        elif name.endswith("_descale") and (spec.dtype.scaling == "tensor" or (dim is None and x.shape[0] == 1)):
            out[name] = x
        else:
            out[name] = _fold(x.unsqueeze(0) if dim is None else x.movedim(dim, 0), size, batch)
    return out


def _padded(x: Tensor, dim: int | None, missing: int) -> Tensor:
    """[1 or samples, batch or 1, ...] with leading dimensions of 1 up to the full rank of a sample."""
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x[(slice(None), *(None,) * missing)]


def _fold(x: Tensor, size: int, batch: Any) -> Tensor:
    """[1 or samples, batch or 1, ...] -> [samples * batch, ...]."""
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _unfolded(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, x.shape[0] // size, *x.shape[1:])
