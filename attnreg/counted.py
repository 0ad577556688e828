"""The floating-point operations of recorded calls, for torch.utils.flop_counter, which is loaded by who counts."""

from __future__ import annotations

import sys
from typing import Any

import torch

from attnreg.schema import FORWARD
from attnreg.spec import spec_of_text

__all__ = ["register"]


def register() -> None:
    """Tell FlopCounterMode, where it is loaded, what a recorded attention costs; counters that run learn it too."""
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    formulas = {torch.ops.attnreg.attention: _forward, torch.ops.attnreg.attention_backward: _backward}
    if torch.ops.attnreg.attention not in counter.flop_registry:
        counter.register_flop_formula(torch.ops.attnreg.attention)(_forward)
        counter.register_flop_formula(torch.ops.attnreg.attention_backward)(_backward)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        counting = getattr(mode, "counter", mode)
        if isinstance(counting, counter.FlopCounterMode):
            for operator in formulas:
                counting.flop_registry.setdefault(operator, counter.flop_registry[operator])


def _forward(q: Any, k: Any, v: Any, spec: str, *arguments: Any, out_shape: Any = None, **named: Any) -> int:
    """Both products over all pairs, as torch counts its own attention: masks do not count."""
    rows, heads, dim = _rows(q, spec)
    keys = _keys(k, spec, arguments, named)
    return 2 * rows * heads * keys * (dim + int(v[-1]))


def _backward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, low: Any, dout: Any, dlse: Any, spec: str, *arguments: Any,
    out_shape: Any = None, **named: Any,
) -> int:  # fmt: skip
    """Five products: the scores again, dP and dV of Dv columns each, dQ and dK of D columns each."""
    rows, heads, dim = _rows(q, spec)
    keys = _keys(k, spec, arguments, named)
    return 2 * rows * heads * keys * (3 * dim + 2 * int(v[-1]))


def _rows(q: Any, spec: str) -> tuple[int, int, int]:
    """Query rows of all sequences, heads, columns."""
    if len(q) == 3:
        return int(q[0]), int(q[1]), int(q[2])
    batch, a, b, dim = (int(n) for n in q)
    return (batch * b, a, dim) if spec_of_text(spec).layout == "bhsd" else (batch * a, b, dim)


def _keys(k: Any, spec: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Keys of a sequence: the bound where sequences are packed or paged."""
    said = spec_of_text(spec)
    if said.page_size is not None:
        table = named.get("block_table") or _at(arguments, "block_table")
        return int(table[1]) * said.page_size
    if said.layout == "thd":
        longest = named.get("max_seqlen_k") or _at(arguments, "max_seqlen_k")
        return int(longest or k[0])
    return int(k[2 if said.layout == "bhsd" else 1])


def _at(arguments: tuple[Any, ...], name: str) -> Any:
    place = FORWARD.index(name) - FORWARD.index("grads")
    return arguments[place] if place < len(arguments) else None
