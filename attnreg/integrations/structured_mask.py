"""StructuredMask: a mask expression that stands where transformers' models expect a 4-D bool tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attnreg.errors import InputError
from attnreg.masks import Coords, Dense, Full, Mask, Padding

__all__ = ["StructuredMask", "check_sizes", "check_tensor"]


class _UnknownUseError(InputError, AttributeError):
    """Something was asked of the mask that has no exact answer; hasattr() may still ask for it."""


# What a bool tensor answers exactly as a model means it: reading, choosing and joining, and no arithmetic, which a
# model that expects 0 and -inf would do to ones and zeros.
METHODS = ("logical_not", "logical_and", "logical_or", "logical_xor", "size", "dim")
OPERATORS = ("and", "rand", "or", "ror", "xor", "rxor", "invert", "eq", "ne")
FUNCTIONS = frozenset(
    {
        "where", "masked_fill", "masked_fill_", "all", "any", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not",
        "cat", "concat", "stack", "pad", "eq", "ne", "scaled_dot_product_attention",
        "__getitem__", *METHODS, *(f"__{name}__" for name in OPERATORS),
    }
)  # fmt: skip
REFUSED = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow",
    "rpow", "matmul", "rmatmul", "lshift", "rlshift", "rshift", "rrshift", "lt", "le", "gt", "ge", "neg", "pos", "abs",
    "setitem",
)  # fmt: skip

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class StructuredMask:
    """What the mask function hands to each layer: a mask expression with its tensors, instead of Sq x Skv bools.

    query_offset: where query row 0 stands on the keys' time line; an int, or a one-element tensor where a
    static cache keeps it on the device. device: where the bool tensor would lie.

    To a model that works on the mask before its layers do, it is that bool tensor: slices of four dimensions, `&`, `|`,
    `^`, `~`, `==` and functions such as torch.where and masked_fill give tensors. Anything else raises InputError.
    """

    mask: Mask
    tensors: dict[str, Tensor]
    query_offset: int | Tensor
    shape: tuple[int, int, int, int]
    device: torch.device = CPU
    dtype: torch.dtype = torch.bool

    @property
    def ndim(self) -> int:
        """4, as of the tensor that it stands for: transformers looks before it converts a 2-D mask."""
        return 4

    def contiguous(self) -> StructuredMask:
        """Itself: generate() asks this of every mask that it makes ahead for a static cache."""
        return self

    def __getitem__(self, index: Any) -> Tensor:
        """A slice. What has fewer dimensions a model goes on to count with (Longformer asks which are above 0)."""
        part = self.dense[index.dense if isinstance(index, StructuredMask) else index]
        if part.ndim != 4:
            _refuse(f"{part.ndim} dimensions")
        return part

    @property
    def dense(self) -> Tensor:
        """The bool tensor [B, 1, Sq, Skv] that it stands for, made when it is first asked for."""
        return self._bools() if torch.compiler.is_dynamo_compiling() else self._kept  # it cannot enter a cache's lock

    @functools.cached_property
    def _kept(self) -> Tensor:
        return self._bools()

    def _bools(self) -> Tensor:
        batch, heads, rows, keys = (torch.arange(n, device=self.device) for n in self.shape)
        b, h, i, j = batch[:, None, None, None], heads[:, None, None], rows[:, None], keys
        offset = self.query_offset
        p = i + (offset.to(self.device).reshape(-1) if isinstance(offset, Tensor) else offset)
        return self.mask.allows(Coords(b, h, i, p, j, self.tensors)).expand(self.shape)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", repr(function))
        if name not in FUNCTIONS:
            _refuse(f"{name}()")
        args, kwargs = tree_map_only(StructuredMask, lambda mask: mask.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(f".{name}")


def _refuse(what: str) -> NoReturn:
    raise _UnknownUseError(
        "attention_mask",
        f"the model uses {what} of its mask; attnreg hands it a mask expression, which answers as a bool tensor "
        "for dtype, device, shape, slices of four dimensions, &, |, ^, ~, ==, torch.where, masked_fill, cat, pad and "
        "logical_not. Use attn_implementation='eager' for this model",
    )


def _exact(name: str) -> Callable[..., Any]:
    return lambda mask, *others: getattr(mask.dense, name)(
        *(x.dense if isinstance(x, StructuredMask) else x for x in others)
    )


def _refused(name: str) -> Callable[..., Any]:
    return lambda mask, *others: _refuse(name)


for _name in (*METHODS, *(f"__{name}__" for name in OPERATORS)):
    setattr(StructuredMask, _name, _exact(_name))
for _name in REFUSED:
    setattr(StructuredMask, f"__{_name}__", _refused(f"__{_name}__"))


def check_sizes(made: StructuredMask, query: Tensor, skv: int) -> None:
    """The mask that `attention_mask` made is of this layer's batch, queries and keys."""
    batch, _, rows, keys = made.shape
    if keys != skv:
        raise InputError("attention_mask", f"made for {keys} keys, the layer has {skv}")
    if batch != query.shape[0] and batch != 1:
        raise InputError("attention_mask", f"made for a batch of {batch}, the layer has {query.shape[0]}")
    if rows != query.shape[2] and not (rows == 1 and _same_in_every_row(made.mask)):
        raise InputError("attention_mask", f"made for {rows} queries, the layer has {query.shape[2]}")


def _same_in_every_row(mask: Mask) -> bool:
    return all(isinstance(part, (Full, Padding, Dense)) for part in getattr(mask, "of", (mask,)))


def check_tensor(mask: Any, query: Tensor, skv: int) -> None:
    """A mask of the user's own, which may broadcast, and may be longer than the keys, as for a static cache."""
    if not isinstance(mask, Tensor):
        raise InputError("attention_mask", f"expected a 4-D tensor or what the mask interface made, got {type(mask)}")
    batch, heads, sq = query.shape[:3]
    want = f"[{batch} or 1, {heads} or 1, {sq} or 1, {skv} or 1] (batch, heads, queries, keys)"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise InputError(
            "attention_mask",
            f"expected bool (True = may attend) or floats that are added to the scores, {want}; got {mask.dtype}",
        )
    if mask.ndim != 4:
        raise InputError("attention_mask", f"expected {want}, got {list(mask.shape)}")
    fits = all(have == size or have == 1 for have, size in zip(mask.shape[:3], (batch, heads, sq), strict=True))
    if not fits or (mask.shape[3] < skv and mask.shape[3] != 1):
        raise InputError("attention_mask", f"expected {want}, got {list(mask.shape)}")
