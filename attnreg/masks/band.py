"""The masks that every flash-style kernel runs by the bounds of its loops alone."""

from __future__ import annotations

from dataclasses import dataclass

from attnreg.masks.expression import And, Mask
from attnreg.masks.leaves import Causal, Document, Full, Padding, PrefixLM, SlidingWindow

__all__ = ["Band", "as_band"]


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
