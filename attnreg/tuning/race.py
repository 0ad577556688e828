"""The race: finalists in interleaved rounds, slower ones dropped as intervals allow, ties named."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from attnreg.evidence import memory_class
from attnreg.measure import Bench, Candidate, Died, Refusal, Round
from attnreg.records import Quantiles
from attnreg.tuning.evaluate import paired_interval
from attnreg.tuning.stats import Interval, least_rounds

__all__ = ["TIE", "Finish", "Lap", "race"]

TIE = math.log(1.01)
"""Differences below one per cent are no difference: they do not survive a reboot."""
LEVEL = math.log(1.005)
"""Of candidates that tie, those estimated within half a per cent of the fastest may be preferred for their memory."""
NOISY = 0.25
"""The share of disturbed samples from which on the machine counts as noisy."""
BLOCK = 4


@dataclass(frozen=True)
class Lap:
    """A block of rounds as measured: the candidates that ran, by key, and one sample of each a round."""

    candidates: tuple[str, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Finish:
    """How the race ended.

    winner: fastest, or of those level with it the one with the least memory, then by name. ratios: for
    every other finalist (low, estimate, high) of its time over the winner's; intervals are infinite where too few
    rounds were run. ties: those not shown to be slower. broke: what crashed, hung or raised on the way.
    """

    winner: Candidate
    samples: Mapping[str, Quantiles]
    ratios: Mapping[str, Interval]
    ties: tuple[Candidate, ...]
    broke: Mapping[str, tuple[str, str]]
    rounds: int
    dropped: int
    noisy: bool
    laps: tuple[Lap, ...] = ()


@dataclass
class _State:
    running: list[Candidate]
    laps: list[Lap]
    broke: dict[str, tuple[str, str]] = field(default_factory=dict)


def race(
    bench: Bench,
    finalists: Sequence[Candidate],
    memory: Mapping[str, int],
    *,
    confidence: float = 0.99,
    most_rounds: int = 60,
    seconds: float = math.inf,
    laps: Sequence[Lap] = (),
    on_lap: Callable[[Lap, list[Candidate]], object] = lambda lap, running: None,
) -> Finish | None:
    """Run rounds until one is left, all that are left tie for good, or the budget ends; None if every finalist broke.

    memory: peak bytes by candidate key, for ties. laps: what an interrupted race already measured. After each
    block, who is slower than the leader by an interval is out. The confidence is shared out over the blocks
    (Bonferroni), so that looking often does not cast out the best by chance.
    """
    looks = max(1, most_rounds // BLOCK)
    strict = 1 - (1 - confidence) / looks
    state = _State(list(finalists), list(laps))
    deadline = time.monotonic() + seconds
    _drop_slower(state, strict)
    while state.running:
        done = sum(len(lap.rounds) for lap in state.laps)
        enough = done >= least_rounds(confidence)
        if done >= most_rounds or (enough and (len(state.running) == 1 or time.monotonic() > deadline)):
            break
        if enough and _settled(state, confidence):
            break
        try:
            rounds = bench.rounds(state.running, BLOCK if done else least_rounds(strict))
        except Refusal as why:
            _cast_out(state, why)
            continue
        lap = Lap(tuple(c.key for c in state.running), tuple(rounds))
        state.laps.append(lap)
        _drop_slower(state, strict)
        on_lap(lap, list(state.running))
    return _finish(state, finalists, memory, confidence)


def _compare(laps: Sequence[Lap], one: str, other: str, confidence: float) -> Interval:
    """Log ratio of two candidates' times with its interval, over every lap that both ran in."""
    rounds = [
        Round((r.seconds[n], r.seconds[m]), (r.quiet[n], r.quiet[m]))
        for lap in laps
        if one in lap.candidates and other in lap.candidates
        for n, m in ((lap.candidates.index(one), lap.candidates.index(other)),)
        for r in lap.rounds
    ]
    return paired_interval(rounds, 0, 1, confidence)


def _leader(laps: Sequence[Lap], running: Sequence[Candidate]) -> Candidate:
    """Who is fastest by the paired estimates: the one whose worst ratio to another is smallest."""

    def regret(c: Candidate) -> float:
        return max((_compare(laps, c.key, o.key, 0.9)[1] for o in running if o != c), default=0.0)

    return min(running, key=regret)


def _drop_slower(state: _State, confidence: float) -> None:
    if len(state.running) < 2 or not state.laps:
        return
    lead = _leader(state.laps, state.running)
    state.running = [
        c for c in state.running if c == lead or not _slower(_compare(state.laps, c.key, lead.key, confidence))
    ]


def _slower(ratio: Interval) -> bool:
    """By an interval that leaves out 0, and by enough to matter."""
    low, middle, _ = ratio
    return low > 0 and middle > TIE


def _settled(state: _State, confidence: float) -> bool:
    """Every interval lies within the tie: more rounds would change nothing."""
    lead = _leader(state.laps, state.running)
    ratios = [_compare(state.laps, c.key, lead.key, confidence) for c in state.running if c != lead]
    return all(low >= -TIE and high <= TIE for low, _, high in ratios)


def _cast_out(state: _State, why: Refusal) -> None:
    culprit = why.candidate if why.candidate in state.running else state.running[0]
    assert culprit is not None
    state.running.remove(culprit)
    state.broke[culprit.key] = (why.kind if isinstance(why, Died) else "raise", str(why))


def _finish(
    state: _State, finalists: Sequence[Candidate], memory: Mapping[str, int], confidence: float
) -> Finish | None:
    if not state.running:
        return None
    lead = _leader(state.laps, state.running)
    level = [c for c in state.running if c == lead or not _slower(_compare(state.laps, c.key, lead.key, confidence))]
    # What too few rounds could not tell apart is named as a tie, but only what is really level is chosen by memory.
    near = [c for c in level if c == lead or _compare(state.laps, c.key, lead.key, confidence)[1] <= LEVEL]
    winner = min(near, key=lambda c: (memory_class(memory.get(c.key, 0)), c.backend, c.key))
    others = [c for c in finalists if c != winner and c.key not in state.broke]
    ratios = {c.key: _compare(state.laps, c.key, winner.key, confidence) for c in others}
    every = [quiet for lap in state.laps for r in lap.rounds for quiet in r.quiet]
    dropped = every.count(False)
    return Finish(
        winner=winner,
        samples={c.key: Quantiles.of(_samples(state.laps, c.key)) for c in [winner, *others]},
        ratios=ratios,
        ties=tuple(c for c in level if c != winner),
        broke=dict(state.broke),
        rounds=sum(len(lap.rounds) for lap in state.laps),
        dropped=dropped,
        noisy=dropped > NOISY * len(every),
        laps=tuple(state.laps),
    )


def _samples(laps: Sequence[Lap], key: str) -> list[float]:
    every = [
        (r.seconds[n], r.quiet[n])
        for lap in laps
        if key in lap.candidates
        for n in (lap.candidates.index(key),)
        for r in lap.rounds
    ]
    return [seconds for seconds, quiet in every if quiet] or [seconds for seconds, _ in every]
