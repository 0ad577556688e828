"""Triton's interpreter without the work that it repeats or throws away; what computes stays Triton's own.

- At every call of a device function it looks through all of triton.language for operations to put its own in the place
  of, though the launch has put them there already. Here a launch searches each module once.
- Of every sum, difference and product of integers it asks, by a dozen interpreted operations, whether it overflows, and
  drops the answer unless all of Triton is in debug mode. Here NumPy asks, and an overflow of signed integers fails.
- It builds the table of NumPy's dtypes at every look into it. Here the answers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np

SEARCHED: set[ModuleType] = set()
"""Modules of triton.language that the launch at hand has searched."""


class OverflowedError(AssertionError):
    """Signed integers of a kernel left their range."""


def searching_once(search: Callable[..., Any]) -> Callable[..., Any]:
    """`interpreter._patch_lang` that does nothing where the launch has done it."""
    import triton.language as tl
    from triton.runtime import interpreter

    languages: dict[str, set[ModuleType]] = {}

    @wraps(search)
    def once(fn: Callable[..., Any]) -> Any:
        if fn.__module__ not in languages:
            modules = {value for value in fn.__globals__.values() if isinstance(value, ModuleType)}
            languages[fn.__module__] = modules & {tl, tl.core}
        mine = languages[fn.__module__]
        if mine and mine <= SEARCHED:
            return interpreter._LangPatchScope()
        SEARCHED.update(mine)
        return search(fn)

    return once


def check_overflow(left: Any, right: Any, operation: Callable[..., Any]) -> None:
    """Raise OverflowedError where a sum, difference or product of signed integers does not fit their type."""
    kind = left.dtype
    if kind.int_bitwidth >= 64 or not kind.is_int_signed():  # unsigned ones wrap by definition: hashes do
        return
    wide = getattr(np, {"add": "add", "sub": "subtract", "mul": "multiply"}[operation.__name__])
    found = wide(left.handle.data, right.handle.data, dtype=np.int64)
    limit = 1 << (kind.int_bitwidth - 1)
    if found.size and not (-limit <= found.min() and found.max() < limit):
        raise OverflowedError(f"{operation.__name__} of {kind} overflows: {found.min()} to {found.max()}")


@contextmanager
def quick() -> Iterator[None]:
    """Kernels that start inside run like this."""
    from triton.runtime import interpreter

    executor, semantic = interpreter.GridExecutor, interpreter.interpreter_semantic
    search, call, dtypes = interpreter._patch_lang, executor.__call__, interpreter._get_np_dtype

    overflow = semantic.binary_op_sanitize_overflow_impl
    known: dict[str, Any] = {}

    def kept(kind: Any) -> Any:
        if kind.name not in known:
            known[kind.name] = dtypes(kind)
        return known[kind.name]

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        SEARCHED.clear()  # the launch before has taken away what it put in place
        return call(self, *arguments, **named)

    interpreter._patch_lang, executor.__call__ = searching_once(search), launch  # type: ignore[method-assign]
    interpreter._get_np_dtype = kept
    semantic.binary_op_sanitize_overflow_impl = check_overflow
    try:
        yield
    finally:
        interpreter._patch_lang, executor.__call__ = search, call  # type: ignore[method-assign]
        interpreter._get_np_dtype = dtypes
        semantic.binary_op_sanitize_overflow_impl = overflow
