"""Tensor subclasses that other people write, for the tests of what a call's tensors may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["Counting", "Named", "Wrapped"]


class Named(Tensor):
    """A subclass with memory of its own that changes nothing."""


class Counting(Tensor):
    """A subclass that sees functions, and hands plain tensors on."""

    seen: list[str] = []  # noqa: RUF012 - one list for the class, on purpose

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():
            plain = tree_map(lambda x: x.as_subclass(Tensor) if isinstance(x, cls) else x, (args, kwargs or {}))
            return func(*plain[0], **plain[1])


class Wrapped(Tensor):
    """A wrapper without memory of its own: operators run on what it wraps."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))
