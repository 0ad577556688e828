"""Recordings: every point of a problem's joint space, gated and timed once, as data to replay searches on."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnreg.errors import RecordError
from attnreg.measure import Candidate
from attnreg.problem import Problem
from attnreg.space import Config, SearchSpace
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.stats import interval, log_ratios

__all__ = ["Recording", "recordings"]


@dataclass(frozen=True)
class Recording:
    """Times of every point of a problem's joint space, measured in interleaved rounds.

    points: each candidate with one time a round, in seconds; empty where it failed the gate or broke. defaults and
    seeds: what the backends offered to start from. about: hardware slug, software, date and threads.
    """

    name: str
    problem: Problem
    spaces: dict[str, dict[str, list[Any]]]
    points: tuple[tuple[Candidate, tuple[float, ...]], ...]
    starts: tuple[Candidate, ...]
    about: dict[str, Any]

    def space(self) -> JointSpace:
        """The recorded space; what was not a valid point then is none now."""
        valid = {c.key for c, _ in self.points}
        return JointSpace({name: _recorded(name, choices, valid) for name, choices in self.spaces.items()})

    def truth(self) -> Mapping[str, float]:
        """Time of each usable candidate by key: drift by rounds taken out, estimated as a race does."""
        return self._truth

    @functools.cached_property
    def _truth(self) -> Mapping[str, float]:
        usable = [(c.key, times) for c, times in self.points if times]
        speeds = [statistics.median(one) for one in zip(*(times for _, times in usable), strict=True)]
        scale = statistics.median(speeds)
        return {key: scale * math.exp(interval(log_ratios(times, speeds), 0.9)[1]) for key, times in usable}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [[c.backend, dict(c.config), [float(f"{t:.4g}") for t in times]] for c, times in self.points]
        return {
            "name": self.name,
            "problem": self.problem.to_json(),
            "spaces": self.spaces,
            "points": rows,
            "starts": [[c.backend, dict(c.config)] for c in self.starts],
            "about": self.about,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recording:
        """The recording that `to_json` described. Raises RecordError if it is none."""
        try:
            points = tuple((Candidate(b, config), tuple(map(float, times))) for b, config, times in data["points"])
            starts = tuple(Candidate(b, config) for b, config in data["starts"])
            problem = Problem.from_json(data["problem"])
            return Recording(data["name"], problem, data["spaces"], points, starts, data["about"])
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"recording: {error!r}") from error


def recordings(folder: Path | None = None) -> list[Recording]:
    """The recordings in a folder; those that come with attnreg unless one is given."""
    root = folder if folder is not None else Path(str(files("attnreg.tuning"))) / "replays"
    return [Recording.from_json(json.loads(path.read_text())) for path in sorted(root.glob("*.json"))]


def _recorded(name: str, choices: dict[str, list[Any]], valid: set[str]) -> SearchSpace:
    def recorded(config: Config) -> bool:
        return Candidate(name, config).key in valid

    made = SearchSpace({choice: tuple(values) for choice, values in choices.items()})
    default = next(point for point in made.points() if recorded(point))
    return replace(made, default=default, constraints=[("a recorded point", recorded)])
