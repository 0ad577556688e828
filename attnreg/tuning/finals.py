"""Finals: the best few candidates of a search through the full gate and into the race."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate

import optuna

from attnreg.measure import Bench, Candidate, Refusal, Round, Verdict
from attnreg.tuning.moves import WORST
from attnreg.tuning.outcome import Final
from attnreg.tuning.race import Finish, Lap, race
from attnreg.tuning.report import Looked, Progress, Refused
from attnreg.tuning.search import Search
from attnreg.tuning.stats import least_rounds
from attnreg.tuning.storage import ended, owner

__all__ = ["field_of", "finals", "more_of"]

FINALISTS = 12
CLOSE = 1.10
"""Candidates within this factor of the fastest go to the race."""
RIVAL = 1.6
"""The best of another backend goes too, within this factor: a record should say by how much it lost."""
RACE_SECONDS = 30.0
PLATEAU = 1.05
"""Within this factor candidates may be level: a search favours the lucky. More of them go, if they cost little."""
MOST = 32
MORE_SECONDS = 8.0
"""What the full gates of those, and their first lap, may take each."""


def finals(
    bench: Bench,
    study: optuna.Study,
    search: Search,
    confidence: float,
    seconds_left: float,
    tell: Callable[[Progress], object],
) -> Final:
    """Full gate and race of the best few; what an interrupted session did of it is not done again."""
    looked, refused = _looked(search)
    verdicts: dict[str, Verdict] = {}
    finalists: list[Candidate] = []
    entered = field_of(looked)
    gate_until = time.monotonic() + min(MORE_SECONDS, 0.25 * seconds_left)
    for entry in (*entered, *more_of(looked, entered)):
        candidate = entry.candidate
        if entry not in entered and time.monotonic() > gate_until:
            break
        tell(Progress("gate", len(finalists), FINALISTS, (candidate, entry.seconds), "full gate"))
        verdict = _full_gate(bench, study, candidate)
        if verdict.ok:
            verdicts[candidate.key] = verdict
            finalists.append(candidate)
        else:
            refused.append(Refused(candidate, "gate", verdict.reason))
    if not finalists:
        return Final(None, {}, looked, refused)
    memory = {x.candidate.key: x.peak_memory for x in looked}
    laps = _laps(study)
    finish: Finish | None = race(
        bench,
        finalists,
        memory,
        confidence=confidence,
        seconds=max(min(seconds_left, RACE_SECONDS), 1.0),
        laps=laps,
        on_lap=lambda lap, running: _keep_lap(study, lap, running, tell),
    )
    by_key = {c.key: c for c in finalists}
    for key, (kind, reason) in (finish.broke if finish is not None else {}).items():
        refused.append(Refused(by_key[key], kind, reason))
    return Final(finish, verdicts, looked, refused)


def _looked(search: Search) -> tuple[list[Looked], list[Refused]]:
    looked, refused, seen = [], [], set()
    for trial in search.results():
        said = trial.user_attrs.get("candidate")
        candidate = Candidate(said["backend"], said["config"]) if said else None
        if candidate is None or candidate.key in seen or trial.value is None:
            continue
        seen.add(candidate.key)
        attrs = trial.user_attrs
        if trial.value < WORST:
            about = (attrs.get("why", ""), attrs.get("peak_memory", 0), attrs.get("least", 0.0))
            looked.append(Looked(candidate, trial.value, *about))
        else:
            refused.append(Refused(candidate, attrs.get("kind", "gate"), attrs.get("reason", "")))
    return sorted(looked, key=lambda x: x.seconds), refused


def field_of(looked: Sequence[Looked]) -> list[Looked]:
    """Who races, of usable candidates fastest first: those near the fastest; the best of each other backend, and what
    a record chose, where they are not far off."""
    if not looked:
        return []
    fastest = looked[0].seconds
    chosen = [x for x in looked if x.seconds <= CLOSE * fastest][:FINALISTS]
    backends = {x.candidate.backend for x in chosen}
    for x in looked:
        if x in chosen or x.seconds > RIVAL * fastest:
            continue
        if x.candidate.backend not in backends or x.why == "record":
            backends.add(x.candidate.backend)
            chosen.append(x)
    return chosen if len(chosen) > 1 else list(looked[:2])


def more_of(looked: Sequence[Looked], entered: Sequence[Looked]) -> list[Looked]:
    """Others of the plateau, as many as a first lap has time for."""
    near = [x for x in looked if x.seconds <= PLATEAU * looked[0].seconds and x not in entered] if looked else []
    laps = accumulate(least_rounds(0.9999) * max(x.seconds, 4e-3) for x in (*entered, *near))
    room = sum(lap <= MORE_SECONDS for lap in laps) - len(entered)
    return near[: max(min(room, MOST - len(entered)), 0)]


def _full_gate(bench: Bench, study: optuna.Study, candidate: Candidate) -> Verdict:
    name = f"full gate {candidate.key}"
    known = study.user_attrs.get(name)
    if known is not None:
        return Verdict(**known)
    try:
        verdict = bench.gate(candidate, "full")
    except Refusal as why:
        verdict = Verdict(False, str(why))
    study.set_user_attr(name, asdict(verdict))
    return verdict


def _keep_lap(study: optuna.Study, lap: Lap, running: list[Candidate], tell: Callable[[Progress], object]) -> None:
    number = sum(name.startswith("lap ") for name in study.user_attrs)
    study.set_user_attr(f"lap {number} {owner()}", asdict(lap))
    note = f"racing {', '.join(map(str, running[:3]))}"
    tell(Progress("race", number + 1, None, None, note))


def _laps(study: optuna.Study) -> list[Lap]:
    """What races of dead processes of this host measured; one that still runs keeps its samples to its own record."""
    names = [name.split(" ", 2) for name in study.user_attrs if name.startswith("lap ")]
    kept = [study.user_attrs[" ".join(name)] for name in sorted(names, key=lambda n: int(n[1])) if ended(name[2])]
    return [
        Lap(tuple(lap["candidates"]), tuple(Round(tuple(r["seconds"]), tuple(r["quiet"])) for r in lap["rounds"]))
        for lap in kept
    ]
