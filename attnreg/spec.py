"""AttentionSpec: frozen, hashable data that says what attention is meant, and nothing of how it is run."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from torch import Tensor

from attnreg.errors import MissingTensorError, SpecError
from attnreg.masks import Coords, Full, Mask
from attnreg.masks.expression import picture_size
from attnreg.scores import ScaledDot, Score
from attnreg.sparsity import Dense, Sparsity

__all__ = ["AttentionSpec", "HeadGrouping", "Precision", "spec_of_text"]

Number = Literal["same", "float8_e4m3fn", "float8_e5m2", "int8"]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a bool")
    return value


def _only_bool(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError(f"expected True or False, got {value!r}")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Bool = Annotated[bool, BeforeValidator(_only_bool)]


class _Frozen(BaseModel):
    """Frozen pydantic base whose errors are SpecError and whose hash is computed once."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _spec_error(type(self).__name__, error, type(self).model_fields) from None

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Any:
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise _spec_error(cls.__name__, error, cls.model_fields) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> Any:
        try:
            return super().model_validate_json(json_data, **kwargs)
        except ValidationError as error:
            raise _spec_error(cls.__name__, error, cls.model_fields) from None

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Any:
        """A copy with `update` applied and validated: pydantic's own copy would trust it unseen."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **(update or {})})


def _spec_error(owner: str, error: ValidationError, fields: Any) -> SpecError:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = f"no such field; {owner} has {', '.join(fields)}"
        elif (where or item["type"] != "value_error") and repr(item["input"]) not in text:
            text += f" (got {item['input']!r})"  # a check of fields together has said what it got of them
        # A part of the spec, or the spec that model_validate makes, may have said the name already.
        text = text.removeprefix(f"{where or owner}: ")
        lines.append(f"{where}: {text}" if where else text)
    return SpecError(f"{owner}: " + "; ".join(lines))


class HeadGrouping(_Frozen):
    """How many query heads read how many key-value heads; query head h reads KV head h // (q / kv)."""

    q: Int
    kv: Int

    @model_validator(mode="after")
    def _check(self) -> HeadGrouping:
        if self.q < 1 or self.kv < 1:
            raise ValueError(f"expected q >= 1 and kv >= 1, got q={self.q}, kv={self.kv}")
        if self.q % self.kv:
            raise ValueError(f"q={self.q} query heads do not divide evenly over kv={self.kv} heads")
        return self

    @property
    def kind(self) -> Literal["mha", "gqa", "mqa"]:
        """mha: a KV head a query head; mqa: one KV head for all; gqa: in between."""
        if self.q == self.kv:
            return "mha"
        return "mqa" if self.kv == 1 else "gqa"

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.q // self.kv


class Precision(_Frozen):
    """The lowest precision that a backend may use; a more precise one may always serve.

    compute: of the two products. kv: how k and v are stored at the call, with `k_descale` and `v_descale`.
    scaling: how many scales there are: one a tensor ("tensor": one value), one a batch and KV head ("head":
    [B, Hkv]), or one a block of keys ("block": [B, Hkv, N]; a block is a page where the cache is paged, else
    the smallest power of two that cuts Skv into N blocks). rotate: Hadamard rotation of q and k by a backend that
    quantises them itself, before it does; a more precise backend has nothing to rotate. It excludes a stored cache
    (kv other than "same"), whose k comes quantised: rotate q and k yourself before you store k.
    """

    compute: Number = "same"
    kv: Number = "same"
    scaling: Literal["tensor", "head", "block"] = "tensor"
    rotate: Bool = False

    @model_validator(mode="after")
    def _check(self) -> Precision:
        if self.rotate and self.kv != "same":
            raise ValueError(
                f"rotate=True rotates q and k before a backend quantises them, but kv={self.kv!r} says that k comes "
                "quantised; rotate q and k before storing k, and leave rotate out"
            )
        return self


class AttentionSpec(_Frozen):
    """What attention is meant. See the README's table for every variant, and docs/design.md for the meanings.

    Frozen, hashable, equal by value; `model_dump_json()` and `model_validate_json()` round-trip, except with
    `masks.Custom`, which says so.
    """

    mask: Mask = Full()
    sparsity: Sparsity = Dense()
    score: Score = ScaledDot()
    heads: HeadGrouping | None = None
    dtype: Precision = Precision()
    softcap: Float = 0.0
    bias: Bool = False
    alibi: Bool = False
    sinks: Bool = False
    dropout_p: Float = 0.0
    layout: Literal["bhsd", "bshd", "thd"] = "bhsd"
    align: Literal["bottom_right", "top_left", "offset"] = "bottom_right"
    page_size: Int | None = None
    return_lse: Bool = False
    deterministic: Bool = False

    @model_validator(mode="after")
    def _check(self) -> AttentionSpec:
        if not 2**-126 <= self.softcap <= 1e38 and self.softcap != 0:
            raise ValueError(f"softcap: expected 0 (off) or 2**-126 .. 1e38, which float32 holds, got {self.softcap}")
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {self.dropout_p}")
        if self.page_size is not None and not 1 <= self.page_size < 2**31:
            raise ValueError(f"page_size: expected an integer >= 1, got {self.page_size}")
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, name) for name in type(self).model_fields)))
        return self

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]  # set once in _check; frozen after

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, AttentionSpec) or hash(self) != hash(other):
            return False
        return all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields)

    def __getstate__(self) -> dict[Any, Any]:
        return {"fields": {name: getattr(self, name) for name in type(self).model_fields}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        # A stored hash would be another process's: strings hash differently there.
        self.__init__(**state["fields"])  # type: ignore[misc]  # re-validation is what makes it safe

    def tensors(self) -> frozenset[str]:
        """Names of the call tensors that the spec needs, apart from q, k, v and what optional names add."""
        names = set(self.mask.tensors() | self.sparsity.tensors() | self.score.tensors())
        if self.layout == "thd":
            names.discard("document_ids")
            names.add("cu_seqlens_q")
            if self.page_size is None:
                names.add("cu_seqlens_k")
        names |= {"bias"} if self.bias else set()
        names |= {"alibi_slopes"} if self.alibi else set()
        names |= {"sinks"} if self.sinks else set()
        names |= {"query_offset"} if self.align == "offset" else set()
        names |= {"block_table"} if self.page_size is not None else set()
        names |= {"k_descale", "v_descale"} if self.dtype.kv != "same" else set()
        return frozenset(names)

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """Plain data. Raises SpecError for a mask that has none (`masks.Custom`)."""
        self.mask.to_json()
        return super().model_dump(**kwargs)

    def model_dump_json(self, **kwargs: Any) -> str:
        """JSON text. Raises SpecError for a mask that has none (`masks.Custom`)."""
        self.mask.to_json()
        return super().model_dump_json(**kwargs)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """What torch.fx puts into its graph for a spec: a call that makes it of its JSON text.

        Raises SpecError for a mask that has none (`masks.Custom`).
        """
        return tracer.create_node("call_function", spec_of_text, (self.model_dump_json(exclude_defaults=True),), {})

    def changed(self, **fields: Any) -> AttentionSpec:
        """The same spec with other values of some fields, checked and hashed anew."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return AttentionSpec(**{**own, **fields})

    def digest(self) -> str:
        """A hash of the meaning that is the same in every process and release: 16 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def show(self, sq: int, skv: int, *, width: int = 64, **tensors: Any) -> str:
        """A picture in text of mask AND sparsity for `sq` queries on `skv` keys, placed as `align` says.

        For batch 0 (thd: sequence 0) and head 0. tensors: the call's, by name; more than needed may be given.
        Raises MissingTensorError for one that the picture needs, InputError for a size below 1.
        """
        from attnreg._picture import text

        return text(**self._drawn(sq, skv, tensors), width=width)

    def _repr_svg_(self) -> str | None:
        from attnreg._svg import svg

        size = max(picture_size(self.mask), picture_size(self.sparsity))
        try:
            return svg(**self._drawn(size, size, {}))
        except MissingTensorError:  # a notebook then shows the text form
            return None

    def _drawn(self, sq: int, skv: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """What a picture needs: which pairs attend, and where the queries are."""
        packed, sparse = self.layout == "thd", self.sparsity != Dense()
        names = set(self.mask.tensors() | self.sparsity.tensors()) - ({"document_ids"} if packed else set())
        names |= {"query_offset"} if self.align == "offset" else set()
        for name in sorted(names):
            if tensors.get(name) is None:
                raise MissingTensorError(name, f"the picture of {self!r} needs it; pass {name}=")
        if self.align == "bottom_right":
            said = {"kv_lengths"} & names | {"seqused_k"}
            given = [tensors[name] for name in said if tensors.get(name) is not None]
            offset = min([skv, *(int(lengths[0]) for lengths in given)]) - sq
        else:
            offset = int(tensors["query_offset"][0]) if self.align == "offset" else 0

        def allows(c: Coords) -> Tensor:
            return self.mask.allows(c) & self.sparsity.allows(c, skv) if sparse else self.mask.allows(c)

        return {
            "allows": allows, "sq": sq, "skv": skv, "offset": offset, "packed": packed,
            "tensors": {name: tensors[name] for name in names},
            "title": f"{self.mask!r}, {self.sparsity!r}" if sparse else repr(self.mask),
        }  # fmt: skip

    def __repr__(self) -> str:
        default = type(self).model_fields
        said = [f"{name}={getattr(self, name)!r}" for name in default if getattr(self, name) != default[name].default]
        return f"AttentionSpec({', '.join(said)})"

    __str__ = __repr__


def spec_of_text(text: str) -> AttentionSpec:
    """The spec that its JSON text says: what recorded programs carry."""
    return _spec_of_text(text)


@functools.lru_cache(maxsize=1024)
def _spec_of_text(text: str) -> AttentionSpec:
    spec: AttentionSpec = AttentionSpec.model_validate_json(text)
    return spec
