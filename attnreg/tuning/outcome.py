"""From a finished search and race to the report and the record."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnreg.measure import Verdict
from attnreg.problem import Problem
from attnreg.records import Gate, Policy, Record, Rival
from attnreg.tuning.race import TIE, Finish
from attnreg.tuning.report import Looked, Refused, TuneReport
from attnreg.tuning.stats import Interval

__all__ = ["Final", "level_with", "make_report"]


@dataclass(frozen=True)
class Final:
    """What search and race left. finish: None where nothing was usable. verdicts: of the full gate, by key."""

    finish: Finish | None
    verdicts: Mapping[str, Verdict]
    looked: Sequence[Looked]
    refused: Sequence[Refused]


def make_report(
    problem: Problem,
    final: Final,
    *,
    unsupported: Mapping[str, tuple[str, ...]],
    trials: int,
    resumed: int,
    stopped: str,
    notes: tuple[str, ...],
    elapsed: float,
    confidence: float,
    circumstances: Mapping[str, Any],
) -> TuneReport:
    """The report; its record is None where no candidate won.

    circumstances: hardware, software, versions of the backends, cache, threads and timer, for the record.
    """
    finish = final.finish
    winner = finish.winner if finish is not None else None
    versions = circumstances["versions"]
    runner_up, ties = _rivals(finish, final.looked, versions) if finish is not None else (None, ())
    record = None
    if finish is not None and winner is not None:
        record = _record(problem, final, finish, runner_up, ties, unsupported, trials, confidence, circumstances)
    return TuneReport(
        problem=problem,
        winner=winner,
        seconds=finish.samples[winner.key].median if finish is not None and winner is not None else None,
        runner_up=runner_up,
        ties=ties,
        looked=tuple(final.looked),
        refused=tuple(final.refused),
        unsupported=dict(unsupported),
        trials=trials,
        resumed=resumed,
        stopped=stopped,
        elapsed=elapsed,
        confidence=confidence,
        noisy=finish.noisy if finish is not None else False,
        rounds=finish.rounds if finish is not None else 0,
        dropped=finish.dropped if finish is not None else 0,
        record=record,
        notes=notes,
        level=level_with(finish, final.looked) if finish is not None else (),
    )


def _rivals(
    finish: Finish, looked: Sequence[Looked], versions: Mapping[str, str]
) -> tuple[Rival | None, tuple[Rival, ...]]:
    """The fastest of the others, and those that tie with the winner."""
    by_key = {x.candidate.key: x.candidate for x in looked}

    def rival(key: str) -> Rival:
        c, seconds = by_key[key], finish.samples[key].median
        return Rival(c.backend, versions[c.backend], dict(c.config), seconds, _ratio(finish.ratios[key]))

    order = sorted(finish.ratios, key=lambda key: finish.ratios[key][1])
    ties = tuple(rival(c.key) for c in sorted(finish.ties, key=lambda c: c.key))
    return (rival(order[0]) if order else None), ties


def level_with(finish: Finish, looked: Sequence[Looked]) -> tuple[Looked, ...]:
    """Who did not race, and was not shown to be slower than the winner by the rounds of the search."""
    won = next((x for x in looked if x.candidate == finish.winner), None)
    raced = {finish.winner.key, *finish.ratios, *finish.broke}
    rest = [x for x in looked if x.candidate.key not in raced and x.least] if won is not None else []
    return tuple(x for x in rest if won and (x.least <= won.seconds or x.seconds <= won.seconds * math.exp(TIE)))


def _ratio(interval: Interval) -> tuple[float, ...]:
    """As factors; empty where the interval is open."""
    if not all(map(math.isfinite, interval)):
        return ()
    return tuple(float(f"{math.exp(x):.6g}") for x in interval)


def _record(
    problem: Problem,
    final: Final,
    finish: Finish,
    runner_up: Rival | None,
    ties: tuple[Rival, ...],
    unsupported: Mapping[str, tuple[str, ...]],
    trials: int,
    confidence: float,
    circumstances: Mapping[str, Any],
) -> Record:
    winner = finish.winner
    verdict = final.verdicts[winner.key]
    memory = {x.candidate.key: x.peak_memory for x in final.looked}
    return Record(
        problem=problem,
        backend=winner.backend,
        version=circumstances["versions"][winner.backend],
        config=dict(winner.config),
        hardware=circumstances["hardware"],
        software=circumstances["software"],
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        policy=Policy(
            cache=circumstances["cache"],
            threads=circumstances["threads"],
            confidence=confidence,
            timer=circumstances["timer"],
            rounds=finish.rounds,
            dropped=finish.dropped,
            noisy=finish.noisy,
        ),
        times=finish.samples[winner.key],
        gate=Gate(*(_short(x) for x in (verdict.error, verdict.bound, verdict.grad_error, verdict.grad_bound))),
        runner_up=runner_up,
        ties=ties,
        refused=_summary(final.refused, unsupported),
        peak_memory=memory.get(winner.key, 0),
        trials=trials,
    )


def _summary(
    refused: Sequence[Refused], unsupported: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[str, int, str], ...]:
    """One line a backend: how many configurations failed, and why the first did; 0 where it refuses the problem."""
    out = {name: (name, 0, "; ".join(why)[:500]) for name, why in unsupported.items()}
    for r in refused:
        name, count, first = out.get(r.candidate.backend, (r.candidate.backend, 0, f"{r.kind}: {r.reason}"[:500]))
        out[name] = (name, count + 1, first)
    return tuple(out[name] for name in sorted(out))


def _short(x: float) -> float:
    return float(f"{x:.4g}") if math.isfinite(x) else 0.0
