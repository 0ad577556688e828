"""What a flash call computes, as frozen data that travels through torch's operator schema as one JSON string.

The string carries everything that is not a tensor, so an operator call means the same in a compiled graph that another
process loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

ConfigValue = int | str | float | bool
MAX_KEYS = 2**29
"""Longest key time line and window: sums of positions, windows and lengths stay inside 32 bits."""
FAR_POSITION = 2**30
"""No query beyond this position sees a key or window that one at it does not."""


@dataclass(frozen=True)
class Tile:
    """Tile and compiler options of one kernel: rows `m`, keys `n`, warps, pipeline stages, waves per EU on AMD."""

    m: int
    n: int
    warps: int
    stages: int
    waves: int = 0


@dataclass(frozen=True)
class Plan:
    """One attention call: its meaning (as in the spec) and how its kernels are cut.

    `left`/`right` None: no bound on that side; `prefix` None: no fixed prefix. `precision` is the float32 product:
    "ieee", "tf32x3" or "tf32". `splits` > 1 cuts the keys into that many runs (forward only).
    """

    layout: Literal["bhsd", "bshd", "thd"]
    scale: float
    align: Literal["bottom_right", "top_left", "offset"] = "bottom_right"
    left: int | None = None
    right: int | None = None
    prefix: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    page_size: int | None = None
    splits: int = 1
    precision: str = "ieee"
    forward: Tile = Tile(64, 32, 4, 2)
    backward_q: Tile = Tile(64, 32, 4, 2)
    backward_kv: Tile = Tile(32, 64, 4, 2)

    def encode(self) -> str:
        """This plan as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)


@lru_cache(maxsize=4096)
def decode(text: str) -> Plan:
    """The plan that `Plan.encode` wrote."""
    fields: Mapping[str, object] = json.loads(text)
    tiles = {name: Tile(**value) for name, value in fields.items() if isinstance(value, dict)}
    return Plan(**{**fields, **tiles})  # type: ignore[arg-type]  # JSON of our own making
