"""What every mask expression is: frozen data that says which pairs may attend, composed with `&`, `|` and `~`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from attnreg._coords import Coords
from attnreg._node import Node
from attnreg.errors import MissingTensorError, SpecError

__all__ = ["And", "Mask", "Not", "Or", "picture_size", "take", "walk"]


class Mask(Node):
    """Base of every mask expression. True means: may attend."""

    family: ClassVar[str] = "mask"

    def allows(self, c: Coords) -> Tensor:
        """Bool tensor that broadcasts over the coordinates: True where the query may attend the key."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it allows")

    def parts(self) -> tuple[Mask, ...]:
        """The expressions that this one is composed of; empty for a leaf."""
        return ()

    def tensors(self) -> frozenset[str]:
        return frozenset().union(*(part.tensors() for part in self.parts()))

    def __and__(self, other: Mask) -> Mask:
        return _compose(And, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _compose(Or, self, other)

    def __invert__(self) -> Mask:
        return self.of if isinstance(self, Not) else Not(self)

    def show(self, sq: int, skv: int, *, width: int = 64, offset: int | None = None, **tensors: Tensor) -> str:
        """A picture of the mask in text, for `sq` queries on `skv` keys.

        Each character stands for a block of pairs: all, some or none of them may attend. offset: the position of
        row 0; None is bottom-right, skv - sq. tensors: the call tensors that the mask needs (`kv_lengths`,
        `document_ids`, ...), for batch 0 and head 0. Raises InputError for one that is missing or a size below 1.
        """
        from attnreg._picture import text

        self._has(tensors)
        return text(self.allows, sq, skv, width=width, offset=offset, tensors=tensors, title=repr(self))

    def _repr_svg_(self) -> str | None:
        from attnreg._svg import svg

        if self.tensors():
            return None
        size = picture_size(self)
        return svg(self.allows, size, size, title=repr(self))

    def _has(self, tensors: Mapping[str, Any]) -> None:
        for name in sorted(self.tensors() - tensors.keys()):
            raise MissingTensorError(name, f"{self!r} needs it to be drawn; pass {name}=")


def _compose(kind: type[Composition], left: Mask, right: object) -> Mask:
    if not isinstance(right, Mask):
        raise SpecError(f"mask: {left!r} composes with another mask expression, got {right!r}")
    of: list[Mask] = []
    for side in (left, right):
        for part in side.of if isinstance(side, kind) else (side,):
            if part not in of:
                of.append(part)
    return of[0] if len(of) == 1 else kind(tuple(of))


@dataclass(frozen=True, repr=False)
class Composition(Mask):
    """Mask expressions joined by one operator."""

    of: tuple[Mask, ...]
    symbol: ClassVar[str] = ""
    join: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.of, (tuple, list)) or not self.of:
            raise SpecError(f"{name}(of): expected one or more mask expressions, got {self.of!r}")
        of = tuple(Mask.from_json(part) if isinstance(part, Mapping) else part for part in self.of)
        for part in of:
            if not isinstance(part, Mask):
                raise SpecError(f"{name}(of): expected mask expressions, got {part!r}")
        object.__setattr__(self, "of", of)

    def parts(self) -> tuple[Mask, ...]:
        return self.of

    def allows(self, c: Coords) -> Tensor:
        return functools.reduce(type(self).join, (part.allows(c) for part in self.of))

    def __repr__(self) -> str:
        def bare(part: Mask) -> bool:
            return isinstance(part, type(self)) or not isinstance(part, Composition)

        return f" {self.symbol} ".join(repr(part) if bare(part) else f"({part!r})" for part in self.of)


@dataclass(frozen=True, repr=False)
class And(Composition):
    """All of `of` allow it. Written `a & b`."""

    kind: ClassVar[str] = "and"
    symbol: ClassVar[str] = "&"
    join: ClassVar[Callable[[Tensor, Tensor], Tensor]] = operator.and_


@dataclass(frozen=True, repr=False)
class Or(Composition):
    """Any of `of` allows it. Written `a | b`."""

    kind: ClassVar[str] = "or"
    symbol: ClassVar[str] = "|"
    join: ClassVar[Callable[[Tensor, Tensor], Tensor]] = operator.or_


@dataclass(frozen=True)
class Not(Mask):
    """`of` does not allow it. Written `~a`."""

    of: Mask
    kind: ClassVar[str] = "not"

    def __post_init__(self) -> None:
        if isinstance(self.of, Mapping):
            object.__setattr__(self, "of", Mask.from_json(self.of))
        if not isinstance(self.of, Mask):
            raise SpecError(f"Not(of): expected a mask expression, got {self.of!r}")

    def parts(self) -> tuple[Mask, ...]:
        return (self.of,)

    def allows(self, c: Coords) -> Tensor:
        return ~self.of.allows(c)

    def __repr__(self) -> str:
        return f"~({self.of!r})" if isinstance(self.of, Composition) else f"~{self.of!r}"


def walk(mask: Mask) -> list[Mask]:
    """The expression and everything inside it, outermost first."""
    return [mask, *(inner for part in mask.parts() for inner in walk(part))]


def picture_size(of: Node) -> int:
    """A power of two of queries and keys that shows a mask's or pattern's widest feature, within 64 .. 16384."""
    nodes = walk(of) if isinstance(of, Mask) else [of]
    said = [getattr(x, f.name) for x in nodes for f in fields(x)]  # type: ignore[arg-type]  # all are dataclasses
    wide = max((n for n in said if isinstance(n, int)), default=0)
    return 1 << min(max(4 * wide - 1, 63).bit_length(), 14)


def take(table: Tensor, *index: Tensor) -> Tensor:
    """`table[index]` by broadcasting: missing leading dimensions and dimensions of size 1 are read at 0."""
    tail = index[len(index) - table.dim() :]
    where: list[Tensor | int] = [0 if table.shape[n] == 1 else at for n, at in enumerate(tail)]
    return table[tuple(where)] if where else table
