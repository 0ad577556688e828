"""Triton's interpreter without the work that it repeats or throws away; what computes stays Triton's own.

- At every call of a device function it looks through all of triton.language for operations to put its own in the place
  of, though the launch has put them there already. Here a launch searches each module once.
- Of every sum, difference and product of integers it asks, by a dozen interpreted operations, whether it overflows, and
  drops the answer unless all of Triton is in debug mode. Here NumPy asks, and an overflow of signed integers fails.
- It builds the table of NumPy's dtypes at every look into it. Here the answers are kept.
- It describes every value anew: a list of sizes, each a constant that has a type of its own, once for the value and
  once for its type. Here values of one shape share one description. It also compares and indexes such lists by
  wrapping each number up; here numbers are compared as numbers.
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
            return getattr(interpreter, "_LangPatchScope", lambda: None)()  # Triton 3.5 has none, and asks for none
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


def described_once(describe: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__` that checks and describes a shape of an element type once."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    @wraps(describe)
    def once(self: Any, element: Any, shape: Any) -> None:
        key = (element.name, *shape)
        if key not in known:
            describe(self, element, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key], element_ty=element)

    return once


def shaped_once(fill: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__` that takes the constants of a shape from the first value that had it."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @wraps(fill)
    def once(self: Any, handle: Any, kind: Any) -> None:
        shape = tuple(kind.shape) if kind.is_block() else ()
        if shape in known:
            self.handle, self.type, self.dtype = handle, kind, kind.scalar
            self.numel, self.shape = known[shape]
        else:
            fill(self, handle, kind)
            known[shape] = self.numel, self.shape

    return once


def compared_as_numbers(equal: Callable[..., Any], constant: Callable[[bool], Any]) -> Callable[..., Any]:
    """`tuple.__eq__` that wraps nothing up where the other side holds plain integers."""

    @wraps(equal)
    def plain(self: Any, other: Any) -> Any:
        values = getattr(other, "values", other)
        if isinstance(values, (list, tuple)) and all(type(value) is int for value in values):
            return constant(self.values == list(values))
        return equal(self, other)

    return plain


def indexed_by_number(take: Callable[..., Any]) -> Callable[..., Any]:
    """`tuple.__getitem__` that wraps no integer up."""

    @wraps(take)
    def plain(self: Any, index: Any) -> Any:
        return self.values[index] if type(index) is int else take(self, index)

    return plain


@contextmanager
def light_descriptions() -> Iterator[None]:
    """Types and values that are made inside share the descriptions of their shapes."""
    from triton.language import core

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (core.block_type, "__init__", described_once(core.block_type.__init__)),
        (core.tensor, "__init__", shaped_once(core.tensor.__init__)),
        (core.tuple, "__eq__", compared_as_numbers(core.tuple.__eq__, core.constexpr)),
        (core.tuple, "__getitem__", indexed_by_number(core.tuple.__getitem__)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, changed in changes:
            setattr(owner, name, changed)
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)


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
        with light_descriptions():
            yield
    finally:
        interpreter._patch_lang, executor.__call__ = search, call  # type: ignore[method-assign]
        interpreter._get_np_dtype = dtypes
        semantic.binary_op_sanitize_overflow_impl = overflow
