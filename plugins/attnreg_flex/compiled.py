"""Compiled flex_attention functions: one for all calls that can share machine code, each with its own code object."""

from __future__ import annotations

import itertools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnreg import AttentionSpec
from attnreg_flex import mods

__all__ = ["Attend", "Blocks", "compiled", "sized"]

Blocks = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of partial blocks, then of full ones: how many a row has [b, h, nQ], and their columns [b, h, nQ, nKV]; int32.
Four tensors, since the generated code takes views of one storage for one argument."""
Attend = Callable[..., Any]
"""attend(q, k, v, blocks or None, named) -> output or (output, lse)."""

KEPT = 64
_kept: OrderedDict[Hashable, Attend] = OrderedDict()
_lock = threading.Lock()
_serial = itertools.count()


def compiled(
    spec: AttentionSpec, scale: float, block: tuple[int, int], *, grouped: bool, lse: bool, grad: bool, key: Hashable
) -> Attend:
    """The compiled function of a spec; `key` tells apart what needs code of its own. Compiles at its first call."""
    full_key = (spec, scale, block, grouped, lse, grad, key)
    with _lock:
        found = _kept.get(full_key)
        if found is not None:
            _kept.move_to_end(full_key)
            return found
        made = _build(spec, scale, block, grouped, lse, grad)
        _kept[full_key] = made
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
        return made


def _build(spec: AttentionSpec, scale: float, block: tuple[int, int], grouped: bool, lse: bool, grad: bool) -> Attend:
    changes = mods.changes_scores(spec)

    def flex(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, named: dict[str, Tensor]) -> Any:
        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return mods.mask_mod(spec, named, b, h, i, j)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return mods.score_mod(spec, named, score, b, h, i, j)

        block_mask = None
        if blocks is not None:
            lengths = (q.shape[2], k.shape[2])
            block_mask = BlockMask.from_kv_blocks(
                *blocks, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=lengths, compute_q_blocks=grad
            )
        got = flex_attention(
            q, k, v, score_mod=score_mod if changes else None, block_mask=block_mask, scale=scale,
            enable_gqa=grouped, return_aux=AuxRequest(lse=True) if lse else None,
        )  # fmt: skip
        return (got[0], got[1].lse) if isinstance(got, tuple) else got

    # Dynamo keeps what it compiled, and counts recompilations, by code object: a copy is a count of its own.
    code = flex.__code__.replace(co_name=f"flex_{next(_serial)}")
    own = types.FunctionType(code, flex.__globals__, code.co_name, flex.__defaults__, flex.__closure__)
    # dynamic=True would make symbols of the spec's own numbers too; `sized` says which sizes vary.
    run: Attend = torch.compile(own, fullgraph=True)
    return run


def sized(x: Tensor, *dims: int) -> Tensor:
    """A view of x of which those dimensions may vary from call to call, unless they are 1.

    A view, since the mark stays on the Python object and a caller's own compilation would see it.
    """
    view = x.view(x.shape)
    for dim in dims:
        if x.shape[dim] != 1:
            torch._dynamo.maybe_mark_dynamic(view, dim)
    return view
