"""Tracing: is this call traced, what its symbolic sizes stand for, and how torch.compile sees it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from attnreg.errors import AttnregError
from attnreg.validate import Sizes

__all__ = ["concrete", "hint", "is_traced", "opaque", "opened_at_trace_time", "same", "transform", "transformable"]

F = TypeVar("F", bound=Callable[..., Any])


PLAIN = (Tensor, torch.nn.Parameter)
"""Types that hold data of their own; whatever traces brings a subclass."""


def _no_transform() -> None:
    return None


transform: Callable[[], object | None] = getattr(torch._C._functorch, "peek_interpreter_stack", _no_transform)
"""The innermost torch.func transform (vmap, grad, jvp) in force, or None."""


def is_traced(*tensors: Tensor) -> bool:
    """Is the call traced by torch.compile, torch.export or make_fx, or inside a torch.func transform?

    Then tensors hold no data to read, or more than they show, and sizes may be symbolic.
    """
    if transform() is not None:
        return True
    return any(type(x) not in PLAIN and (is_fake(x) or _symbolic(x)) for x in tensors)


def _symbolic(x: Tensor) -> bool:
    return any(isinstance(n, torch.SymInt) for n in x.shape)


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
        return operator(*arguments) if transform() is None else Function.apply(*arguments)  # type: ignore[no-untyped-call]

    return call
