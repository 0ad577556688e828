"""What a tune found, for people and programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnreg.measure import Candidate
from attnreg.problem import Problem
from attnreg.records import Record, Rival

__all__ = ["Looked", "Progress", "Refused", "TuneReport", "seconds_text"]


@dataclass(frozen=True)
class Refused:
    """A candidate that must not be used. kind: gate, leak, raise, crash, hang, memory."""

    candidate: Candidate
    kind: str
    reason: str


@dataclass(frozen=True)
class Looked:
    """A usable candidate: seconds a call, why it was tried, peak bytes, seconds that it may have taken at the least."""

    candidate: Candidate
    seconds: float
    why: str
    peak_memory: int = 0
    least: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Where a tune stands. stage: "search", "gate", "race" or "done"; total: an upper bound, None if unknown."""

    stage: str
    done: int
    total: int | None
    best: tuple[Candidate, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class TuneReport:
    """The result of tuning one problem.

    winner: None where nothing usable was found. ratios: of every other finalist's time over the winner's, with its
    interval at `confidence`. ties: finalists not shown to be slower. level: others, which the race had no room
    for and the search did not show to be slower. looked: usable candidates, fastest first.
    refused: those that failed, with their reason. unsupported: backends that refuse the problem. resumed: how many
    results came from an earlier, interrupted run. stopped: why the search ended. notes: what else should be known.
    """

    problem: Problem
    winner: Candidate | None
    seconds: float | None
    runner_up: Rival | None
    ties: tuple[Rival, ...]
    looked: tuple[Looked, ...]
    refused: tuple[Refused, ...]
    unsupported: Mapping[str, tuple[str, ...]]
    trials: int
    resumed: int
    stopped: str
    elapsed: float
    confidence: float
    noisy: bool
    rounds: int
    dropped: int
    record: Record | None = None
    notes: tuple[str, ...] = field(default=())
    level: tuple[Looked, ...] = field(default=())

    def agrees(self, other: TuneReport) -> bool:
        """Do two tunes of one problem pick the same, or does one name the other's pick as a tie?"""
        if self.winner is None or other.winner is None:
            return self.winner is other.winner
        return self.winner.key in other._named() or other.winner.key in self._named()

    def _named(self) -> set[str]:
        """Keys of the winner and of what it ties with."""
        named = [*(Candidate(t.backend, t.config) for t in self.ties), *(x.candidate for x in self.level)]
        return {c.key for c in (*named, self.winner) if c is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "problem": self.problem.to_json(),
            "winner": None if self.winner is None else _candidate(self.winner),
            "seconds": self.seconds,
            "confidence": self.confidence,
            "runner_up": None if self.runner_up is None else _rival(self.runner_up),
            "ties": [_rival(t) for t in self.ties],
            "level": [{**_candidate(x.candidate), "seconds": x.seconds} for x in self.level],
            "looked": [{**_candidate(x.candidate), "seconds": x.seconds, "why": x.why} for x in self.looked],
            "refused": [{**_candidate(r.candidate), "kind": r.kind, "reason": r.reason} for r in self.refused],
            "unsupported": {name: list(why) for name, why in self.unsupported.items()},
            "trials": self.trials,
            "resumed": self.resumed,
            "stopped": self.stopped,
            "elapsed": round(self.elapsed, 3),
            "noisy": self.noisy,
            "rounds": self.rounds,
            "dropped": self.dropped,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"problem    {self.problem}"]
        if self.winner is None:
            lines.append("winner     none: no candidate is usable")
        else:
            lines.append(f"winner     {self.winner}, {seconds_text(self.seconds or math.nan)}")
        if self.runner_up is not None:
            lines.append(f"runner-up  {_rival_text(self.runner_up)}")
        lines += [f"tie        {_rival_text(t)}" for t in self.ties]
        if self.level:
            lines.append(f"level      {len(self.level)} more by the search, which the race had no room for")
        resumed = f", resumed {self.resumed} trials" if self.resumed else ""
        lines.append(f"search     {self.trials} trials{resumed}; {self.stopped}; {self.elapsed:.1f} s")
        clock = f"{self.rounds} rounds, {self.dropped} samples dropped as disturbed"
        lines.append(f"clock      {clock}{'; THE MACHINE IS NOISY: run again when it is quiet' if self.noisy else ''}")
        lines += [f"refused    {r.candidate}: {r.kind}: {r.reason}" for r in self.refused]
        lines += [f"cannot     {name}: {'; '.join(why)}" for name, why in self.unsupported.items()]
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join(lines)


def seconds_text(s: float) -> str:
    """A time in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if s >= size:
            return f"{s / size:.4g} {unit}"
    return f"{s * 1e6:.4g} us"


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"backend": candidate.backend, "config": dict(candidate.config)}


def _rival(rival: Rival) -> dict[str, Any]:
    data = {"backend": rival.backend, "config": dict(rival.config), "seconds": rival.seconds}
    return {**data, "ratio": list(rival.ratio)}


def _rival_text(rival: Rival) -> str:
    text = str(Candidate(rival.backend, rival.config))
    return f"{text}, {rival.ratio[1]:.3f}x ({rival.ratio[0]:.3f} to {rival.ratio[2]:.3f})" if rival.ratio else text
