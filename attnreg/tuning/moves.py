"""Moves: from what a search has found to the next candidate that is worth a look."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attnreg.measure import Candidate
from attnreg.tuning.joint import JointSpace

__all__ = ["WORST", "Found", "Moves"]

WORST = 1e6
"""Seconds told for what cannot be used; its violated constraint, not this number, is what the sampler learns from."""
ELITE = 8
FAR = 3.0
"""A backend whose best is this many times slower than the best of all is not climbed."""
NEAR = 1.25
"""Beside the best few of all, those within this factor of the best are worth a look."""
TRIES = 200

Move = tuple[Candidate, str]


@dataclass
class Found:
    """What was looked at: seconds by key (WORST: not usable), and of usable ones; the best, of all and by backend."""

    seen: dict[str, float] = field(default_factory=dict)
    usable: dict[Candidate, float] = field(default_factory=dict)
    best: tuple[float, Candidate] | None = None
    tops: dict[str, tuple[float, Candidate]] = field(default_factory=dict)

    def note(self, candidate: Candidate, seconds: float | None) -> None:
        """Take in a result; None for a candidate that must not be used."""
        self.seen[candidate.key] = WORST if seconds is None else seconds
        if seconds is None:
            return
        self.usable[candidate] = seconds
        made = (seconds, candidate)
        self.best = min(self.best or made, made, key=lambda top: top[0])
        self.tops[candidate.backend] = min(self.tops.get(candidate.backend, made), made, key=lambda top: top[0])

    def elites(self) -> list[Candidate]:
        """The best few that are not far from the best."""
        ranked = sorted(self.usable.items(), key=lambda item: item[1])[:ELITE]
        return [c for c, seconds in ranked if seconds <= NEAR * ranked[0][1]]


class Moves:
    """Ways to go on from `found`; each gives a candidate that is `fresh` and the way's name, or None."""

    def __init__(self, space: JointSpace, found: Found, fresh: Callable[[Candidate], bool], rng: random.Random) -> None:
        self.space, self.found, self.fresh, self.rng = space, found, fresh, rng

    def descend(self) -> Move | None:
        """An untried neighbour of a backend's best, if one is left; the fastest backend first.

        Each backend that is not far off climbs to its own top: the best by default need not be the best when tuned.
        """
        for seconds, candidate in sorted(self.found.tops.values(), key=lambda top: top[0]):
            if self.found.best is not None and seconds > FAR * self.found.best[0]:
                break
            near = [c for c in self.space.neighbours(candidate) if self.fresh(c)]
            if near:
                return self.rng.choice(near), "descent"
        return None

    def beside_elites(self) -> Move | None:
        """The most promising neighbour of all elites: the way to the best need not lead over the best so far."""
        near = {n.key: n for elite in self.found.elites() for n in self.space.neighbours(elite) if self.fresh(n)}
        return (self._promising(list(near.values())), "elite") if near else None

    def mutant(self) -> Move | None:
        """An elite with two of its choices drawn anew: near, and past what one step reaches."""
        elites = self.found.elites()
        for _ in range(TRIES if elites else 0):
            parent = self.rng.choice(elites)
            choices = self.space.spaces[parent.backend].choices
            names = self.rng.sample(sorted(choices), min(2, len(choices)))
            changed = {**parent.config, **{n: self.rng.choice(list(choices[n])) for n in names}}
            if self.fresh(Candidate(parent.backend, changed)):
                return Candidate(parent.backend, changed), "mutant"
        return None

    def anywhere(self) -> Move | None:
        """A point drawn from all."""
        for _ in range(TRIES):
            candidate = self.space.sample(self.rng)
            if self.fresh(candidate):
                return candidate, "random"
        return None

    def _promising(self, fresh: Sequence[Candidate]) -> Candidate:
        """The one beside which the fastest were measured: times change little from one step to the next."""
        worst = math.log(FAR * self.found.best[0]) if self.found.best is not None else 0.0
        seen = self.found.seen

        def expected(candidate: Candidate) -> float:
            around = [seen[n.key] for n in self.space.neighbours(candidate) if n.key in seen]
            return statistics.fmean(min(math.log(seconds), worst) for seconds in around) if around else worst

        return min(fresh, key=lambda c: (expected(c), self.rng.random()))
