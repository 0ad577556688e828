"""Recordings: every point of a problem's joint space, gated and timed once, as data to replay searches on."""

from __future__ import annotations

import datetime
import functools
import json
import math
import statistics
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnreg import registry
from attnreg.errors import RecordError
from attnreg.hardware import detect
from attnreg.measure import Candidate, Plan, Refusal, Worker
from attnreg.problem import Problem
from attnreg.records import software
from attnreg.space import Config, SearchSpace, Value
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.stats import interval, log_ratios

__all__ = ["Recording", "record_space", "recordings"]

AGAIN = 8
"""How often a sample that the probes call disturbed is taken again."""


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


def record_space(
    name: str,
    problem: Problem,
    backends: Sequence[str],
    *,
    rounds: int = 30,
    threads: int = 0,
    sample_seconds: float = 8e-3,
    time_limit: float = 120.0,
    only: Mapping[str, Sequence[Value]] = types.MappingProxyType({}),
    on_progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> Recording:
    """Gate and time every point of the joint space of these backends.

    rounds: of every point, so many that the best is known to well under one per cent. threads: torch's, 0 for what
    it has. only: of a choice of that name, these values: a space of thousands of points takes hours.
    """
    hardware = detect(problem.device)
    entries = registry.current().entries
    spaces = {b: _narrowed(entries[b].backend.space(problem.bucket(), hardware), only) for b in backends}
    joint = JointSpace(spaces)
    every = list(joint.points())
    usable: list[Candidate] = []
    times: dict[str, list[float]] = {c.key: [] for c in every}
    plan = Plan(problem, threads=threads, sample_seconds=sample_seconds, time_limit=time_limit, leak_seconds=0.0)
    with Worker(plan) as worker:
        for n, candidate in enumerate(every):
            on_progress("gate", n, len(every))
            try:
                if worker.gate(candidate, "quick").ok:
                    worker.open(candidate)
                    usable.append(candidate)
            except Refusal:
                continue
        for n in range(rounds):
            on_progress("time", n, rounds)
            for candidate, seconds in _quiet_round(worker, usable).items():
                times[candidate.key].append(seconds)
        about = {
            "hardware": hardware.slug,
            "software": {**software(), "backends": {b: worker.about().versions[b] for b in backends}},
            "threads": worker.plan.threads,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
    starts = [Candidate(b, s.default) for b, s in sorted(spaces.items())]
    starts += [Candidate(b, seed) for b, s in sorted(spaces.items()) for seed in s.seeds]
    points = tuple((c, tuple(times[c.key])) for c in every)
    return Recording(name, problem, joint.signature(), points, tuple(starts), about)


def _quiet_round(worker: Worker, usable: list[Candidate]) -> dict[Candidate, float]:
    """One sample of each; those that the probes call disturbed are taken again, up to `AGAIN` times."""
    out: dict[Candidate, float] = {}
    left = usable
    for _ in range(AGAIN + 1):
        [one] = worker.rounds(left, 1)
        for candidate, seconds in zip(left, one.seconds, strict=True):
            out[candidate] = min(seconds, out.get(candidate, math.inf))
        left = [c for c, quiet in zip(left, one.quiet, strict=True) if not quiet]
        if not left:
            break
    return out


def recordings(folder: Path | None = None) -> list[Recording]:
    """The recordings in a folder; those that come with attnreg unless one is given."""
    root = folder if folder is not None else Path(str(files("attnreg.tuning"))) / "replays"
    return [Recording.from_json(json.loads(path.read_text())) for path in sorted(root.glob("*.json"))]


def _narrowed(space: SearchSpace, only: Mapping[str, Sequence[Value]]) -> SearchSpace:
    """The space with fewer values; its default is the first of the default and the seeds that is left."""
    choices = {name: [v for v in values if v in only.get(name, values)] for name, values in space.choices.items()}
    starts = [dict(s) for s in (space.default, *space.seeds) if all(s[name] in choices[name] for name in choices)]
    if not starts:
        raise RecordError(f"only: neither the default nor a seed lies in {choices}")
    return replace(space, choices=choices, default=starts[0], seeds=starts[1:])


def _recorded(name: str, choices: dict[str, list[Any]], valid: set[str]) -> SearchSpace:
    def recorded(config: Config) -> bool:
        return Candidate(name, config).key in valid

    made = SearchSpace({choice: tuple(values) for choice, values in choices.items()})
    default = next(point for point in made.points() if recorded(point))
    return replace(made, default=default, constraints=[("a recorded point", recorded)])
