"""Tagged frozen data: the base of mask, sparsity and score expressions, with JSON and pydantic support."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from attnreg.errors import SpecError

N = TypeVar("N", bound="Node")


class Node:
    """A frozen dataclass with a `kind` tag; each family (mask, sparsity, score) is one subclass.

    A family's members register themselves by being defined, so JSON knows them without a second list.
    """

    kind: ClassVar[str] = ""
    family: ClassVar[str] = ""
    members: ClassVar[dict[str, type[Node]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" in cls.__dict__:
            cls.members = {}
        elif cls.__dict__.get("kind"):
            cls.members[cls.kind] = cls

    def tensors(self) -> frozenset[str]:
        """Names of the call tensors that this expression needs."""
        return frozenset()

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` of the family turns back into an equal expression."""
        data: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every member is a dataclass
            value = getattr(self, field.name)
            data[field.name] = _plain(value)
        return data

    @classmethod
    def from_json(cls: type[N], data: object) -> N:
        """The expression that `to_json` described. Raises SpecError naming what is wrong."""
        if not isinstance(data, Mapping):
            raise SpecError(f"{cls.family}: expected an object with a 'kind', got {data!r}")
        kind = data.get("kind")
        member = cls.members.get(kind) if isinstance(kind, str) else None
        if member is None:
            raise SpecError(f"{cls.family}: unknown kind {kind!r}; known: {', '.join(sorted(cls.members))}")
        fields = {f.name: f for f in dataclasses.fields(member)}  # type: ignore[arg-type]  # as above
        extra = set(data) - set(fields) - {"kind"}
        if extra:
            raise SpecError(f"{cls.family} {kind}: unknown fields {sorted(extra)}; known: {sorted(fields)}")
        lacks = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in data]
        if lacks:
            raise SpecError(f"{cls.family} {kind}: missing fields {lacks}, which have no default")
        made = member(**{name: value for name, value in data.items() if name != "kind"})
        assert isinstance(made, cls)
        return made

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        def validate(value: object) -> Node:
            if isinstance(value, cls):
                return value
            if isinstance(value, Mapping):
                return cls.from_json(value)
            raise SpecError(f"expected a {cls.family} expression such as {cls._example()}, got {value!r}")

        return core_schema.no_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda node: node.to_json()),
        )

    @classmethod
    def _example(cls) -> str:
        return {"mask": "masks.Causal()", "sparsity": "sparsity.Dense()", "score": "scores.ScaledDot()"}.get(
            cls.family, cls.__name__
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def check_int(owner: object, name: str, minimum: int, limit: int = 2**62) -> None:
    """Replace the field by a plain int, or raise SpecError if it is none or does not lie in minimum .. limit - 1."""
    value = getattr(owner, name)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise SpecError(f"{type(owner).__name__}({name}): expected an integer >= {minimum}, got {value!r}") from None
    if number < minimum:
        raise SpecError(f"{type(owner).__name__}({name}): expected an integer >= {minimum}, got {number}")
    if number >= limit:
        what = f"expected an integer below {limit}, got {number}"
        what = f"{number} does not fit positions, which are int64" if limit == 2**62 else what
        raise SpecError(f"{type(owner).__name__}({name}): {what}")
    object.__setattr__(owner, name, number)


def check_float(owner: object, name: str, *, positive: bool = False) -> None:
    """Replace the field by a plain finite float, or raise SpecError."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{type(owner).__name__}({name}): expected a finite number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        want = "a finite number above 0" if positive else "a finite number"
        raise SpecError(f"{type(owner).__name__}({name}): expected {want}, got {number!r}")
    object.__setattr__(owner, name, number)
