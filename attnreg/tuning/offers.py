"""Offers: what backends have to compile for a target, in order: good seeds, then the best of what they foresee."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from attnreg.backend import Backend, error_text
from attnreg.decide import WRITTEN_ORDER
from attnreg.hardware import Hardware
from attnreg.measure import Candidate
from attnreg.problem import Problem
from attnreg.space import SearchSpace, Value
from attnreg.tuning.spaces import usable_space

__all__ = ["Offer", "offer_of", "queue_of"]

ENUMERATE = 4000
"""Spaces of at most this many points are foreseen whole; larger ones by climbing from their seeds and a sample."""
STARTS = 8
"""Random points, besides the default and the seeds, that climbing starts from."""
FAR = 2.0
"""Seeds that are foreseen to take this many times as long as the best of all are not compiled."""


@dataclass(frozen=True)
class Offer:
    """What a backend has to compile: `plain` as it comes; or what it foresaw, with the time, and its seeds."""

    plain: list[Candidate]
    times: dict[Candidate, float] = field(default_factory=dict)
    seeds: list[Candidate] = field(default_factory=list)


class _Unforeseen(Exception):  # noqa: N818  # a reason to set a backend aside, not an error of this program
    """What a backend's foresee() did instead of foreseeing."""


def offer_of(name: str, backend: Backend, problem: Problem, hardware: Hardware, limit: int, seed: int) -> Offer | str:
    """A backend's candidates; or, where its own code breaks, the reason to set it aside with."""
    space = usable_space(backend, problem, hardware)
    if not isinstance(space, SearchSpace):
        return space
    try:
        if getattr(backend, "foresee", None) is None:
            return Offer([Candidate(name, config) for config in _configs(space, limit, seed)])
        pool = _pool(space, _foresight(backend, problem, hardware.arch), random.Random(seed))
        times = {Candidate(name, config): seconds for config, seconds in pool}
    except _Unforeseen as why:
        return f"its foresee() {why}"
    except (Exception, SystemExit) as error:  # its constraints, at points that nobody had walked to
        return f"its space() raised {error_text(error)}"
    return Offer([], times, [Candidate(name, config) for config in _known(space)])


def queue_of(offers: Mapping[str, Offer]) -> tuple[list[Candidate], list[Candidate], int]:
    """(candidates in the order of compiling, all seeds, how many were foreseen): good seeds, then the best foreseen."""
    plain: list[Candidate] = []
    times: dict[Candidate, float] = {}
    seeds: list[Candidate] = []
    order = {name: n for n, name in enumerate(WRITTEN_ORDER)}
    for name in sorted(offers, key=lambda n: order.get(n, len(order))):  # a small budget goes to the first of the order
        plain += offers[name].plain
        times |= offers[name].times
        seeds += offers[name].seeds
    best = min(times.values(), default=0.0)
    first = [c for c in seeds if times.get(c, best) <= FAR * best]
    rest = sorted(times, key=lambda c: (times[c], c.key))
    return list(dict.fromkeys([*plain, *first, *rest])), seeds, len(times)


def _foresight(backend: Backend, problem: Problem, target: str) -> Callable[[dict[str, Value]], float]:
    def foresee(config: dict[str, Value]) -> float:
        try:
            seconds = float(backend.foresee(problem, config, target))  # type: ignore[attr-defined]  # optional
        except (Exception, SystemExit) as error:
            raise _Unforeseen(f"raised {error_text(error)}") from error
        if math.isnan(seconds):  # it would sort anywhere
            raise _Unforeseen("must return seconds, got nan")
        return seconds

    return foresee


def _known(space: SearchSpace) -> list[dict[str, Value]]:
    """The default and the seeds, each once."""
    out: list[dict[str, Value]] = []
    for config in (space.default, *space.seeds):
        if dict(config) not in out:
            out.append(dict(config))
    return out


def _pool(
    space: SearchSpace, foresee: Callable[[dict[str, Value]], float], rng: random.Random
) -> Iterator[tuple[dict[str, Value], float]]:
    """(configuration, foreseen seconds) of a small space's every point, or of what climbing a large one passes."""
    if space.size <= ENUMERATE:
        for config in space.points():
            yield config, foresee(config)
        return
    seen: dict[tuple[Value, ...], float] = {}
    names = list(space.choices)

    def look(config: dict[str, Value]) -> float:
        key = tuple(config[name] for name in names)
        if key not in seen:
            seen[key] = foresee(config)
        return seen[key]

    for start in [*_known(space), *(space.sample(rng) for _ in range(STARTS))]:
        here = dict(start)
        while True:
            near = min(space.neighbours(here), key=look, default=here)
            if look(near) >= look(here):
                break
            here = near
    for key, seconds in seen.items():
        yield dict(zip(names, key, strict=True)), seconds


def _configs(space: SearchSpace, limit: int, seed: int) -> list[dict[str, Value]]:
    """The whole space if it is small enough, else its default, its seeds and a sample."""
    points = [dict(p) for _, p in zip(range(limit + 1), space.points(), strict=False)]
    if len(points) <= limit:
        return points
    out: list[dict[str, Value]] = []
    rng = random.Random(seed)
    for config in [*_known(space), *(space.sample(rng) for _ in range(10 * limit))]:
        if dict(config) not in out and len(out) < limit:
            out.append(dict(config))
    return out
