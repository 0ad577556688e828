"""Options: how to tune, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from attnreg.errors import InputError
from attnreg.redaction import hide
from attnreg.tuning.location import location
from attnreg.tuning.search import ENUMERATE

__all__ = ["DEFAULTS", "Options"]


@dataclass(frozen=True)
class Options:
    """How to tune. The defaults suit a call at a prompt.

    trials: most candidates to look at, None for as many as pay. seconds: for the whole problem, None for no limit.
    storage: a journal file or a database URL, whose password is never shown; None for a journal of the problem's own
    in the data folder. backends: only these. cache: time with "warm" or "cold" caches. isolate: run candidates in a
    worker process. keep: write the record to the user's database. time_limit: seconds that one step of a candidate
    may take. memory_limit: bytes that the worker may hold, 0 for most of what is free. enumerate_up_to: spaces of at
    most so many points are looked at whole. patience: sampled candidates without gain after which more cannot pay,
    None for a share of the space.

    Raises InputError naming the option that cannot be meant.
    """

    trials: int | None = None
    seconds: float | None = None
    storage: str | Path | None = None
    backends: tuple[str, ...] | None = None
    cache: Literal["warm", "cold"] = "warm"
    isolate: bool = True
    keep: bool = True
    seed: int = 0
    confidence: float = 0.99
    time_limit: float = 120.0
    memory_limit: int = 0
    enumerate_up_to: int = ENUMERATE
    patience: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.backends, (list, tuple)):
            object.__setattr__(self, "backends", tuple(self.backends))
        for name, fits, wanted in _RULES:
            value = getattr(self, name)
            if not fits(value):
                raise InputError(_SAID.get(name, name), f"expected {wanted}, got {value!r}")
        if self.storage is not None:
            location(self.storage)

    def __repr__(self) -> str:
        """As of any dataclass, but for the password of the storage."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        said = (f"{name}={hide(x) if name == 'storage' and isinstance(x, str) else x!r}" for name, x in values)
        return f"Options({', '.join(said)})"


def _count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object, least: float = 0.0, below: float = math.inf) -> bool:
    """Is it a number above `least`? NaN is above nothing."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least < value <= below


def _names(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(name, str) for name in value)


# What users call it, where that differs.
_SAID = {"trials": "budget"}
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("trials", lambda x: x is None or _count(x, 1), "a number of candidates, at least 1, or None for as many as pay"),
    ("seconds", lambda x: x is None or _number(x), "a number of seconds above 0, or None for no limit"),
    ("storage", lambda x: x is None or isinstance(x, (str, Path)), "a journal file, a database URL, or None"),
    ("backends", lambda x: x is None or _names(x), "a tuple of names such as ('eager', 'sdpa'), or None for all"),
    ("cache", lambda x: x in ("warm", "cold"), "'warm' or 'cold'"),
    ("isolate", lambda x: isinstance(x, bool), "True or False"),
    ("keep", lambda x: isinstance(x, bool), "True or False"),
    ("seed", lambda x: _count(x, 0), "an integer of 0 or more"),
    ("confidence", lambda x: _number(x, 0.5, 1 - 1e-9), "a number between 0.5 and 1"),
    ("time_limit", _number, "a number of seconds above 0"),
    ("memory_limit", lambda x: _count(x, 0), "a number of bytes above 0, or 0 for most of what is free"),
    ("enumerate_up_to", lambda x: _count(x, 0), "an integer of 0 or more"),
    ("patience", lambda x: x is None or _count(x, 1), "a number of candidates, at least 1, or None"),
)

DEFAULTS = Options()
