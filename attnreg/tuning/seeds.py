"""What a search looks at first, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from attnreg.measure import Candidate
from attnreg.tuning.joint import JointSpace

__all__ = ["FAR", "starting_points"]

FAR = 2.0
"""A backend whose estimate is more than this many times the least is looked at after the others' seeds."""


def starting_points(
    space: JointSpace, estimates: Mapping[str, float | None], records: Sequence[tuple[Candidate, str]]
) -> list[tuple[Candidate, str]]:
    """(candidate, why) to try first: defaults, fastest by estimate first; records; the backends' own seeds.

    Backends that are FAR behind by estimate come last: some compile for half a minute a candidate, which would be all
    that a limit in seconds allows. One without an estimate may be the fastest, so it does not wait for that.
    """
    known = {name: math.inf if (said := estimates[name]) is None else said for name in space.spaces}
    names = sorted(known, key=lambda name: (known[name], name))
    far = [name for name in names if estimates[name] is not None and known[name] > FAR * known[names[0]]]
    near = [name for name in names if name not in far]
    return [*_defaults(space, near), *records, *_seeds(space, near), *_defaults(space, far), *_seeds(space, far)]


def _defaults(space: JointSpace, names: Sequence[str]) -> list[tuple[Candidate, str]]:
    return [(Candidate(name, space.spaces[name].default), "default") for name in names]


def _seeds(space: JointSpace, names: Sequence[str]) -> list[tuple[Candidate, str]]:
    """The seeds of these backends in turn: everyone's first, everyone's second and so on."""
    turns = zip_longest(*(space.spaces[name].seeds for name in names))
    return [
        (Candidate(name, seed), "seed")
        for turn in turns
        for name, seed in zip(names, turn, strict=True)
        if seed is not None
    ]
