"""A bench whose times come from a model: what search and race decide can be checked against the truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Literal

from attnreg.measure import About, Candidate, Opened, Refusal, Round, Verdict


class FakeBench:
    """Times from `truth` (seconds by candidate), times noise and a drift common to a round.

    breaks: candidate key -> the exception to raise when it is opened or timed. disturbed: share of samples that
    are slowed threefold and marked as not quiet.
    """

    def __init__(
        self,
        truth: Callable[[Candidate], float | None],
        *,
        noise: float = 0.02,
        drift: float = 0.2,
        disturbed: float = 0.0,
        memory: Callable[[Candidate], int] = lambda c: 0,
        breaks: Mapping[str, Callable[[Candidate], Exception]] | None = None,
        seed: int = 0,
    ) -> None:
        self.truth = truth
        self.noise = noise
        self.drift = drift
        self.disturbed = disturbed
        self.memory = memory
        self.breaks = dict(breaks or {})
        self.random = random.Random(seed)
        self.gated: list[str] = []
        self.timed: list[str] = []

    def __enter__(self) -> FakeBench:
        return self

    def __exit__(self, *_: object) -> None: ...

    def about(self) -> About:
        return About({"a": "1", "b": "1"}, "perf_counter")

    def gate(self, candidate: Candidate, budget: Literal["quick", "full"]) -> Verdict:
        self.gated.append(candidate.key)
        return Verdict(self.truth(candidate) is not None, "" if self.truth(candidate) is not None else "wrong")

    def open(self, candidate: Candidate, give_up: float = 0.0) -> Opened:
        self._check(candidate)
        seconds = self.truth(candidate)
        assert seconds is not None, "opened a candidate that failed the gate"
        return Opened(seconds, self.memory(candidate), 0)

    def rounds(self, candidates: list[Candidate], count: int) -> list[Round]:
        out = []
        for _ in range(count):
            machine = self.random.lognormvariate(0, self.drift)
            seconds, quiet = [], []
            for candidate in candidates:
                assert candidate.key in self.gated, "timed before the gate"
                self._check(candidate)
                self.timed.append(candidate.key)
                truth = self.truth(candidate)
                assert truth is not None
                slow = self.random.random() < self.disturbed
                seconds.append(truth * machine * self.random.lognormvariate(0, self.noise) * (3 if slow else 1))
                quiet.append(not slow)
            out.append(Round(tuple(seconds), tuple(quiet)))
        return out

    def close(self, candidate: Candidate) -> None: ...

    def _check(self, candidate: Candidate) -> None:
        if candidate.key in self.breaks:
            raise self.breaks[candidate.key](candidate)


def refuse(candidate: Candidate) -> Refusal:
    return Refusal("raised RuntimeError: as planned", candidate)
