"""attnreg's own torch operator: what a recorder keeps of a call that torch's operators cannot say.

`attnreg::attention` and its backward are defined when attnreg is imported, without loading a plugin, so a saved program
loads in any process that has imported attnreg. All that is no tensor travels as text: the spec, the names that need a
gradient, and the backend and configuration that were chosen. Where these cannot serve when the program runs, on another
machine or in another release, the choice is made anew there. New named tensors are added at the end of the schema's
optional arguments, so that saved programs stay valid.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnreg import hot, registry
from attnreg.autograd import Differentiable, Kernels
from attnreg.decide import decide
from attnreg.derivatives import NAMES, gradients_again
from attnreg.errors import BackendError, ConfigError, InputError
from attnreg.hardware import detect
from attnreg.problem import GRADS, Problem
from attnreg.registry import reasons_of, space_of
from attnreg.space import Config
from attnreg.spec import AttentionSpec
from attnreg.tracing import is_traced, transform, transformable
from attnreg.validate import FLOAT8, check

__all__ = ["Recorded", "recorded"]

TENSORS = (
    "attn_mask", "bias", "alibi_slopes", "sinks", "score_weight", "prefix_lengths", "global_mask", "document_ids",
    "kv_lengths", "query_offset", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k", "q_descale",
    "k_descale", "v_descale",
)  # fmt: skip
LENGTHS = ("max_seqlen_q", "max_seqlen_k")
FIELDS = ("q", "k", "v", *TENSORS, *LENGTHS)
TEXTS = ("spec", "grads", "backend", "config")
_CALL = ", ".join(
    [*("Tensor " + n for n in "qkv"), *(f"Tensor? {n}" for n in TENSORS), *(f"SymInt? {n}" for n in LENGTHS)]
)
_SAID = ", ".join(f"str {name}" for name in TEXTS)

_library: Any = torch.library.Library("attnreg", "DEF")  # type: ignore[no-untyped-call]  # torch has no types here
_library.define(f"attention({_CALL}, {_SAID}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"attention_backward({_CALL}, Tensor out, Tensor lse, Tensor low, Tensor dout, Tensor? dlse, {_SAID})"
    f" -> ({', '.join(['Tensor'] * len(NAMES))})"
)


def recorded(problem: Problem, backend: str, config: Config) -> Recorded:
    """For plugins: `run(q, k, v, **tensors)` of a traced problem as one operator, differentiable where it needs to be.

    When the operator runs, it calls what the backend of that name prepares for the same problem, untraced.
    """
    return Recorded(problem, backend, config)


class Recorded:
    """run(q, k, v, **tensors): one operator call."""

    def __init__(self, problem: Problem, backend: str, config: Config) -> None:
        text = problem.spec.model_dump_json(exclude_defaults=True)
        grads = ",".join(name for name in NAMES if name in problem.grads)
        self._texts = (text, grads, backend, json.dumps(dict(config), sort_keys=True))
        self._return_lse = problem.spec.return_lse
        # What cannot be built is found out now, while another backend can be taken.
        registry.current().get(backend).backend.prepare(replace(problem, traced=False), config)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        if tensors.get("generator") is not None:
            raise InputError("generator", "a recorded call cannot carry one; seed torch's own random numbers instead")
        out, lse, _ = _attend(q, k, v, *(tensors.get(name) for name in FIELDS[3:]), *self._texts)
        return (out, lse) if self._return_lse else out


@functools.lru_cache(maxsize=1024)
def _spec(text: str) -> AttentionSpec:
    spec: AttentionSpec = AttentionSpec.model_validate_json(text)
    return spec


def _named(values: tuple[Any, ...]) -> dict[str, Any]:
    """The named tensors and lengths that were given, of an operator's arguments."""
    return {name: x for name, x in zip(FIELDS[3:], values[3:], strict=True) if x is not None}


def _kernels(values: tuple[Any, ...], spec: AttentionSpec, texts: tuple[str, str, str]) -> Kernels:
    """What computes the call: by the recorded backend where it can, else by the one that is chosen now."""
    q, k, v, named = *values[:3], _named(values)
    table = hot.table()
    key = (hot.exact_key(spec, q, k, v, named), v.dtype, k.device, v.device, texts)
    found: Kernels | None = table.recorded.get(key)
    if found is None:
        grads, backend, config = texts
        problem = Problem.of(spec, check(spec, q, k, v, named), q, k, v, named)
        problem = replace(problem, grads=frozenset(filter(None, grads.split(",")))).bucket()
        found = table.recorded.get((problem, backend, config))
        if found is None:
            run = _prepared(problem, backend, json.loads(config))
            kernels = run.kernels if isinstance(run, Differentiable) else run
            made: Any = kernels if hasattr(kernels, "compute") else _Composed(problem, run)
            found = made
            table.recorded[(problem, backend, config)] = found
        table.recorded[key] = found
    assert found is not None, "just made"
    return found


def _prepared(problem: Problem, backend: str, config: Config) -> Callable[..., Any]:
    hardware, entry = detect(problem.device), registry.current().entries.get(backend)
    if entry is not None and not reasons_of(entry.backend, problem, hardware):
        space = space_of(entry.backend, problem, hardware)
        try:
            fits = space.check(config)
        except ConfigError:  # of another machine or release
            fits = space.check({})
        return entry.backend.prepare(problem, fits)
    made = decide(problem, hardware)
    return registry.current().get(made.backend).backend.prepare(problem, made.config)


class _Composed:
    """Kernels of a backend that consists of torch's operators: its backward pass makes the forward again."""

    def __init__(self, problem: Problem, run: Callable[..., Any]) -> None:
        self._problem, self._run = problem, run

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.no_grad():
            out = self._run(q, k, v, **tensors)
        return (out[0], out[1], None) if isinstance(out, tuple) else (out, None, None)

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        tensors: Mapping[str, Any],
        results: tuple[Tensor, Tensor, Tensor | None],
        upstream: tuple[Tensor, Tensor | None],
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        given = {**dict(zip("qkv", inputs, strict=True)), **tensors}
        leaves = {name: given[name].detach().requires_grad_() for name in sorted(wanted)}
        given |= leaves
        with torch.enable_grad():
            out = self._run(given.pop("q"), given.pop("k"), given.pop("v"), **given)
        both = out if isinstance(out, tuple) else (out,)
        pairs = [(y, g) for y, g in zip(both, upstream, strict=False) if g is not None and y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    values, (text, grads, backend, config) = arguments[: len(FIELDS)], arguments[len(FIELDS) :]
    spec, (q, k, v) = _spec(text), values[:3]
    kernels = _kernels(values, spec, (grads, backend, config))
    out, lse, low = kernels.compute(q, k, v, _named(values), bool(grads))
    # Dense results of the promised shapes, each with memory of its own.
    lse_shape, low_shape = _row_shapes(q, spec, grads)
    lse = q.new_zeros(lse_shape, dtype=torch.float32) if lse is None else lse.contiguous()
    low = q.new_zeros(low_shape, dtype=torch.float32) if low is None else low.contiguous()
    return out.contiguous(), lse, low


def _row_shapes(q: Tensor, spec: AttentionSpec, grads: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of lse and low: one number a row and head where somebody reads them, else none."""
    *batch, a, b = q.shape[:-1]
    rows = (*batch, a, b) if spec.layout == "bhsd" else (*batch, b, a)
    return rows if grads or spec.return_lse else (0,), rows if grads else (0,)


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v, (text, grads, *_) = arguments[0], arguments[2], arguments[len(FIELDS) :]
    spec = _spec(text)
    dtype = torch.bfloat16 if q.dtype in FLOAT8 else q.dtype
    lse, low = (q.new_empty(shape, dtype=torch.float32) for shape in _row_shapes(q, spec, grads))
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype), lse, low


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    values, rest = arguments[: len(FIELDS)], arguments[len(FIELDS) :]
    out, lse, low, dout, dlse, text, grads, backend, config = rest
    q, k, v = values[:3]
    kernels = _kernels(values, _spec(text), (grads, backend, config))
    wanted = frozenset(filter(None, grads.split(",")))
    with _autograd():
        found = kernels.gradients((q, k, v), _named(values), (out, lse, low), (dout, dlse), wanted)
    return tuple(found[n].contiguous() if n in wanted else out.new_empty(0) for n in NAMES)


_OUTSIDE = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def _autograd() -> Any:
    """Autograd as it is outside of an operator, inside of which torch turns it off."""
    return torch._C._ForceDispatchKeyGuard(*_OUTSIDE)


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(FIELDS, arguments, strict=False))
    wanted = arguments[-3].split(",")
    return tuple(given[n].new_empty(given[n].shape) if n in wanted else given["q"].new_empty(0) for n in NAMES)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values = inputs[: len(FIELDS)]
    ctx.texts = inputs[len(FIELDS) :]
    ctx.set_materialize_grads(False)
    ctx.lengths = values[-len(LENGTHS) :]
    ctx.save_for_backward(*values[: -len(LENGTHS)], *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *values, out, lse, low = ctx.saved_tensors
    nothing = (None,) * (len(FIELDS) + len(TEXTS))
    if dout is None and dlse is None:
        return nothing
    values += ctx.lengths
    needs = [name for name in NAMES if ctx.needs_input_grad[FIELDS.index(name)]]
    if torch.is_grad_enabled() and transform() is None and not is_traced(*values, out, dout, dlse):
        spec, (q, k, v), named = _spec(ctx.texts[0]), values[:3], _named(tuple(values))
        problem = Problem.of(spec, check(spec, q, k, v, named), q, k, v, named)
        given = {"q": q, "k": k, "v": v, **named}
        gradients: Mapping[str, Tensor] = gradients_again(problem, given, (dout, dlse), needs)
    else:
        dout = torch.zeros_like(out) if dout is None else dout
        texts = (ctx.texts[0], ",".join(needs), *ctx.texts[2:])
        found = _gradients(*values, out, lse, low, dout, dlse, *texts)
        gradients = dict(zip(NAMES, found, strict=True))
    return (*(gradients[n] if n in needs else None for n in FIELDS), *(None,) * len(TEXTS))


def _never(ctx: Any, *upstream: Any) -> NoReturn:
    raise BackendError(
        "a recorded attention has a first derivative only; record it under use_backend('eager') for more"
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("attnreg::attention", _forward_shapes, lib=_library)
torch.library.register_fake("attnreg::attention_backward", _backward_shapes, lib=_library)
torch.library.register_autograd("attnreg::attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("attnreg::attention_backward", _never, setup_context=_save_nothing, lib=_library)

_attend = transformable(torch.ops.attnreg.attention, _save, _differentiate)
_gradients = transformable(torch.ops.attnreg.attention_backward, _save_nothing, _never)
assert frozenset(GRADS) <= frozenset(TENSORS)
