"""Whether a mask leaves out every key behind a sequence's length, so that such keys are not used at all."""

from __future__ import annotations

from attnreg.masks.expression import And, Mask, Not, Or
from attnreg.masks.leaves import Padding

__all__ = ["within_lengths"]


def within_lengths(mask: Mask) -> bool:
    """Is no key at or behind `kv_lengths` attended by any query, whatever else the mask says?

    True of `Padding()`, of `&` with one such part, and of `|` whose every part is one. Such keys are not used: no
    backend may let what they hold, NaN included, reach a result.
    """
    return _implies(mask, True)


def _implies(mask: Mask, value: bool) -> bool:
    """Does a key behind the lengths make the mask False (of `value` True), or True (of `value` False)?"""
    if isinstance(mask, Not):
        return _implies(mask.of, not value)
    if isinstance(mask, (And, Or)):
        some = isinstance(mask, And) is value
        return (any if some else all)(_implies(part, value) for part in mask.of)
    return value and isinstance(mask, Padding)
