"""The joint space of one problem: backend x that backend's space, in Optuna's names and back."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import optuna

from attnreg.measure import Candidate
from attnreg.space import SearchSpace, Value

__all__ = ["JointSpace"]

POINTS = 4096
"""So many valid points tell spaces apart whose constraints changed and their words did not."""


@dataclass(frozen=True)
class JointSpace:
    """Search spaces by backend.

    In a study the backend is one categorical parameter and each choice is named `backend.choice`, so that
    parameters are conditional and every name keeps its values. Ordered numbers are their position in the order:
    neighbours there are neighbours to the sampler.
    """

    spaces: Mapping[str, SearchSpace]

    def count(self, limit: int) -> int:
        """Number of valid points, counted up to `limit`."""
        return sum(1 for _, _ in zip(range(limit), self.points(), strict=False))

    def points(self) -> Iterator[Candidate]:
        """Every valid candidate, backend by backend."""
        for name in sorted(self.spaces):
            for config in self.spaces[name].points():
                yield Candidate(name, config)

    def contains(self, candidate: Candidate) -> bool:
        """Is it a valid point?"""
        space = self.spaces.get(candidate.backend)
        return space is not None and not space.reasons(candidate.config)

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Valid points of the same backend, one step away in one choice; for names without order, any other value."""
        space = self.spaces[candidate.backend]
        near = [Candidate(candidate.backend, config) for config in space.neighbours(candidate.config)]
        for name, values in space.choices.items():
            if _ordered(values):
                continue
            for value in values:
                config = {**candidate.config, name: value}
                if value != candidate.config[name] and not space.reasons(config):
                    near.append(Candidate(candidate.backend, config))
        return list({c.key: c for c in near}.values())

    def sample(self, rng: random.Random) -> Candidate:
        """A point drawn uniformly over backends' points, by size before constraints."""
        names = sorted(self.spaces)
        name = rng.choices(names, [self.spaces[n].size for n in names])[0]
        return Candidate(name, self.spaces[name].sample(rng))

    def to_params(self, candidate: Candidate) -> dict[str, Any]:
        """The candidate as parameters of a study."""
        params: dict[str, Any] = {"backend": candidate.backend}
        for name, values in self.spaces[candidate.backend].choices.items():
            value = candidate.config[name]
            params[f"{candidate.backend}.{name}"] = list(values).index(value) if _ordered(values) else value
        return params

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """Let the study's sampler choose; the result may break a constraint of the space."""
        backend = trial.suggest_categorical("backend", sorted(self.spaces))
        config: dict[str, Value] = {}
        for name, values in self.spaces[backend].choices.items():
            key = f"{backend}.{name}"
            if _ordered(values):
                config[name] = values[trial.suggest_int(key, 0, len(values) - 1)]
            else:
                config[name] = cast("Value", trial.suggest_categorical(key, list(values)))
        return Candidate(backend, config)

    def signature(self) -> dict[str, Any]:
        """Names and values of every space, as plain data."""
        return {n: {c: list(v) for c, v in space.choices.items()} for n, space in sorted(self.spaces.items())}

    def fingerprint(self) -> dict[str, str]:
        """A digest of each space: of its choices, its constraints in words, and its first valid points."""
        return {name: _digest(space) for name, space in sorted(self.spaces.items())}


def _digest(space: SearchSpace) -> str:
    points = [list(point.values()) for point in itertools.islice(space.points(), POINTS)]
    parts = [[[c, list(v)] for c, v in space.choices.items()], [text for text, _ in space.constraints], points]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _ordered(values: Any) -> bool:
    """Numbers have an order; names and switches have none."""
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
