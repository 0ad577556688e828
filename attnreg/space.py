"""SearchSpace: the configurations that a backend offers the tuner, without any search library."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from attnreg.errors import ConfigError

__all__ = ["Config", "SearchSpace", "Value"]

Value = int | str | float | bool
Config = Mapping[str, Value]


# No slash, no space: a name in a record can be looked up among what is loaded, and can be nothing else.
NAME = re.compile(r"[A-Za-z0-9_.+-]{1,80}\Z")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.match(value) is not None


def _recordable(value: object) -> bool:
    """May a record hold it, and a program that reads the record get the same?"""
    return type(value) in (bool, int) or (type(value) is float and math.isfinite(value)) or _is_name(value)


@dataclass(frozen=True)
class SearchSpace:
    """Named choices, constraints between them, a default and known-good seeds.

    choices: name -> the ordered values it may take: ints, finite floats, bools, names; neighbours in the order are
        neighbours in the search.
    constraints: (what must hold, as text for the user; a predicate over a full configuration).
    default: a valid configuration that is always safe to run. Empty choices make a space of one point, {}.
    seeds: valid configurations worth trying first, best first. Those that break a constraint are dropped.
    """

    choices: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    default: Config = field(default_factory=dict)
    constraints: Sequence[tuple[str, Callable[[Config], bool]]] = ()
    seeds: Sequence[Config] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", {name: tuple(values) for name, values in self.choices.items()})
        for name, values in self.choices.items():
            if not _is_name(name):
                raise ConfigError(f"SearchSpace: expected a name of letters, digits and _.+-, got {name!r}")
            if unfit := [value for value in values if not _recordable(value)]:
                raise ConfigError(
                    f"SearchSpace: {name!r}: expected ints, finite floats, bools or names, got {unfit[0]!r}"
                )
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"SearchSpace: {name!r} needs distinct values, got {list(values)}")
        full = {**{name: values[0] for name, values in self.choices.items()}, **self.default}
        object.__setattr__(self, "default", full)
        wrong = self.reasons(full)
        if wrong:
            raise ConfigError(f"SearchSpace: the default {full} is not in the space: {'; '.join(wrong)}")
        object.__setattr__(self, "seeds", tuple(dict(s) for s in self.seeds if not self.reasons(s)))

    def reasons(self, config: Config) -> list[str]:
        """Why the configuration is not in the space; empty if it is."""
        if set(config) != set(self.choices):
            return [f"expected the names {sorted(self.choices)}, got {sorted(config)}"]
        out = [
            f"{name}={config[name]!r} is none of {list(values)}"
            for name, values in self.choices.items()
            if config[name] not in values
        ]
        return out or [text for text, holds in self.constraints if not holds(config)]

    def check(self, config: Config) -> dict[str, Value]:
        """The configuration with missing names taken from the default. Raises ConfigError if outside."""
        full = {**self.default, **config}
        wrong = self.reasons(full)
        if wrong:
            raise ConfigError(f"configuration {dict(config)}: {'; '.join(wrong)}")
        return full

    @property
    def size(self) -> int:
        """Number of points before constraints."""
        return math.prod(len(values) for values in self.choices.values())

    def points(self) -> Iterator[dict[str, Value]]:
        """Every valid configuration, in the order of the choices."""
        for values in itertools.product(*self.choices.values()):
            config = dict(zip(self.choices, values, strict=True))
            if all(holds(config) for _, holds in self.constraints):
                yield config

    def neighbours(self, config: Config) -> Iterator[dict[str, Value]]:
        """Valid configurations one step away in one choice."""
        for name, values in self.choices.items():
            at = list(values).index(config[name])
            for step in (at - 1, at + 1):
                if 0 <= step < len(values):
                    near = {**config, name: values[step]}
                    if not self.reasons(near):
                        yield near

    def sample(self, rng: random.Random, tries: int = 1000) -> dict[str, Value]:
        """A valid configuration drawn uniformly (by rejection); the default if none turns up in `tries`."""
        for _ in range(tries):
            config = {name: rng.choice(list(values)) for name, values in self.choices.items()}
            if not self.reasons(config):
                return config
        return dict(self.default)
