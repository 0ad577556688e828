"""Replay: run the tuner on recorded spaces, to see how much of a space it needs to find the best."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import optuna
from rich.console import Console

from attnreg.measure import About, Candidate, Opened, Round, Verdict
from attnreg.sheet import Sheet, paragraph
from attnreg.tuning.evaluate import Evaluator
from attnreg.tuning.finals import field_of, more_of
from attnreg.tuning.race import race
from attnreg.tuning.recording import Recording, recordings
from attnreg.tuning.report import Looked
from attnreg.tuning.search import Search, make_sampler

__all__ = ["ReplayBench", "Row", "compare", "replay", "replay_random", "show"]


class ReplayBench:
    """A bench that answers from a recording: a round of the bench is a recorded round, drawn at random."""

    def __init__(self, recording: Recording, seed: int) -> None:
        self.times = {c.key: times for c, times in recording.points}
        self.random = random.Random(seed)
        self.evaluated: set[str] = set()

    def __enter__(self) -> ReplayBench:
        return self

    def __exit__(self, *_: object) -> None: ...

    def about(self) -> About:
        return About({}, "replay")

    def gate(self, candidate: Candidate, budget: Literal["quick", "full"]) -> Verdict:
        self.evaluated.add(candidate.key)
        ok = bool(self.times[candidate.key])
        return Verdict(ok, "" if ok else "failed when it was recorded")

    def open(self, candidate: Candidate, give_up: float = 0.0) -> Opened:
        seconds = self.random.choice(self.times[candidate.key])
        return Opened(seconds, 0, 0)

    def rounds(self, candidates: list[Candidate], count: int) -> list[Round]:
        out = []
        for _ in range(count):
            n = self.random.randrange(min(len(self.times[c.key]) for c in candidates))
            out.append(Round(tuple(self.times[c.key][n] for c in candidates), (True,) * len(candidates)))
        return out

    def close(self, candidate: Candidate) -> None: ...


def replay(recording: Recording, seed: int, share: float = 0.25) -> tuple[int, float]:
    """One tune of a recording: (candidates looked at, time of the pick over the time of the best, minus one).

    The search is told to look at no more than `share` of the space and not to enumerate it.
    """
    space = recording.space()
    bench = ReplayBench(recording, seed)
    study = optuna.create_study(sampler=make_sampler(seed))
    starts = [(c, "seed") for c in recording.starts]
    limit = max(1, int(share * len(recording.points)))
    search = Search(study, space, starts, limit=limit, enumerate_up_to=0, seed=seed)
    evaluator = Evaluator(bench)
    found: list[tuple[float, Candidate]] = []
    while (proposal := search.ask()) is not None:
        outcome = evaluator.evaluate(proposal.candidate)
        search.tell(proposal, outcome.seconds)
        if outcome.seconds is not None:
            found.append((outcome.seconds, proposal.candidate))
    return len(bench.evaluated), _gap(recording, bench, found)


def replay_random(recording: Recording, seed: int, evaluations: int) -> float:
    """Random search with as many evaluations, timed and raced the same way; the gap of its pick."""
    bench = ReplayBench(recording, seed)
    evaluator = Evaluator(bench)
    points = [c for c, _ in recording.points]
    found = []
    for candidate in random.Random(seed).sample(points, min(evaluations, len(points))):
        seconds = evaluator.evaluate(candidate).seconds
        if seconds is not None:
            found.append((seconds, candidate))
    return _gap(recording, bench, found)


@dataclass(frozen=True)
class Row:
    """One line of `attnreg bench tuner`, over its seeds: medians, and the gap's 90th percentile."""

    name: str
    points: int
    evaluations: float
    share: float
    gap: float
    gap_90: float
    random_gap: float
    random_gap_90: float
    seeds: int

    @property
    def ok(self) -> bool:
        """Within one per cent of the best at the median, with at most a quarter of the evaluations."""
        return self.gap <= 0.01 and self.share <= 0.25


def compare(which: Iterable[Recording] | None = None, seeds: int = 20, share: float = 0.25) -> list[Row]:
    """The tuner and random search on each recording."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return [_row(recording, seeds, share) for recording in (recordings() if which is None else which)]
    finally:
        optuna.logging.set_verbosity(before)


def _row(recording: Recording, seeds: int, share: float) -> Row:
    runs = [replay(recording, seed, share) for seed in range(seeds)]
    chance = sorted(replay_random(recording, seed, evaluations) for seed, (evaluations, _) in enumerate(runs))
    gaps = sorted(gap for _, gap in runs)
    count = statistics.median(evaluations for evaluations, _ in runs)
    total = len(recording.points)
    return Row(
        name=recording.name,
        points=total,
        evaluations=count,
        share=count / total,
        gap=statistics.median(gaps),
        gap_90=gaps[min(math.ceil(0.9 * seeds), seeds) - 1],
        random_gap=statistics.median(chance),
        random_gap_90=chance[min(math.ceil(0.9 * seeds), seeds) - 1],
        seeds=seeds,
    )


def _gap(recording: Recording, bench: ReplayBench, found: list[tuple[float, Candidate]]) -> float:
    """Race the best few, and compare the winner with the best of the whole space."""
    if not found:
        return math.inf
    looked = [Looked(c, seconds, "") for seconds, c in sorted(found, key=lambda pair: pair[0])]
    field = field_of(looked)
    finalists = [x.candidate for x in (*field, *more_of(looked, field))]
    finish = race(bench, finalists, {})
    truth = recording.truth()
    assert finish is not None, "a recording does not break"
    return truth[finish.winner.key] / min(truth.values()) - 1


def show(console: Console, seeds: int = 20) -> list[Row]:
    """Print the comparison as a table, the search beside random search; returns its rows."""
    heads = ("space", "points", "looked", "share", "pick over best", "90%", "random", "90%", "verdict")
    sheet = Sheet(*heads, title=f"tuner on recorded spaces, {seeds} seeds")
    rows: list[Row] = []
    slugs: set[str] = set()
    for recording in recordings():
        [row] = compare([recording], seeds)
        rows.append(row)
        gaps = (row.gap, row.gap_90, row.random_gap, row.random_gap_90)
        slugs.add(str(recording.about["hardware"]))
        verdict = "ok" if row.ok else "MISSED"
        counts = (str(row.points), f"{row.evaluations:g}", f"{row.share:.0%}")
        sheet.add(row.name, *counts, *(f"+{gap:.2%}" for gap in gaps), verdict)
    sheet.print(console)
    paragraph(console, f"recorded on {', '.join(sorted(slugs))}; `random`: random search of as many points")
    paragraph(console, "goal: within 1% of the best of the whole space at the median, with at most 25% of its points")
    return rows
