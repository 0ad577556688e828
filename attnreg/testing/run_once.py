"""Run a candidate once on given inputs, with memory poisoned before it and its inputs watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.testing.inputs import Inputs

__all__ = ["Outcome", "Refused", "Watch", "check_memory", "heap_poison", "poisoned_allocations", "run_once"]


class Refused(Exception):  # noqa: N818  # a verdict on a candidate, not an error of this program
    """Why the candidate fails the gate."""


@dataclass(frozen=True)
class Outcome:
    """What a run gave. grads: by name, None where the candidate says that nothing depends on the leaf."""

    out: Tensor
    lse: Tensor | None
    grads: dict[str, Tensor | None]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the outcome, by name."""
        grads = {f"grad of {n}": g for n, g in self.grads.items() if g is not None}
        return {"out": self.out, **({} if self.lse is None else {"lse": self.lse}), **grads}


def run_once(run: Callable[..., Any], inputs: Inputs, grad_out: Tensor, grad_lse: Tensor | None) -> Outcome:
    """One forward pass, and one backward pass where the inputs have leaves. Raises Refused on a wrong form."""
    generator = inputs.tensors.get("generator")
    if generator is not None:
        generator.manual_seed(inputs.seed)
    result = run(inputs.q, inputs.k, inputs.v, **inputs.tensors)
    out, lse = _form(inputs, result)
    leaves = inputs.leaves
    grads: dict[str, Tensor | None] = {}
    if leaves:
        if not out.requires_grad:
            raise Refused(f"the output does not require a gradient, though {', '.join(leaves)} do")
        outputs, weights = [out], [grad_out]
        if lse is not None and grad_lse is not None:
            if not lse.requires_grad:
                raise Refused("lse does not require a gradient: lse must be differentiable")
            outputs.append(lse)
            weights.append(grad_lse)
        before = [(x.clone(), x._version) for x in weights]
        given = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        for name, x, (values, version) in zip(("out", "lse"), weights, before, strict=False):
            if x._version != version or not torch.equal(x, values):  # other branches of the graph receive it too
                raise Refused(f"the upstream gradient of {name} was changed")
        for (name, leaf), grad in zip(leaves.items(), given, strict=True):
            grads[name] = grad
            if grad is not None and (grad.shape != leaf.shape or grad.dtype != leaf.dtype):
                raise Refused(
                    f"grad of {name}: expected {leaf.dtype} {list(leaf.shape)}, got {grad.dtype} {list(grad.shape)}"
                )
    return Outcome(out.detach(), None if lse is None else lse.detach(), grads)


def _form(inputs: Inputs, result: Any) -> tuple[Tensor, Tensor | None]:
    """The result as (out, lse), or Refused where type, shape, dtype or device is not what the spec says."""
    p, spec, lse = inputs.problem, inputs.problem.spec, None
    if spec.return_lse:
        if not isinstance(result, tuple) or len(result) != 2:
            raise Refused(f"return_lse=True: expected (out, lse), got {type(result).__name__}")
        result, lse = result
    if not isinstance(result, Tensor):
        raise Refused(f"out: expected a tensor, got {type(result).__name__}")
    shape = (*inputs.q.shape[:-1], p.head_dim_v)
    _expect("out", result, shape, p.out_dtype, inputs.q.device)
    if lse is not None:
        rows = tuple(inputs.q.shape[:-1])
        rows = {"bhsd": rows, "bshd": (rows[0], *reversed(rows[1:])), "thd": tuple(reversed(rows))}[spec.layout]
        if not isinstance(lse, Tensor):
            raise Refused(f"lse: expected a tensor, got {type(lse).__name__}")
        _expect("lse", lse, rows, torch.float32, inputs.q.device)
    return result, lse


def check_memory(inputs: Inputs, outcome: Outcome, before: Outcome) -> None:
    """Raise Refused where a result lies in the memory of an input, or of a result of the run before, still in use."""
    every = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.tensors}
    taken = {_address(x): f"{name} of the run before" for name, x in before.tensors.items() if x.numel()}
    taken |= {_address(x): name for name, x in every.items() if isinstance(x, Tensor) and x.numel()}
    for name, x in outcome.tensors.items():
        if x.numel() and _address(x) in taken:
            raise Refused(f"{name} shares its memory with {taken[_address(x)]}")


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _expect(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(x.shape) != shape:
        raise Refused(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise Refused(f"{name}: expected dtype {dtype}, got {x.dtype}")
    if x.device != device:
        raise Refused(f"{name}: expected device {device}, got {x.device}")


class Watch:
    """Remembers the inputs' whole storage and version counters, and says which of them changed."""

    def __init__(self, inputs: Inputs) -> None:
        every = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.tensors}
        self.tensors = {name: x for name, x in every.items() if isinstance(x, Tensor)}
        self.bytes = {name: _storage(x).clone() for name, x in self.tensors.items()}
        self.versions = {name: x._version for name, x in self.tensors.items()}

    def check(self) -> None:
        """Raise Refused if an input is not what it was."""
        for name, x in self.tensors.items():
            if not torch.equal(_storage(x), self.bytes[name]):
                raise Refused(f"the input {name} was changed")
            if x._version != self.versions[name]:
                raise Refused(f"the input {name} was written to in place, though its values are the same")


def _storage(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def heap_poison(inputs: Inputs, value: float) -> None:
    """Fill freshly freed memory of the results' sizes, so that an allocator which reuses it hands out `value`."""
    p = inputs.problem
    rows = inputs.q.numel() // max(p.head_dim, 1)
    sizes = {(rows * p.head_dim_v, p.out_dtype), (rows * p.head_dim_v, torch.float32), (rows, torch.float32)}
    sizes |= {(x.numel(), x.dtype) for x in inputs.leaves.values()}
    held = [
        torch.empty(count, dtype=dtype, device=inputs.q.device).fill_(value)
        for count, dtype in sizes
        for _ in range(3)
        if count * 16 < 1 << 30
    ]
    del held


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Everything that torch allocates uninitialised is NaN inside the block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # torch has no stub for it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # as above
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]  # as above
