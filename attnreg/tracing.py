"""Tracing: is this call traced, what its symbolic sizes stand for, and how torch.compile sees it."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from attnreg.errors import AttnregError, InputError
from attnreg.operands import is_plain
from attnreg.validate import Sizes

__all__ = [
    "concrete",
    "hint",
    "is_jit_traced",
    "is_traced",
    "opaque",
    "opened_at_trace_time",
    "ordinary",
    "same",
    "transform",
    "transformable",
    "unrecorded",
]

F = TypeVar("F", bound=Callable[..., Any])


def _no_transform() -> None:
    return None


transform: Callable[[], object | None] = getattr(torch._C._functorch, "peek_interpreter_stack", _no_transform)
"""The innermost torch.func transform (vmap, grad, jvp) in force, or None."""

_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_jit_state: Callable[[], object | None] = torch._C._get_tracing_state
_set_jit_state: Callable[[Any], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]  # torch's stub lacks it


def ordinary() -> bool:
    """Does nobody watch the call: no transform, no mode, no torch.jit.trace, no level of forward-mode derivatives?

    Only then a call may run what an earlier one was given, without asking anew.
    """
    return (
        transform() is None
        and not _dispatch_modes()
        and not _function_modes()
        and _jit_state() is None
        and forward_ad._current_level < 0
    )


def is_jit_traced() -> bool:
    """Does torch.jit.trace record the call? It keeps torch's operators, and sizes are tensors meanwhile."""
    return _jit_state() is not None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Within the block torch.jit.trace records nothing and sizes are numbers."""
    state = _jit_state()
    if state is None:
        yield
        return
    _set_jit_state(None)
    try:
        yield
    finally:
        _set_jit_state(state)


def is_traced(*tensors: Any) -> bool:
    """Must the call consist of torch's operators: is it recorded, transformed, or made with tensors without memory?

    So it is under torch.compile, torch.export, make_fx, torch.jit.trace, any dispatch mode and a torch.func transform,
    and with FakeTensors and wrapper subclasses. Then values cannot be read, and sizes may be symbolic.
    """
    if transform() is not None or _dispatch_modes() or _jit_state() is not None:
        return True
    return any(isinstance(x, Tensor) and not is_plain(x) for x in tensors)


def concrete(sizes: Sizes) -> Sizes:
    """The sizes with each symbolic one replaced by its hint, without a guard: a choice must not recompile.

    A size without a hint (data-dependent) counts as 8192, torch's own fallback for such sizes.
    """
    values: dict[str, Any] = {f.name: hint(getattr(sizes, f.name)) for f in fields(Sizes)}
    return replace(sizes, **values)


def hint(size: Any) -> int:
    """What a size stands for: itself, or a symbolic size's example value. Never adds a guard."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.has_hint():
        return int(size.node.hint)
    return 8192


def same(a: Any, b: Any) -> bool:
    """Are two sizes equal whatever the symbols stand for? Never adds a guard."""
    if not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt):
        return bool(a == b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def opaque(function: F) -> F:
    """Let Dynamo put the call into its graph unseen; AOTAutograd then traces through what was chosen.

    So the decision, plain Python over sizes and tables, is taken once, at trace time, and leaves no guard. Dynamo
    replaces an error in it by a message on output types, so attnreg's own errors are told in a warning too.
    """

    @functools.wraps(function)
    def told(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except AttnregError as error:
            warnings.warn(
                f"attnreg: {error}\n(so torch.compile cannot take the call into its graph: under fullgraph=True it "
                "raises Unsupported, else it leaves the call out and makes it as it stands)",
                RuntimeWarning,
                stacklevel=2,
            )
            raise

    return torch._dynamo.nonstrict_trace(told)  # type: ignore[return-value]  # the wrapper keeps the signature


def opened_at_trace_time(module: dict[str, Any], name: str) -> Callable[[], bool]:
    """What a module calls, in compiled code, before its global function `name`: the first trace makes that opaque.

    Before it nobody needs torch._dynamo (and by it Triton). module: its globals().
    """
    plain = module[name]

    def opened() -> bool:
        if module[name] is plain:
            module[name] = opaque(plain)
        return True

    # As torch.compiler.assume_constant_result says it: Dynamo calls it for real and takes the result for a constant.
    opened._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return opened


def transformable(
    operator: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """The operator, for plugins: called as it is, and as an autograd.Function inside torch.func transforms.

    torch.func knows no rule for an operator with a Python backward (`torch.library.register_autograd`), but it does
    for a Function. save and differentiate are the setup_context and the backward that were registered for the
    operator, which takes positional arguments.
    """

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

    def call(*arguments: Any) -> Any:
        levels: Any = torch._C._functorch.get_interpreter_stack() if transform() is not None else ()
        kinds = {level.key().name for level in levels}
        if "Functionalize" not in kinds:
            return Function.apply(*arguments) if kinds else operator(*arguments)  # type: ignore[no-untyped-call]
        # functionalize has no rule for a Function, and needs none for an operator that changes nothing.
        if kinds - {"Functionalize", "Vmap"}:
            raise InputError(
                "functionalize",
                "torch has no rule for it together with grad or jvp around operators of others; leave "
                "it out, since make_fx and torch.compile functionalise by themselves, or make the call under "
                "attnreg.use_backend('eager')",
            )
        return operator(*arguments)

    return call
