"""The masks that an expression is made of: by position, by a tensor of the call, or by the user's own function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnreg._coords import Coords
from attnreg._node import check_int
from attnreg.errors import SpecError
from attnreg.masks.expression import Mask, take, walk

__all__ = [
    "Causal",
    "Chunked",
    "Custom",
    "Dense",
    "Dilated",
    "Document",
    "Full",
    "Global",
    "Padding",
    "PrefixLM",
    "SlidingWindow",
    "longformer",
    "state",
]


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
        reach = min(self.window // 2 * self.dilation, 2**62)  # no distance is larger, and int64 ends there
        return (distance % self.dilation == 0) & (distance <= reach)


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
            if _no_key(size):
                return _never(c)
            at_query = table[c.b, c.p.clamp(0, size - 1)] & (c.p >= 0) & (c.p < size)
            return at_query | table[c.b, c.j]
        out = _never(c)
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
        if _no_key(size):
            return _never(c)
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


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Custom(Mask):
    """`mask_mod(b, h, p, j)`, FlexAttention's signature, says True. Has no JSON form.

    What mask_mod reads beside its arguments may change, so nothing that is derived from it is kept from call to call,
    unless its author says what to watch. version: any hashable value; another one says that mask_mod means something
    else. tensors: those that mask_mod reads; torch counts their changes in place (but not those made through numpy or
    other views of the same memory that torch does not know). With either, block layouts and masks are kept.
    """

    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    version: Hashable
    reads: tuple[Tensor, ...]
    kind: ClassVar[str] = "custom"

    def __init__(
        self,
        mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        version: Hashable = None,
        tensors: Sequence[Tensor] = (),
    ) -> None:
        if not callable(mask_mod):
            raise SpecError(f"Custom(mask_mod): expected a callable mask_mod(b, h, p, j), got {mask_mod!r}")
        if not isinstance(version, Hashable):
            raise SpecError(f"Custom(version): expected a hashable value, got {version!r}")
        if not isinstance(tensors, (tuple, list)) or not all(isinstance(x, Tensor) for x in tensors):
            raise SpecError(f"Custom(tensors): expected the tensors that mask_mod reads, in a tuple, got {tensors!r}")
        for name, value in (("mask_mod", mask_mod), ("version", version), ("reads", tuple(tensors))):
            object.__setattr__(self, name, value)

    def _identity(self) -> tuple[Any, ...]:
        return self.mask_mod, self.version, *map(id, self.reads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        said = [f"mask_mod={self.mask_mod!r}"]
        said += [] if self.version is None else [f"version={self.version!r}"]
        said += [f"tensors=<{len(self.reads)} tensors>"] if self.reads else []
        return f"Custom({', '.join(said)})"

    def state(self) -> Hashable | None:
        """What tells apart two moments at which mask_mod may mean different things; None where nobody said."""
        if self.version is None and not self.reads:
            return None
        try:
            return self.version, *((id(x), x.data_ptr(), x._version) for x in self.reads)
        except RuntimeError:  # an inference tensor counts no changes, others have no memory
            return None

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


def state(mask: Mask) -> Hashable | None:
    """What a mask's meaning depends on now beside its own value and the call: () but for `Custom`.

    For caches: what is derived from a mask may be kept under this value, and not at all where it is None.
    """
    states = [part.state() for part in walk(mask) if isinstance(part, Custom)]
    return None if None in states else tuple(states)


def longformer(window: int, tokens: tuple[int, ...] | None = None) -> Mask:
    """`SlidingWindow(window // 2, window // 2) | Global(tokens)` (Beltagy et al. 2020, arXiv:2004.05150)."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise SpecError(f"longformer(window): expected an integer >= 1, got {window!r}")
    return SlidingWindow(window // 2, window // 2) | Global(tokens)


def _no_key(size: Any) -> bool:
    """Is there no key at all, so that a position cannot be looked up? Adds no guard to a trace."""
    return isinstance(size, int) and size == 0


def _never(c: Coords) -> Tensor:
    return (c.p != c.p) & (c.j != c.j)


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
