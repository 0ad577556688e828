"""attnreg's own torch operator: what a recorder keeps of a call that torch's operators cannot say.

`attnreg::attention` and its backward are defined when attnreg is imported, without loading a plugin, so a saved program
loads in any process that has imported attnreg. All that is no tensor travels as text: the spec, the names that need a
gradient, and the backend and configuration that were chosen. Where these cannot serve when the program runs, on another
machine or in another release, the choice is made anew there. A new named tensor goes to the end of the schema, where
all have a default, so that saved programs stay valid. The seed of dropout is drawn by an operator of torch's before
the call: a recorded program draws another at each run, and the backward pass gets that of its forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnreg import batching, counted, hot, registry
from attnreg.autograd import Differentiable, Kernels
from attnreg.decide import decide
from attnreg.derivatives import NAMES, draw_seed, gradients_again
from attnreg.errors import BackendError, ConfigError, InputError, SpecError
from attnreg.hardware import detect
from attnreg.problem import Problem
from attnreg.registry import reasons_of, space_of
from attnreg.schema import (
    BACKWARD,
    BACKWARD_SCHEMA,
    FORWARD,
    FORWARD_SCHEMA,
    LENGTHS,
    OPTIONAL,
    RESULTS,
    SAVED,
    TEXTS,
)
from attnreg.space import Config
from attnreg.spec import AttentionSpec, spec_of_text
from attnreg.tracing import is_traced, transform, transformable
from attnreg.validate import FLOAT8, check

__all__ = ["Recorded", "recorded"]

_library: Any = torch.library.Library("attnreg", "DEF")  # type: ignore[no-untyped-call]  # torch has no types here
_library.define(FORWARD_SCHEMA)
_library.define(BACKWARD_SCHEMA)


def recorded(problem: Problem, backend: str, config: Config) -> Recorded:
    """For plugins: `run(q, k, v, **tensors)` of a traced problem as one operator, differentiable where it needs to be.

    When the operator runs, it calls what the backend of that name prepares for the same problem, untraced.
    """
    return Recorded(problem, backend, config)


class Recorded:
    """run(q, k, v, **tensors): one operator call."""

    def __init__(self, problem: Problem, backend: str, config: Config) -> None:
        try:
            text = problem.spec.model_dump_json(exclude_defaults=True)
        except SpecError as error:
            raise SpecError(
                f"a recorded call carries its spec as text: {error}; under attnreg.use_backend('eager') make_fx, "
                "torch.export and torch.compile record the operators that such a mask consists of"
            ) from None
        grads = ",".join(name for name in NAMES if name in problem.grads)
        self._texts = (text, grads, backend, json.dumps(dict(config), sort_keys=True))
        self._return_lse = problem.spec.return_lse
        self._dropout = problem.spec.dropout_p > 0
        # What cannot be built is found out now, while another backend can be taken.
        registry.current().get(backend).backend.prepare(replace(problem, traced=False), config)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        if tensors.get("generator") is not None:
            raise InputError("generator", "a recorded call cannot carry one; seed torch's own random numbers instead")
        counted.register()
        named = {**tensors, "seed": draw_seed(q)} if self._dropout else tensors
        out, lse, _ = _attend(q, k, v, *self._texts, *(named.get(name) for name in OPTIONAL))
        return (out, lse) if self._return_lse else out


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """The named tensors and lengths that were given, of an operator's arguments."""
    return {name: given[name] for name in OPTIONAL if given.get(name) is not None}


def _kernels(given: Mapping[str, Any], spec: AttentionSpec, named: Mapping[str, Any]) -> Kernels:
    """What computes the call: by the recorded backend where it can, else by the one that is chosen now."""
    q, k, v = given["q"], given["k"], given["v"]
    grads, backend, config = texts = tuple(given[name] for name in TEXTS[1:])
    table = hot.table()
    key = (hot.exact_key(spec, q, k, v, named), v.dtype, k.device, v.device, texts)
    found: Kernels | None = table.recorded.get(key)
    if found is None:
        called = {name: x for name, x in named.items() if name != "seed"}
        problem = Problem.of(spec, check(spec, q, k, v, called), q, k, v, called)
        problem = replace(problem, grads=frozenset(filter(None, grads.split(",")))).bucket()
        found = table.recorded.get((problem, backend, config))
        if found is None:
            run = _prepared(problem, backend, json.loads(config))
            kernels = run.kernels if isinstance(run, Differentiable) else run
            made: Any = kernels if callable(getattr(kernels, "gradients", None)) else _Composed(run)
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

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def _again(self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The call; both passes draw the same dropout from the same seed."""
        named = dict(tensors)
        seed = named.pop("seed", None)
        if seed is not None:
            named["generator"] = torch.Generator(q.device).manual_seed(int(seed))
        out = self._run(q, k, v, **named)
        return out if isinstance(out, tuple) else (out, None)

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.no_grad():
            return (*self._again(q, k, v, tensors), None)

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
            both = self._again(given.pop("q"), given.pop("k"), given.pop("v"), given)
        reached = zip(both, upstream, strict=True)
        pairs = [(y, g) for y, g in reached if y is not None and g is not None and y.requires_grad]
        if not pairs:
            return {name: torch.zeros_like(x) for name, x in leaves.items()}
        found = torch.autograd.grad(
            [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = dict(zip(FORWARD, arguments, strict=False))
    q, grads, spec, named = given["q"], given["grads"], spec_of_text(given["spec"]), _named(given)
    kernels = _kernels(given, spec, named)
    out, lse, low = kernels.compute(q, given["k"], given["v"], named, bool(grads))
    # Dense results of the promised shapes, each with memory of its own.
    lse_shape, low_shape = _row_shapes(q, spec, grads)
    lse = q.new_zeros(lse_shape, dtype=torch.float32) if lse is None or lse_shape == (0,) else lse.contiguous()
    low = q.new_zeros(low_shape, dtype=torch.float32) if low is None or low_shape == (0,) else low.contiguous()
    return out.contiguous(), lse, low


def _row_shapes(q: Tensor, spec: AttentionSpec, grads: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of lse and low: one number a row and head where somebody reads them, else none."""
    *batch, a, b = q.shape[:-1]
    rows = (*batch, a, b) if spec.layout == "bhsd" else (*batch, b, a)
    return rows if grads or spec.return_lse else (0,), rows if grads else (0,)


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = dict(zip(FORWARD, arguments, strict=False))
    q, v = given["q"], given["v"]
    dtype = torch.bfloat16 if q.dtype in FLOAT8 else q.dtype
    shapes = _row_shapes(q, spec_of_text(given["spec"]), given["grads"])
    lse, low = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype), lse, low


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(BACKWARD, arguments, strict=False))
    q, k, v, out, lse, low, dout, dlse = (given[name] for name in BACKWARD[:8])
    spec, named, wanted = spec_of_text(given["spec"]), _named(given), frozenset(filter(None, given["grads"].split(",")))
    kernels = _kernels(given, spec, named)
    with _autograd():
        found = kernels.gradients((q, k, v), named, (out, lse, low), (dout, dlse), wanted)
    return tuple(found[n].contiguous() if n in wanted else out.new_empty(0) for n in NAMES)


_OUTSIDE = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def _autograd() -> Any:
    """Autograd as it is outside of an operator, inside of which torch turns it off."""
    return torch._C._ForceDispatchKeyGuard(*_OUTSIDE)


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(BACKWARD, arguments, strict=False))
    wanted = given["grads"].split(",")
    return tuple(given[n].new_empty(given[n].shape) if n in wanted else given["q"].new_empty(0) for n in NAMES)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = dict(zip(FORWARD, inputs, strict=False))
    ctx.said = {name: given.get(name) for name in (*TEXTS, *LENGTHS)}
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(given.get(name) for name in SAVED), *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    given = ctx.said | dict(zip((*SAVED, *RESULTS), ctx.saved_tensors, strict=True))
    asked = tuple(zip(FORWARD, ctx.needs_input_grad, strict=False))
    if dout is None and dlse is None:
        return (None,) * len(asked)
    needs = [name for name, need in asked if need and name in NAMES]
    tensors = [given[name] for name in (*SAVED, *RESULTS)]
    if torch.is_grad_enabled() and transform() is None and not is_traced(*tensors, dout, dlse):
        spec, (q, k, v), named = spec_of_text(given["spec"]), (given[n] for n in "qkv"), _named(given)
        called = {name: x for name, x in named.items() if name != "seed"}
        problem = Problem.of(spec, check(spec, q, k, v, called), q, k, v, called)
        again = {"q": q, "k": k, "v": v, **called}
        gradients: Mapping[str, Tensor] = gradients_again(problem, again, (dout, dlse), needs)
    else:
        unasked, given["grads"] = not given["grads"], ",".join(needs)
        if unasked:  # recorded without a gradient, so that what its backward pass reads was not kept
            with torch.no_grad():
                given |= dict(zip(RESULTS, torch.ops.attnreg.attention(*(given[n] for n in FORWARD)), strict=True))
        given |= {"dout": torch.zeros_like(given["out"]) if dout is None else dout, "dlse": dlse}
        found = _gradients(*(given[name] for name in BACKWARD))
        gradients = dict(zip(NAMES, found, strict=True))
    return tuple(gradients[name] if name in needs else None for name, _ in asked)


def _never(ctx: Any, *upstream: Any) -> NoReturn:
    raise BackendError(
        "a recorded attention has a first derivative only; record it under use_backend('eager') for more"
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    given, dims = dict(zip(FORWARD, arguments, strict=False)), dict(zip(FORWARD, in_dims, strict=False))
    return batching.forward(torch.ops.attnreg.attention, spec_of_text(given["spec"]), info.batch_size, given, dims)


def _batched_gradients(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    given, dims = dict(zip(BACKWARD, arguments, strict=False)), dict(zip(BACKWARD, in_dims, strict=False))
    operator = torch.ops.attnreg.attention_backward
    return batching.backward(operator, spec_of_text(given["spec"]), info.batch_size, given, dims)


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("attnreg::attention", _forward_shapes, lib=_library)
torch.library.register_fake("attnreg::attention_backward", _backward_shapes, lib=_library)
torch.library.register_autograd("attnreg::attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("attnreg::attention_backward", _never, setup_context=_save_nothing, lib=_library)
torch.library.register_vmap("attnreg::attention", _batched, lib=_library)
torch.library.register_vmap("attnreg::attention_backward", _batched_gradients, lib=_library)

_attend = transformable(torch.ops.attnreg.attention, _save, _differentiate)
_gradients = transformable(torch.ops.attnreg.attention_backward, _save_nothing, _never)
