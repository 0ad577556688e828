"""The native kernels as torch operators, for calls that torch.compile, torch.export or torch.func trace.

All that is no tensor travels as text, the problem and the configuration, so that a graph which another process loads
means the same. A call that is not traced passes none of this: an operator in Python costs more than a short decode.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, transformable
from attnreg_cpu.gradient import NAMED as NAMED_GRADS
from attnreg_cpu.gradient import never
from attnreg_cpu.run import run_of

__all__ = ["Traced"]

NAMED = (
    "attn_mask", "bias", "alibi_slopes", "sinks", "score_weight", "prefix_lengths", "global_mask", "document_ids",
    "kv_lengths", "query_offset", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k", "q_descale",
    "k_descale", "v_descale",
)  # fmt: skip
LENGTHS = ("max_seqlen_q", "max_seqlen_k")
FIELDS = ("q", "k", "v", *NAMED, *LENGTHS)
BACKWARD = len(FIELDS) + 7  # arguments of the backward operator before lse_low
WANTED = ("q", "k", "v", *NAMED_GRADS)
"""What may need a gradient, in the order in which the backward operator returns it."""
CALL = ", ".join(
    [*("Tensor " + n for n in "qkv"), *("Tensor? " + n for n in NAMED), *("SymInt? " + n for n in LENGTHS)]
)

_library: Any = torch.library.Library("attnreg_cpu", "DEF")  # type: ignore[no-untyped-call]  # torch has no types here
_library.define(f"forward({CALL}, str problem, str config) -> (Tensor, Tensor)")
# The same for a problem that needs gradients, and what the rounding of lse left.
_library.define(f"forward_for_gradients({CALL}, str problem, str config) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward({CALL}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, str problem, str config, bool[6] wanted,"
    " Tensor? lse_low=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Traced:
    """run(q, k, v, **tensors) of one traced problem: one operator call, differentiable where the problem needs it."""

    def __init__(self, problem: Problem, config: Mapping[str, int | str | float | bool]) -> None:
        self._texts = (problem.key(), json.dumps(dict(config), sort_keys=True))
        self._attend = _attend_for_gradients if problem.needs_grad else _attend
        self._return_lse = problem.spec.return_lse
        _prepared(*self._texts)  # what cannot be built is found out now, while another backend can be taken

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        named = (tensors.get(name) for name in (*NAMED, *LENGTHS))
        out, lse, *_ = self._attend(q, k, v, *named, *self._texts)
        return (out, lse) if self._return_lse else out


@functools.lru_cache(maxsize=1024)
def _problem(text: str) -> Problem:
    return replace(Problem.from_json(json.loads(text)), traced=False)


@functools.lru_cache(maxsize=1024)
def _prepared(problem: str, config: str) -> Any:  # a forward-only path has no backward, and is never asked for one
    return run_of(_problem(problem), json.loads(config))


def _named(values: tuple[Any, ...]) -> dict[str, Any]:
    """The named tensors and lengths that were given, of an operator's arguments."""
    return {name: x for name, x in zip(FIELDS, values, strict=True) if x is not None and name not in ("q", "k", "v")}


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *values, problem, config = arguments
    run, (q, k, v) = _prepared(problem, config), values[:3]
    return _contiguous(q, run.compute(q, k, v, _named(tuple(values)))[:2])


def _contiguous(q: Tensor, results: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """What the operator promises: dense results, and an empty lse where the problem asks for none."""
    out, lse = results
    return out.contiguous(), lse if lse is not None else q.new_empty(0, dtype=torch.float32)


def _forward_for_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *values, problem, config = arguments
    out, lse, lse_low = _prepared(problem, config).compute(*values[:3], _named(tuple(values)))
    return out.contiguous(), lse, lse_low


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    *values, text, _ = arguments
    q, problem = values[0], _problem(text)
    out = q.new_empty(*q.shape[:-1], problem.head_dim_v, dtype=problem.out_dtype)
    if not (problem.needs_grad or problem.spec.return_lse):
        return out, q.new_empty(0, dtype=torch.float32)
    *batch, a, b = q.shape[:-1]
    return out, q.new_empty(*batch, *((a, b) if problem.spec.layout == "bhsd" else (b, a)), dtype=torch.float32)


def _forward_for_gradients_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _forward_shapes(*arguments)
    return out, lse, lse.new_empty(lse.shape)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *values, out, lse, dout, dlse, problem, config, wanted = arguments[:BACKWARD]
    run = _prepared(problem, config)
    # A graph that was saved when lse had no second word does without, as it did.
    results = (out, lse, *(arguments[BACKWARD:] or (torch.zeros_like(lse),)))
    found = run.backward(tuple(values[:3]), _named(tuple(values)), results, (dout, dlse), tuple(wanted[3:]))
    return tuple(values[0].new_empty(0) if x is None else x.contiguous() for x in found)


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    wanted = (True, True, True, *arguments[BACKWARD - 1][3:])
    given = dict(zip(FIELDS, arguments, strict=False))
    return tuple(
        given[name].new_empty(given[name].shape) if want else given["q"].new_empty(0)
        for name, want in zip(WANTED, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *values, ctx.problem, ctx.config = inputs
    ctx.set_materialize_grads(False)
    ctx.lengths = values[-2:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*values[:-2], *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    values, (out, lse, *low) = ctx.saved_tensors[: len(FIELDS) - 2], ctx.saved_tensors[len(FIELDS) - 2 :]
    nothing = (None,) * (len(FIELDS) + 2)
    if dout is None and dlse is None:
        return nothing
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = [ctx.needs_input_grad[FIELDS.index(name)] for name in WANTED]
    found = _gradients(*values, *ctx.lengths, out, lse, dout, dlse, ctx.problem, ctx.config, wanted, *low)
    gradients = {name: x for name, x, want in zip(WANTED, found, wanted, strict=True) if want}
    return (*(gradients.get(name) for name in FIELDS), None, None)


_library.impl("forward", _forward, "CPU")
_library.impl("forward_for_gradients", _forward_for_gradients, "CPU")
_library.impl("backward", _backward, "CPU")
torch.library.register_fake("attnreg_cpu::forward", _forward_shapes, lib=_library)
torch.library.register_fake("attnreg_cpu::forward_for_gradients", _forward_for_gradients_shapes, lib=_library)
torch.library.register_fake("attnreg_cpu::backward", _backward_shapes, lib=_library)
for _name in ("forward", "forward_for_gradients"):
    torch.library.register_autograd(f"attnreg_cpu::{_name}", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("attnreg_cpu::backward", never, lib=_library)

_attend = transformable(torch.ops.attnreg_cpu.forward, _save, _differentiate)
_attend_for_gradients = transformable(torch.ops.attnreg_cpu.forward_for_gradients, _save, _differentiate)
_gradients = transformable(torch.ops.attnreg_cpu.backward, lambda ctx, inputs, output: None, never)
