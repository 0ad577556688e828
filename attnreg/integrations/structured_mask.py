"""StructuredMask: a mask expression that stands where transformers' models expect a 4-D mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from attnreg.errors import InputError
from attnreg.masks import Coords, Dense, Full, Mask, Padding

__all__ = ["MaskSlice", "StructuredMask", "check_sizes", "check_tensor"]


class _UnknownUseError(InputError, AttributeError):
    """Something was asked of the mask that has no exact answer; hasattr() may still ask for it."""


# What a bool tensor answers exactly as a model means it: reading, choosing and joining, and no arithmetic, which a
# model that expects 0 and -inf would do to ones and zeros.
METHODS = ("logical_not", "logical_and", "logical_or", "logical_xor", "size", "dim")
OPERATORS = ("and", "rand", "or", "ror", "xor", "rxor", "invert", "eq", "ne")
# What only moves, cuts or repeats values: the result is still a mask, and as careful about arithmetic.
SHAPING = (
    "view", "reshape", "expand", "expand_as", "unsqueeze", "squeeze", "transpose", "permute", "flatten", "repeat",
    "clone", "detach", "narrow", "select", "repeat_interleave",
)  # fmt: skip
FUNCTIONS = frozenset(
    {
        "where", "masked_fill", "masked_fill_", "all", "any", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not",
        "cat", "concat", "stack", "pad", "eq", "ne", "equal", "scaled_dot_product_attention",
        "__getitem__", *METHODS, *(f"__{name}__" for name in OPERATORS),
    }
)  # fmt: skip
ARITHMETIC = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow",
    "rpow", "matmul", "rmatmul", "lshift", "rlshift", "rshift", "rrshift", "lt", "le", "gt", "ge", "neg", "pos", "abs",
)  # fmt: skip

CPU = torch.device("cpu")


class _Mask:
    """What stands for a mask tensor and answers as `dense` does: all that floats answer, of bools what is exact."""

    dtype: torch.dtype = torch.bool

    @property
    def dense(self) -> Tensor:
        """The tensor that it stands for."""
        raise NotImplementedError

    def contiguous(self) -> Any:
        """Itself: generate() asks this of every mask that it makes ahead for a static cache."""
        return self

    def __getitem__(self, index: Any) -> Any:
        """A slice, which is a mask as well."""
        return self._still(self.dense[_plain(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        """For floats alone: what was handed out once is the mask from then on, written to or not."""
        if not self.dtype.is_floating_point:
            _refuse("__setitem__")
        self.dense[index] = value

    def _still(self, part: Tensor) -> Any:
        return part if self.dtype.is_floating_point else MaskSlice(part)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", repr(function))
        masks = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, _Mask)]
        bools = not all(mask.dtype.is_floating_point for mask in masks)
        if bools and name not in FUNCTIONS and name not in SHAPING:
            _refuse(f"{name}()")
        args, kwargs = tree_map_only(_Mask, lambda mask: mask.dense, (args, kwargs or {}))
        result = function(*args, **kwargs)
        return MaskSlice(result) if bools and name in SHAPING else result

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """On another device; as another type where the mask is floats, which a model's own code converts."""
        if not self.dtype.is_floating_point and _other_type((*args, *kwargs.values())):
            _refuse(".to")
        return self._still(self.dense.to(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dense" or not self.dtype.is_floating_point:
            _refuse(f".{name}")
        return getattr(self.dense, name)


def _other_type(said: tuple[Any, ...]) -> bool:
    types = [x if isinstance(x, torch.dtype) else x.dtype for x in said if isinstance(x, (torch.dtype, Tensor))]
    return any(dtype != torch.bool for dtype in types)


def _refuse(what: str) -> NoReturn:
    raise _UnknownUseError(
        "attention_mask",
        f"the model uses {what} of its mask; attnreg hands it a mask expression, which answers as a bool tensor "
        "for dtype, device, shape, slices, views, &, |, ^, ~, ==, torch.where, masked_fill, cat, pad and "
        "logical_not. Use attn_implementation='eager' for this model",
    )


def _exact(name: str) -> Callable[..., Any]:
    return lambda mask, *others: getattr(mask.dense, name)(*(_plain(x) for x in others))


def _plain(x: Any) -> Any:
    return x.dense if isinstance(x, _Mask) else x


def _shaping(name: str) -> Callable[..., Any]:
    return lambda mask, *args, **kwargs: mask._still(getattr(mask.dense, name)(*args, **kwargs))


def _of_floats(name: str) -> Callable[..., Any]:
    def answer(mask: _Mask, *others: Any) -> Any:
        if not mask.dtype.is_floating_point:
            _refuse(name)
        return getattr(mask.dense, name)(*(_plain(x) for x in others))

    return answer


for _name in (*METHODS, *(f"__{name}__" for name in OPERATORS)):
    setattr(_Mask, _name, _exact(_name))
for _name in SHAPING:
    setattr(_Mask, _name, _shaping(_name))
for _name in ARITHMETIC:
    setattr(_Mask, f"__{_name}__", _of_floats(f"__{_name}__"))


class MaskSlice(_Mask):
    """A part or a view of a StructuredMask that stands for bools: a bool tensor without arithmetic."""

    def __init__(self, part: Tensor) -> None:
        self.part = part

    @property
    def dense(self) -> Tensor:
        return self.part

    @property
    def shape(self) -> torch.Size:
        return self.part.shape

    @property
    def device(self) -> torch.device:
        return self.part.device

    @property
    def ndim(self) -> int:
        return self.part.ndim


@dataclass(eq=False)
class StructuredMask(_Mask):
    """What the mask function hands to each layer: a mask expression with its tensors, instead of Sq x Skv values.

    query_offset: where query row 0 stands on the keys' time line; an int, or a one-element tensor where a
    static cache keeps it on the device. device: where the tensor would lie. dtype: bool (True = may attend) or, for a
    model that expects floats that it adds to the scores, their type (0 or its lowest number).

    To a model that works on the mask before its layers do, it is that tensor. Floats answer every question. Of bools it
    gives slices and views, `&`, `|`, `^`, `~`, `==` and functions such as torch.where and masked_fill; anything else
    raises InputError, since a model that adds its mask expects floats.
    """

    mask: Mask
    tensors: dict[str, Tensor]
    query_offset: int | Tensor
    shape: tuple[int, int, int, int]
    device: torch.device = CPU
    dtype: torch.dtype = torch.bool
    handed: Tensor | None = field(default=None, init=False, repr=False)
    """The tensor, once a model has asked for it: it may have been written to, so from then on it is the mask."""

    @property
    def ndim(self) -> int:
        """4, as of the tensor that it stands for: transformers looks before it converts a 2-D mask."""
        return 4

    @property
    def dense(self) -> Tensor:
        """The tensor [B, 1, Sq, Skv] that it stands for, made when it is first asked for."""
        if self.handed is None:
            self.handed = self.values()
        return self.handed

    def values(self) -> Tensor:
        """A new tensor of what it stands for."""
        bools = self.bools()
        if not self.dtype.is_floating_point:
            return bools
        lowest = torch.finfo(self.dtype).min
        return torch.where(bools, torch.zeros((), dtype=self.dtype, device=self.device), lowest)

    def bools(self) -> Tensor:
        """Bool [B, 1, Sq, Skv], True where a query may attend."""
        batch, heads, rows, keys = (torch.arange(n, device=self.device) for n in self.shape)
        b, h, i, j = batch[:, None, None, None], heads[:, None, None], rows[:, None], keys
        offset = self.query_offset
        p = i + (offset.to(self.device).reshape(-1) if isinstance(offset, Tensor) else offset)
        return self.mask.allows(Coords(b, h, i, p, j, self.tensors)).expand(self.shape)


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
