"""How large the tiles of a call are, so that what lives at a time stays bounded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sizes", "plan"]

BUDGET = 1 << 21
"""Scores of a tile (8 MiB in float32); some ten tensors of this size live at a time in the backward."""

UPCAST = 1 << 23
"""Elements of k and v together that a slab or tile converts to the dtype of the computation."""


@dataclass(frozen=True)
class Sizes:
    """How much one tile covers: sequences, KV heads, rows and keys."""

    batch: int
    kv_heads: int
    rows: int
    keys: int

    def one_tile(self, batch: int, kv_heads: int, sq: int, skv: int) -> bool:
        """Does one tile cover everything?"""
        return self.batch >= batch and self.kv_heads >= kv_heads and self.rows >= sq and self.keys >= skv


def plan(batch: int, kv_heads: int, group: int, sq: int, skv: int, wide: int, hidden: int) -> Sizes:
    """Sizes that keep the scores of a tile within BUDGET elements.

    group: query heads a KV head. wide: D + Dv. hidden: the width of an additive score's hidden layer, which then
    is what has to fit; 0 for others.
    """
    skv, sq = max(skv, 1), max(sq, 1)
    # Rows first: a tile of few rows converts and reads k and v for little work.
    rows = min(sq, 64 if hidden else 128)
    keys = min(skv, max(UPCAST // wide, 1))
    if hidden:
        keys = min(keys, max(BUDGET // (rows * group * hidden), 1))
    # All key tiles of a row count, since a backward keeps their scores; hidden layers are made again one by one.
    pairs = group * (keys * hidden if hidden else skv)
    slabs = max(1, min(BUDGET // (rows * pairs), UPCAST // (skv * wide)))
    heads = max(min(slabs, kv_heads), 1)
    batches = min(max(slabs // heads, 1), max(batch, 1)) if heads >= kv_heads else 1
    return Sizes(batches, heads, min(max(BUDGET // (batches * heads * pairs), 1), sq), keys)
