"""Evaluate one candidate: gate, then memory, then time against a reference in the same rounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnreg.measure import Bench, Candidate, Died, Opened, Refusal, Round, Verdict
from attnreg.tuning.stats import Interval, interval, log_ratios

__all__ = ["Evaluator", "Outcome", "paired", "paired_interval"]

ROUNDS = 5
CLOSE_ROUNDS = 12
CLOSE = math.log(1.08)
"""A candidate within this of the reference, or faster, is timed for more rounds: the order of the best matters."""
GIVE_UP = 3.0
"""One whose calls take this many times as long as the reference is not made ready for timing at all."""
HOPELESS = 1.5
"""A candidate this many times slower than the reference is not timed further."""
CONFIDENCE = 0.99
FASTER = 0.8
"""One this much faster takes the reference's place. Not sooner: each change adds its own error to all that follow."""


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    seconds: its time, as if taken under the conditions of the first candidate; None if it must not be used.
    kind: "ok", or "gate", "leak", "raise", "crash", "hang", "memory" with the reason. reference: it is what later
    candidates are timed against. least: what it may have taken at the least, by the interval of the same rounds; 0
    where they were too few for one.
    """

    seconds: float | None
    kind: str = "ok"
    reason: str = ""
    verdict: Verdict | None = None
    peak_memory: int = 0
    reference: bool = False
    least: float = 0.0

    def notes(self) -> dict[str, Any]:
        """Plain data to keep with the trial."""
        data: dict[str, Any] = {"kind": self.kind, "reason": self.reason, "peak_memory": self.peak_memory}
        data["least"] = self.least
        data |= {"reference": True} if self.reference else {}
        return {**data, "verdict": asdict(self.verdict) if self.verdict is not None else None}


class Evaluator:
    """Evaluates candidates one after another on a bench. `reference`: the one they are timed against, and its seconds.

    Machines drift over the minutes of a search. Each candidate is timed in turns with the reference, and its time is
    that one's times their ratio: drift cancels, and all errors are relative to one and the same sample.
    """

    def __init__(self, bench: Bench, reference: tuple[Candidate, float] | None = None) -> None:
        self.bench = bench
        self.reference = reference

    def evaluate(self, candidate: Candidate) -> Outcome:
        """Gate it, open it, time it."""
        verdict: Verdict | None = None
        try:
            verdict = self.bench.gate(candidate, "quick")
            if not verdict.ok:
                return Outcome(None, "gate", verdict.reason)
            give_up = GIVE_UP * self.reference[1] if self.reference else 0.0
            opened = self.bench.open(candidate, give_up)
            if opened.leak:
                self._close(candidate)
                return Outcome(None, "leak", f"leaves {opened.leak} bytes behind at each call", verdict)
            far = self._far_behind(opened)
            seconds, least = (far, far) if far is not None else self._time(candidate, opened.seconds)
        except Refusal as why:
            self._close(candidate)
            if why.candidate not in (None, candidate) and self.reference is not None:
                # The reference broke while this one was timed against it: it must go, this one may yet be fine.
                self.reference = None
                return self.evaluate(candidate)
            return Outcome(None, why.kind if isinstance(why, Died) else "raise", str(why), verdict)
        chosen = self.reference is not None and self.reference[0] == candidate
        return Outcome(seconds, "ok", "", verdict, opened.peak_memory, chosen, least)

    def _far_behind(self, opened: Opened) -> float | None:
        """The time of a candidate that `open` gave up, if it is slow by what the reference takes right now."""
        if self.reference is None or not opened.given_up:
            return None
        reference, usual = self.reference
        now = min(r.seconds[0] for r in self.bench.rounds([reference], 2))
        ratio = opened.seconds / now
        return usual * ratio if ratio > HOPELESS else None

    def _time(self, candidate: Candidate, roughly: float) -> tuple[float, float]:
        """Its seconds, and what it may have taken at the least."""
        if self.reference is None:
            rounds = self.bench.rounds([candidate], CLOSE_ROUNDS)
            seconds = _median([r.seconds[0] for r in rounds if r.quiet[0]] or [r.seconds[0] for r in rounds])
            self.reference = (candidate, seconds)
            return seconds, seconds
        reference, usual = self.reference
        # One bad first sample must not cast out a good candidate: two, with the roughly known time, may.
        rounds = self.bench.rounds([reference, candidate], 2)
        ratio = _ratio(rounds)
        if ratio < HOPELESS or roughly < HOPELESS * usual:
            rounds += self.bench.rounds([reference, candidate], ROUNDS - len(rounds))
            ratio = _ratio(rounds)
        if math.log(ratio) <= CLOSE:
            rounds += self.bench.rounds([reference, candidate], CLOSE_ROUNDS - len(rounds))
            ratio = _ratio(rounds)
        if ratio >= FASTER:
            self._close(candidate)
            return usual * ratio, usual * math.exp(paired_interval(rounds, 1, 0, CONFIDENCE)[0])
        # Fresh rounds: those that made it look fastest were lucky ones, and its error goes into all that follow.
        seconds = usual * _ratio(self.bench.rounds([reference, candidate], CLOSE_ROUNDS))
        self._close(reference)
        self.reference = (candidate, seconds)
        return seconds, seconds

    def _close(self, candidate: Candidate) -> None:
        with contextlib.suppress(Refusal):
            self.bench.close(candidate)


def paired(rounds: Sequence[Round], one: int, other: int) -> list[float]:
    """log(time of `one` / time of `other`) of the rounds in which both ran undisturbed; of all if few did.

    On a machine that is never quiet, many disturbed pairs say more than two quiet ones.
    """
    clean = [r for r in rounds if r.quiet[one] and r.quiet[other]]
    return _logs(clean if 2 * len(clean) >= len(rounds) else rounds, one, other)


def paired_interval(rounds: Sequence[Round], one: int, other: int, confidence: float) -> Interval:
    """(low, estimate, high) of the paired log ratios: of all rounds where the undisturbed ones are too few for an
    interval, which would call anything a tie."""
    found = interval(paired(rounds, one, other), confidence)
    return found if math.isfinite(found[0]) else interval(_logs(rounds, one, other), confidence)


def _logs(rounds: Sequence[Round], one: int, other: int) -> list[float]:
    return log_ratios([r.seconds[one] for r in rounds], [r.seconds[other] for r in rounds])


def _ratio(rounds: Sequence[Round]) -> float:
    """The second candidate's time over the first one's."""
    return math.exp(interval(paired(rounds, 1, 0), 0.9)[1])


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
