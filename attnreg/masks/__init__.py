"""Mask expressions: which key a query may attend, composed with `&`, `|` and `~`.

Every expression is frozen, hashable data. `Coords` holds the indices of a block of query-key pairs, and
`mask.allows(coords)` says True where attending is allowed; that one definition serves the eager backend,
FlexAttention's `mask_mod` and the block layout alike. Positions and rows differ: `p` is where the query stands
on the key time line (the spec's `align` says how), `i` is its row in q.
"""

from __future__ import annotations

from attnreg._coords import Coords
from attnreg.masks.band import Band, as_band
from attnreg.masks.expression import And, Mask, Not, Or, take, walk
from attnreg.masks.leaves import (
    Causal,
    Chunked,
    Custom,
    Dense,
    Dilated,
    Document,
    Full,
    Global,
    Padding,
    PrefixLM,
    SlidingWindow,
    longformer,
    state,
)

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
    "state",
    "take",
    "walk",
]
