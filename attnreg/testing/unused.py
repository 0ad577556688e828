"""Which slots of a call are not used, and the flavour "unused" that fills them with NaN and infinities.

Not used are, whatever they hold:

- keys at or behind `seqused_k`, and at or behind `kv_lengths` where the mask lets no query attend such a key
  (`Padding()`, alone or joined by `&`);
- pages that no entry in use names, and the rest of a page behind the length;
- packed rows that belong to no sequence;
- what named tensors hold for such keys: columns of a bias, entries of a dense mask, flags of `global_mask` and
  `document_ids` (where no query stands there, which is so under bottom_right), and factors of blocks of `k_descale`
  and `v_descale` in which no key is used.

Their meaning is written down here and not taken from `masks`, as the oracle's is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import masks
from attnreg.problem import Problem
from attnreg.spec import AttentionSpec
from attnreg.testing.quantised import block_size, largest
from attnreg.testing.sequences import Shape, as_rows, from_rows, key_rows, shapes

__all__ = ["fill_unused", "has_unused", "keys_used"]


def has_unused(problem: Problem) -> bool:
    """May inputs of the problem hold slots that are not used?"""
    told = problem.info("seqused_k") is not None or "seqused_k" in problem.spec.tensors()
    return problem.spec.page_size is not None or told or _bounded(problem.spec.mask, True)


def keys_used(spec: AttentionSpec, one: Shape, tensors: Mapping[str, Any]) -> int:
    """How many keys of a sequence are used."""
    lengths = tensors.get("kv_lengths")
    if lengths is None or not _bounded(spec.mask, True):
        return one.used
    return min(one.used, int(lengths[one.b]))


def _bounded(mask: masks.Mask, said: bool) -> bool:
    """Does the mask come out as not `said` for every pair whose key lies behind the lengths?"""
    match mask:
        case masks.Padding():
            return said
        case masks.Not(of=inner):
            return _bounded(inner, not said)
        case masks.And(of=parts):
            return any(_bounded(m, True) for m in parts) if said else all(_bounded(m, False) for m in parts)
        case masks.Or(of=parts):
            return all(_bounded(m, True) for m in parts) if said else any(_bounded(m, False) for m in parts)
    return False


def fill_unused(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """k, v and the named tensors with NaN, and infinities in every third row, wherever a slot is not used.

    A dtype without NaN gets its largest value.
    """
    spec = p.spec
    every = shapes(spec, q, k, tensors)
    k_rows, v_rows = as_rows(spec, k).clone(), as_rows(spec, v).clone()
    used = torch.zeros(k_rows.shape[0], dtype=torch.bool, device=k.device)
    for one in every:
        used[key_rows(spec, one, k, tensors)[: keys_used(spec, one, tensors)]] = True
    for rows in (k_rows, v_rows):
        _spoil(rows, ~used)
    counts = [keys_used(spec, one, tensors) for one in every]
    named = {name: _named(spec, name, x, counts, every) for name, x in tensors.items()}
    return from_rows(spec, k_rows, k).contiguous(), from_rows(spec, v_rows, v).contiguous(), named


def _spoil(x: Tensor, where: Tensor) -> None:
    """Fill the entries of the first dimension that `where` says."""
    if x.dtype == torch.int8:
        x[where] = largest(x.dtype)
        return
    bad = torch.full(x.shape, torch.nan, device=x.device)
    bad[::3] = torch.inf
    # float8 has no `where` of its own on every device; e4m3 has no infinity, and makes a NaN of it.
    mixed = torch.where(where.view(-1, *(1,) * (x.dim() - 1)), bad.double(), x.double())
    x.copy_(mixed.to(x.dtype) if x.dtype != torch.float8_e4m3fn else mixed.nan_to_num(torch.nan, torch.nan).to(x.dtype))


def _named(spec: AttentionSpec, name: str, x: Any, counts: list[int], every: list[Shape]) -> Any:
    """A named tensor with something else at the keys that nobody uses."""
    if not isinstance(x, Tensor) or not counts or x.dim() == 0:
        return x
    if name in ("bias", "attn_mask"):
        if x.shape[-1] < 2:
            return x
        return _columns(x, counts, x.dim() == 4 and x.shape[0] > 1, torch.nan if name == "bias" else True)
    if name in ("global_mask", "document_ids") and spec.align == "bottom_right":
        return _columns(x, counts, True, True if name == "global_mask" else 1 << 30)
    if name in ("k_descale", "v_descale") and spec.dtype.scaling == "block" and x.dim() == 3:
        block = spec.page_size or block_size(max((one.longest for one in every), default=0), x.shape[-1])
        return _columns(x, [-(-count // block) for count in counts], x.shape[0] > 1, torch.nan)
    return x


def _columns(x: Tensor, counts: list[int], by_batch: bool, value: Any) -> Tensor:
    x = x.clone()
    if not by_batch:
        x[..., max(counts) :] = value
        return x
    for b, count in enumerate(counts):
        x[b, ..., count:] = value
    return x
