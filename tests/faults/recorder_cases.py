"""Calls to record, with a definition of their own in float64, and the recorders that torch has."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnreg
from attnreg import AttentionSpec, masks

B, H, HKV, D = 2, 4, 2, 8
CAUSAL = masks.Causal()
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A spec, the names of its tensors, and which pairs attend by sizes and those tensors: [B, 1, Sq, Skv]."""

    spec: AttentionSpec
    allowed: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
    names: tuple[str, ...] = ()
    sizes: tuple[int, int] = (11, 13)
    make: Callable[[int, int, int], dict[str, Tensor]] = field(default=lambda seed, sq, skv: {})


def _causal(i: Tensor, j: Tensor, named: dict[str, Tensor]) -> Tensor:
    return j <= i


CASES = {
    "causal": Case(AttentionSpec(mask=CAUSAL), _causal),
    "window_softcap_bshd": Case(
        AttentionSpec(mask=CAUSAL & masks.SlidingWindow(4), softcap=2.0, layout="bshd"),
        lambda i, j, named: (j <= i) & (j >= i - 4),
    ),
    "padding": Case(
        AttentionSpec(mask=masks.Padding(), align="top_left"),
        lambda i, j, named: (j < named["kv_lengths"].view(-1, 1, 1, 1)) & (i == i),
        ("kv_lengths",),
        make=lambda seed, sq, skv: {"kv_lengths": torch.tensor([skv - seed % 3, skv - 4 - seed % 2])},
    ),
    "bias": Case(
        AttentionSpec(bias=True),
        lambda i, j, named: (j == j) & (i == i),
        ("bias",),
        make=lambda seed, sq, skv: {"bias": _noise(seed + 7, 1, H, sq, skv)},
    ),
}  # fmt: skip


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(case: Case, seed: int, sizes: tuple[int, int] | None = None, batch: int = B) -> list[Tensor]:
    """q, k, v and the named tensors in the order of case.names."""
    sq, skv = sizes or case.sizes
    made = [_noise(seed * 9 + n, batch, h, s, D) for n, (h, s) in enumerate(((H, sq), (HKV, skv), (HKV, skv)))]
    if case.spec.layout == "bshd":
        made = [x.transpose(1, 2).contiguous() for x in made]
    named = case.make(seed, sq, skv)
    return [*made, *(named[name] for name in case.names)]


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
    """Attention by its definition in float64, out in the call's layout."""
    spec, named = case.spec, dict(zip(case.names, tensors, strict=True))
    if spec.layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = q.double(), *(x.double().repeat_interleave(H // HKV, 1) for x in (k, v))
    s = q @ k.mT / D**0.5
    s = spec.softcap * torch.tanh(s / spec.softcap) if spec.softcap else s
    s = s + named["bias"].double() if "bias" in named else s
    sq, skv = s.shape[-2:]
    i = torch.arange(sq).view(1, 1, -1, 1) + (0 if spec.align == "top_left" else skv - sq)
    live = case.allowed(i, torch.arange(skv).view(1, 1, 1, -1), named)
    out = torch.softmax(torch.where(live, s, -torch.inf), -1) @ v
    return out.transpose(1, 2) if spec.layout == "bshd" else out


def attend(case: Case) -> Function:
    """Through attention()."""

    def call(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        return attnreg.attention(case.spec, q, k, v, **dict(zip(case.names, tensors, strict=True)))

    return call


def prepared(case: Case, grad: bool = False) -> Function:
    """Through a callable that is prepared now."""
    q, k, v, *tensors = inputs(case, 0)
    leaves = [x.requires_grad_(grad) for x in (q, k, v)]
    run = attnreg.prepare(case.spec, *leaves, **dict(zip(case.names, tensors, strict=True)))

    def call(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        return run(q, k, v, **dict(zip(case.names, tensors, strict=True)))

    return call


def merged(case: Case) -> Function:
    """Through merge_states of the call and of one whose keys are seen as often again: the same output."""
    spec = case.spec.model_copy(update={"return_lse": True})

    def call(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        named = dict(zip(case.names, tensors, strict=True))
        first, second = (attnreg.attention(spec, q, k, v, **named) for _ in range(2))
        return attnreg.merge_states([first, second], layout=spec.layout)[0]

    return call


ENTRIES: dict[str, Callable[..., Function]] = {"attention": attend, "prepared": prepared, "merged": merged}


class Layer(nn.Module):
    """A function as a module, between operations of torch."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        return self.function(q * 0.5, k, v, *tensors) * 3.0


def layer_reference(case: Case, *arguments: Tensor) -> Tensor:
    """What Layer gives."""
    q, *rest = arguments
    return reference(case, q * 0.5, *rest) * 3.0


class Log(TorchDispatchMode):
    """Notes the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    """Notes the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def by_make_fx(mode: str) -> Callable[[Function, list[Tensor]], Function]:
    def record(function: Function, arguments: list[Tensor]) -> Function:
        return make_fx(function, tracing_mode=mode)(*arguments)  # type: ignore[no-any-return]

    return record


def by_jit(function: Function, arguments: list[Tensor]) -> Function:
    return torch.jit.trace(AsModule(function), tuple(arguments), check_trace=False)  # type: ignore[no-any-return]


def by_jit_file(function: Function, arguments: list[Tensor]) -> Function:
    file = io.BytesIO()
    torch.jit.save(by_jit(function, arguments), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    return torch.jit.load(file)  # type: ignore[no-any-return, no-untyped-call]


class AsModule(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


def by_export(function: Function, arguments: list[Tensor]) -> Function:
    file = io.BytesIO()
    torch.export.save(torch.export.export(AsModule(function), tuple(arguments)), file)
    file.seek(0)
    return torch.export.load(file).module()


class Three(AsModule):
    """Of q, k and v: torch.fx takes no variable number of arguments."""

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return self.function(q, k, v)


class Four(AsModule):
    """Of q, k, v and a named tensor."""

    def forward(self, q: Any, k: Any, v: Any, named: Any) -> Any:
        return self.function(q, k, v, named)


for _module in (Three, Four):
    # Under postponed evaluation these are text, which the pickle of a graph of torch.fx cannot import.
    _module.forward.__annotations__.clear()


def by_fx(function: Function, arguments: list[Tensor]) -> Function:
    return torch.fx.symbolic_trace((Three if len(arguments) == 3 else Four)(function))


def by_functionalize(function: Function, arguments: list[Tensor]) -> Function:
    return make_fx(torch.func.functionalize(function))(*arguments)  # type: ignore[no-any-return]


def by_fake_proxy(function: Function, arguments: list[Tensor]) -> Function:
    """make_fx of FakeTensors in a FakeTensorMode of the caller's."""
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in arguments]
        return make_fx(function)(*fakes)  # type: ignore[no-any-return]


def by_compile(function: Function, arguments: list[Tensor]) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


RECORDERS: dict[str, Callable[[Function, list[Tensor]], Function]] = {
    "make_fx_real": by_make_fx("real"),
    "make_fx_fake": by_make_fx("fake"),
    "make_fx_symbolic": by_make_fx("symbolic"),
    "jit": by_jit,
    "jit_file": by_jit_file,
    "export": by_export,
    "fx": by_fx,
    "functionalize": by_functionalize,
    "fake_proxy": by_fake_proxy,
    "compile": by_compile,
}


@contextlib.contextmanager
def on(backend: str | None) -> Iterator[None]:
    """Under use_backend, where a backend is named."""
    with attnreg.use_backend(backend) if backend else contextlib.nullcontext():
        yield
