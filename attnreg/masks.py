"""Mask expressions: which key a query may attend, composed with `&`, `|` and `~`.

Every expression is frozen, hashable data. `Coords` holds the indices of a block of query-key pairs, and
`mask.allows(coords)` says True where attending is allowed; that one definition serves the eager backend,
FlexAttention's `mask_mod` and the block layout alike. Positions and rows differ: `p` is where the query stands
on the key time line (the spec's `align` says how), `i` is its row in q.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnreg._coords import Coords
from attnreg._node import Node, check_int
from attnreg.errors import MissingTensorError, SpecError

__all__ = [
    "And",
    "Band",
    "Causal",
    "Chunked",
    "Coords",
    "Custom",
    "Dense",
    "Dilated",
    "Document",
    "Full",
    "Global",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "PrefixLM",
    "SlidingWindow",
    "as_band",
    "longformer",
    "walk",
]


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


def _compose(kind: type[And] | type[Or], left: Mask, right: object) -> Mask:
    if not isinstance(right, Mask):
        raise SpecError(f"mask: {left!r} composes with another mask expression, got {right!r}")
    of: list[Mask] = []
    for side in (left, right):
        for part in side.of if isinstance(side, kind) else (side,):
            if part not in of:
                of.append(part)
    return of[0] if len(of) == 1 else kind(tuple(of))


@dataclass(frozen=True)
class And(Mask):
    """All of `of` allow it. Written `a & b`."""

    of: tuple[Mask, ...]
    kind: ClassVar[str] = "and"

    def __post_init__(self) -> None:
        _check_parts(self)

    def parts(self) -> tuple[Mask, ...]:
        return self.of

    def allows(self, c: Coords) -> Tensor:
        out = self.of[0].allows(c)
        for part in self.of[1:]:
            out = out & part.allows(c)
        return out

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.of)


@dataclass(frozen=True)
class Or(Mask):
    """Any of `of` allows it. Written `a | b`."""

    of: tuple[Mask, ...]
    kind: ClassVar[str] = "or"

    def __post_init__(self) -> None:
        _check_parts(self)

    def parts(self) -> tuple[Mask, ...]:
        return self.of

    def allows(self, c: Coords) -> Tensor:
        out = self.of[0].allows(c)
        for part in self.of[1:]:
            out = out | part.allows(c)
        return out

    def __repr__(self) -> str:
        return " | ".join(f"({part!r})" if isinstance(part, And) else repr(part) for part in self.of)


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
        return f"~({self.of!r})" if isinstance(self.of, (And, Or)) else f"~{self.of!r}"


def _check_parts(node: And | Or) -> None:
    name = type(node).__name__
    if not isinstance(node.of, (tuple, list)) or not node.of:
        raise SpecError(f"{name}(of): expected one or more mask expressions, got {node.of!r}")
    of = tuple(Mask.from_json(part) if isinstance(part, Mapping) else part for part in node.of)
    for part in of:
        if not isinstance(part, Mask):
            raise SpecError(f"{name}(of): expected mask expressions, got {part!r}")
    object.__setattr__(node, "of", of)


@dataclass(frozen=True)
class Full(Mask):
    """Every query may attend every key."""

    kind: ClassVar[str] = "full"

    def allows(self, c: Coords) -> Tensor:
        return (c.p == c.p) & (c.j == c.j)


@dataclass(frozen=True)
class Causal(Mask):
    """A query at position p may attend the keys j <= p."""

    kind: ClassVar[str] = "causal"

    def allows(self, c: Coords) -> Tensor:
        return c.j <= c.p


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Keys p - left <= j <= p + right, both ends included."""

    left: int
    right: int = 0
    kind: ClassVar[str] = "sliding_window"

    def __post_init__(self) -> None:
        check_int(self, "left", 0)
        check_int(self, "right", 0)

    def allows(self, c: Coords) -> Tensor:
        return (c.j >= c.p - self.left) & (c.j <= c.p + self.right)


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Keys below `length` are seen by every query; the rest is causal. None: `prefix_lengths` [B] at the call."""

    length: int | None = None
    kind: ClassVar[str] = "prefix_lm"

    def __post_init__(self) -> None:
        if self.length is not None:
            check_int(self, "length", 0)

    def tensors(self) -> frozenset[str]:
        return frozenset() if self.length is not None else frozenset({"prefix_lengths"})

    def allows(self, c: Coords) -> Tensor:
        length: Tensor | int = c.tensors["prefix_lengths"][c.b] if self.length is None else self.length
        return (c.j < length) | (c.j <= c.p)


@dataclass(frozen=True)
class Chunked(Mask):
    """Keys of the query's own chunk: p // size == j // size."""

    size: int
    kind: ClassVar[str] = "chunked"

    def __post_init__(self) -> None:
        check_int(self, "size", 1)

    def allows(self, c: Coords) -> Tensor:
        return _floordiv(c.p, self.size) == _floordiv(c.j, self.size)


@dataclass(frozen=True)
class Dilated(Mask):
    """Keys j = p + n * dilation with abs(n) <= window // 2."""

    window: int
    dilation: int
    kind: ClassVar[str] = "dilated"

    def __post_init__(self) -> None:
        check_int(self, "window", 1)
        check_int(self, "dilation", 1)

    def allows(self, c: Coords) -> Tensor:
        distance = (c.j - c.p).abs()
        return (distance % self.dilation == 0) & (distance <= self.window // 2 * self.dilation)


@dataclass(frozen=True)
class Global(Mask):
    """The query's position or the key is one of the positions `tokens`. None: `global_mask` [B, Skv] bool."""

    tokens: tuple[int, ...] | None = None
    kind: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        if self.tokens is None:
            return
        if isinstance(self.tokens, (str, bytes)):
            raise SpecError(f"Global(tokens): expected integers >= 0, got {self.tokens!r}")
        try:
            tokens = tuple(sorted({operator.index(token) for token in self.tokens}))
        except TypeError:
            raise SpecError(f"Global(tokens): expected a tuple of integers >= 0, got {self.tokens!r}") from None
        if tokens and (tokens[0] < 0 or tokens[-1] >= 2**62):
            raise SpecError(f"Global(tokens): expected integers >= 0, got {self.tokens!r}")
        object.__setattr__(self, "tokens", tokens)

    def tensors(self) -> frozenset[str]:
        return frozenset() if self.tokens is not None else frozenset({"global_mask"})

    def allows(self, c: Coords) -> Tensor:
        if self.tokens is None:
            table: Tensor = c.tensors["global_mask"]
            size = table.shape[-1]
            at_query = table[c.b, c.p.clamp(0, size - 1)] & (c.p >= 0) & (c.p < size)
            return at_query | table[c.b, c.j]
        out = (c.p != c.p) & (c.j != c.j)
        for first, last in _runs(self.tokens):
            out = out | ((c.p >= first) & (c.p <= last)) | ((c.j >= first) & (c.j <= last))
        return out


@dataclass(frozen=True)
class Document(Mask):
    """Query and key belong to one document: same entry of `document_ids` [B, Skv]; under thd: of `cu_seqlens`."""

    kind: ClassVar[str] = "document"

    def tensors(self) -> frozenset[str]:
        return frozenset({"document_ids"})

    def allows(self, c: Coords) -> Tensor:
        if c.packed:
            return Full().allows(c)
        table: Tensor = c.tensors["document_ids"]
        size = table.shape[-1]
        same = table[c.b, c.p.clamp(0, size - 1)] == table[c.b, c.j]
        return same & (c.p >= 0) & (c.p < size)


@dataclass(frozen=True)
class Padding(Mask):
    """Keys j < `kv_lengths` [B]."""

    kind: ClassVar[str] = "padding"

    def tensors(self) -> frozenset[str]:
        return frozenset({"kv_lengths"})

    def allows(self, c: Coords) -> Tensor:
        lengths: Tensor = c.tensors["kv_lengths"]
        return c.j < lengths[c.b]


@dataclass(frozen=True)
class Dense(Mask):
    """`attn_mask`, a bool tensor that broadcasts to [B, Hq, Sq, Skv], says True."""

    kind: ClassVar[str] = "dense"

    def tensors(self) -> frozenset[str]:
        return frozenset({"attn_mask"})

    def allows(self, c: Coords) -> Tensor:
        return take(c.tensors["attn_mask"], c.b, c.h, c.i, c.j)


@dataclass(frozen=True)
class Custom(Mask):
    """`mask_mod(b, h, p, j)`, FlexAttention's signature, says True. Has no JSON form."""

    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    kind: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        if not callable(self.mask_mod):
            raise SpecError(f"Custom(mask_mod): expected a callable mask_mod(b, h, p, j), got {self.mask_mod!r}")

    def allows(self, c: Coords) -> Tensor:
        out = self.mask_mod(c.b, c.h, c.p, c.j)
        if not isinstance(out, Tensor) or out.dtype != torch.bool:
            got = out.dtype if isinstance(out, Tensor) else repr(out)
            raise SpecError(f"Custom(mask_mod): expected a bool tensor from mask_mod, got {got}")
        return out

    def to_json(self) -> dict[str, Any]:
        raise SpecError(
            "mask: Custom(mask_mod) holds Python code and has no JSON form; say the mask with the other "
            "expressions, or with Dense() and an attn_mask, to store, record or ship it"
        )

    @classmethod
    def from_json(cls, data: object) -> Any:
        raise SpecError("mask: kind 'custom' holds Python code and is never read from JSON")


def longformer(window: int, tokens: tuple[int, ...] | None = None) -> Mask:
    """`SlidingWindow(window // 2, window // 2) | Global(tokens)` (Beltagy et al. 2020, arXiv:2004.05150)."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise SpecError(f"longformer(window): expected an integer >= 1, got {window!r}")
    return SlidingWindow(window // 2, window // 2) | Global(tokens)


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


def _floordiv(x: Tensor, by: int) -> Tensor:
    return torch.div(x, by, rounding_mode="floor")


def _runs(tokens: tuple[int, ...]) -> list[tuple[int, int]]:
    """Sorted positions as inclusive runs, so that a long block of global tokens costs one comparison."""
    runs: list[tuple[int, int]] = []
    for token in tokens:
        if runs and token == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], token)
        else:
            runs.append((token, token))
    return runs


@dataclass(frozen=True)
class Band:
    """The conjunctions that every flash-style kernel can run by loop bounds.

    A pair is allowed when j >= p - left (None: no bound), and j <= p + right (None: no bound) or j < prefix,
    and, where the flags say so, j < kv_lengths[b] and both lie in one document. `prefix` is 0 for none;
    `prefix_tensor` says that it comes from `prefix_lengths` [B] instead.
    """

    left: int | None = None
    right: int | None = None
    prefix: int = 0
    prefix_tensor: bool = False
    padding: bool = False
    document: bool = False

    @property
    def causal(self) -> bool:
        """Is this exactly j <= p (times padding and document)?"""
        return self.right == 0 and self.left is None and self.prefix == 0 and not self.prefix_tensor

    @property
    def full(self) -> bool:
        """Does the band itself bound nothing?"""
        return self.right is None and self.left is None


def as_band(mask: Mask) -> Band | None:
    """The mask as a Band, or None where it is none (a union, a complement, dilation, a dense tensor...)."""
    parts = mask.of if isinstance(mask, And) else (mask,)
    left: int | None = None
    right: int | None = None
    prefixes: list[PrefixLM] = []
    padding = document = False
    for part in parts:
        if isinstance(part, Causal):
            right = 0
        elif isinstance(part, SlidingWindow):
            left = part.left if left is None else min(left, part.left)
            right = part.right if right is None else min(right, part.right)
        elif isinstance(part, PrefixLM):
            prefixes.append(part)
        elif isinstance(part, Padding):
            padding = True
        elif isinstance(part, Document):
            document = True
        elif not isinstance(part, Full):
            return None
    if not prefixes or right == 0:  # j <= p makes every prefix idle
        return Band(left, right, padding=padding, document=document)
    if right is not None or len(prefixes) > 1:
        return None
    length = prefixes[0].length
    return Band(left, 0, length or 0, length is None, padding, document)
