"""Intervals cover what they claim; the race finds the fastest, names ties, and survives what breaks."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from fake_bench import FakeBench, refuse
from scipy.stats import wilcoxon

from attnreg.evidence import memory_class
from attnreg.measure import Candidate, Died, Opened, Round
from attnreg.tuning.evaluate import Evaluator, paired, paired_interval
from attnreg.tuning.finals import field_of, more_of
from attnreg.tuning.outcome import level_with
from attnreg.tuning.race import race
from attnreg.tuning.report import Looked
from attnreg.tuning.stats import interval, least_rounds

A, B, C = Candidate("a"), Candidate("b"), Candidate("b", {"x": 2})
TIMES = {A.key: 1.0, B.key: 1.1, C.key: 2.0}


def bench(times: dict[str, float], **how: object) -> FakeBench:
    made = FakeBench(lambda c: times.get(c.key), **how)  # type: ignore[arg-type]  # keywords of a helper
    made.gated = list(times)
    return made


@pytest.mark.parametrize("n", [8, 12, 25, 60, 61, 90])
def test_the_interval_is_the_signed_rank_interval(n: int) -> None:
    """Shifting by a little less or more than a bound turns the test's p-value over 1 - confidence."""
    rng = random.Random(n)
    x = [rng.gauss(0.4, 1) for _ in range(n)]
    low, middle, high = interval(x, 0.95)
    assert low < middle < high
    method = "exact" if n <= 60 else "approx"
    for bound, sign in ((low, -1), (high, 1)):
        outside = wilcoxon([v - bound - sign * 1e-6 for v in x], method=method, correction=False).pvalue
        inside = wilcoxon([v - bound + sign * 0.05 for v in x], method=method, correction=False).pvalue
        assert outside <= 0.055
        assert inside >= 0.045


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_it_covers_the_centre_as_often_as_it_claims_even_with_wild_noise(confidence: float) -> None:
    rng = random.Random(5)
    for n in (10, 30):
        trials = 800
        covered = 0
        for _ in range(trials):
            x = [rng.gauss(0, 1) * (10 if rng.random() < 0.1 else 1) for _ in range(n)]
            low, _, high = interval(x, confidence)
            covered += low <= 0 <= high
        assert covered / trials > confidence - 3 * math.sqrt(confidence * (1 - confidence) / trials)


def test_too_few_rounds_prove_nothing() -> None:
    assert interval([], 0.99) == (-math.inf, 0.0, math.inf)
    assert interval([1.0] * (least_rounds(0.99) - 1), 0.99)[0] == -math.inf
    assert interval([1.0] * least_rounds(0.99), 0.99) == (1.0, 1.0, 1.0)


def test_disturbed_samples_do_not_count() -> None:
    rounds = [Round((1.0, 2.0), (True, True))] * 3 + [Round((9.0, 2.0), (False, True))]
    assert paired(rounds, 0, 1) == [-math.log(2)] * 3
    assert len(paired([Round((1.0, 2.0), (False, False))] * 5 + [Round((1.0, 2.0), (True, True))], 0, 1)) == 6


def test_disturbed_samples_count_where_the_others_are_too_few_for_an_interval() -> None:
    """Half of the rounds disturbed must not make a tie of a candidate that is slower by two thirds in all of them."""
    quiet, disturbed = Round((1.7, 1.0), (True, True)), Round((1.6, 1.0), (False, True))
    rounds = [quiet, disturbed] * (least_rounds(0.99) - 2)
    assert paired_interval(rounds, 0, 1, 0.99)[0] >= math.log(1.6)
    assert paired_interval([quiet] * 3, 0, 1, 0.99)[0] == -math.inf


def test_too_few_rounds_never_make_a_slow_candidate_the_winner() -> None:
    """Not told apart is not the same as level: memory decides only between those that look equal."""
    finish = race(bench({A.key: 1.0, B.key: 5.0}, noise=1.0), [A, B], {A.key: 64 << 20, B.key: 1 << 20}, most_rounds=4)
    assert finish is not None
    assert finish.winner == A


def test_the_fastest_wins_through_drift_noise_and_disturbance() -> None:
    for seed in range(20):
        made = bench(TIMES, noise=0.03, drift=0.3, disturbed=0.1, seed=seed)
        finish = race(made, [C, B, A], {})
        assert finish is not None
        assert finish.winner == A
        assert finish.ties == ()
        low, middle, high = finish.ratios[B.key]
        assert low < middle < high
        assert low <= math.log(1.1) + 0.03
        assert finish.ratios[C.key][0] > math.log(1.5)
        assert finish.samples[A.key].n == finish.rounds - sum(
            not r.quiet[lap.candidates.index(A.key)] for lap in finish.laps for r in lap.rounds
        )


def test_the_slow_leave_early() -> None:
    made = bench(TIMES, noise=0.01)
    race(made, [A, B, C], {})
    assert made.timed.count(C.key) < 20


def test_equal_candidates_tie_and_memory_then_name_decides() -> None:
    equal = {A.key: 1.0, B.key: 1.0, C.key: 3.0}
    for seed in range(10):
        finish = race(bench(equal, noise=0.005, seed=seed), [A, B, C], {A.key: 64 << 20, B.key: 2 << 20})
        assert finish is not None
        assert (finish.winner, finish.ties) == (B, (A,))
        finish = race(bench(equal, noise=0.005, seed=seed), [B, A, C], {A.key: 2 << 20, B.key: 2 << 20})
        assert finish is not None
        assert (finish.winner, finish.ties) == (A, (B,))


def test_memory_within_noise_is_the_same_memory() -> None:
    assert memory_class(100) == memory_class(900 << 10)
    assert memory_class(100 << 20) == memory_class(102 << 20)
    assert memory_class(100 << 20) < memory_class(120 << 20)


def test_two_races_agree_or_name_each_other() -> None:
    close = {A.key: 1.0, B.key: 1.012, C.key: 1.02}
    for seed in range(0, 40, 2):
        one, two = (race(bench(close, noise=0.04, seed=s), [A, B, C], {}) for s in (seed, seed + 1))
        assert one is not None
        assert two is not None
        assert one.winner == two.winner or one.winner in two.ties or two.winner in one.ties


def test_a_finalist_that_breaks_is_cast_out_and_the_race_goes_on() -> None:
    breaks = {A.key: lambda c: Died("hang", "hung", c), B.key: refuse}
    finish = race(bench(TIMES, breaks=breaks), [A, B, C], {})
    assert finish is not None
    assert finish.winner == C
    assert finish.broke == {A.key: ("hang", "hung"), B.key: ("raise", "raised RuntimeError: as planned")}
    assert race(bench(TIMES, breaks=breaks), [A, B], {}) is None


def test_an_interrupted_race_goes_on_with_its_laps() -> None:
    made = bench(TIMES)
    whole = race(made, [A, B, C], {})
    assert whole is not None
    again = bench(TIMES)
    resumed = race(again, [A, B, C], {}, laps=whole.laps)
    assert resumed is not None
    assert (resumed.winner, resumed.ratios) == (whole.winner, whole.ratios)
    assert again.timed == []


def test_a_noisy_machine_is_noticed() -> None:
    quiet, loud = (race(bench(TIMES, disturbed=share), [A, B, C], {}) for share in (0.05, 0.6))
    assert quiet is not None
    assert loud is not None
    assert not quiet.noisy
    assert loud.noisy
    assert loud.dropped > quiet.dropped


def test_evaluation_cancels_drift_against_the_fastest_so_far() -> None:
    times = {Candidate("a", {"n": n}).key: 1 + 0.1 * n for n in range(8)}
    made = FakeBench(lambda c: times[c.key], noise=0.005, drift=0.5)
    evaluator = Evaluator(made)
    found = {}
    for n in (5, 7, 3, 0, 1, 6, 2, 4):
        found[n] = evaluator.evaluate(Candidate("a", {"n": n})).seconds
    assert sorted(found, key=lambda n: found[n] or 0.0) == list(range(8))


def test_a_reference_that_breaks_does_not_take_the_candidate_along() -> None:
    made = FakeBench(lambda c: {"a": 1.0, "b": 2.0}[c.backend])
    evaluator = Evaluator(made)
    evaluator.evaluate(A)
    made.breaks[A.key] = refuse
    outcome = evaluator.evaluate(B)
    assert outcome.kind == "ok"
    assert evaluator.reference is not None
    assert evaluator.reference[0] == B


def test_a_candidate_far_behind_is_not_timed_in_rounds_and_its_memory_is_known() -> None:
    class Reluctant(FakeBench):
        def open(self, candidate: Candidate, give_up: float = 0.0) -> Opened:
            made = super().open(candidate, give_up)
            return replace(made, given_up=bool(give_up) and made.seconds > give_up)

    made = Reluctant(lambda c: {"a": 1.0, "b": 4.0}[c.backend], noise=0.005, memory=lambda c: 5 << 20)
    evaluator = Evaluator(made)
    evaluator.evaluate(A)
    made.timed.clear()
    outcome = evaluator.evaluate(B)
    assert outcome.seconds == pytest.approx(4.0, rel=0.8)  # against the reference's time right now
    assert outcome.peak_memory == 5 << 20
    assert B.key not in made.timed


def test_what_the_machine_slowed_down_is_not_given_up_as_slow() -> None:
    """All calls take four times as long for a while: the reference does too."""

    class Slowed(FakeBench):
        def open(self, candidate: Candidate, give_up: float = 0.0) -> Opened:
            return replace(super().open(candidate, give_up), seconds=4.4, given_up=bool(give_up))

        def rounds(self, candidates: list[Candidate], count: int) -> list[Round]:
            return [Round(tuple(4 * s for s in r.seconds), r.quiet) for r in super().rounds(candidates, count)]

    made = Slowed(lambda c: {"a": 1.0, "b": 0.9}[c.backend], noise=0.005, drift=0.0)
    made.gated = [A.key]
    outcome = Evaluator(made, (A, 1.0)).evaluate(B)
    assert outcome.seconds == pytest.approx(0.9, rel=0.02)
    assert 0.8 < outcome.least <= outcome.seconds


def test_who_races_and_who_is_named_level_without() -> None:
    looked = [Looked(Candidate("a", {"n": n}), 1 + 0.001 * n, "seed", 0, 0.99) for n in range(60)]
    looked += [
        Looked(C, 1.4, "record", 0, 1.39),
        Looked(B, 1.5, "seed", 0, 1.4),
        Looked(Candidate("b", {"x": 3}), 1.55, "tpe"),
    ]
    field = field_of(looked)
    assert [x.candidate for x in field[:12]] == [x.candidate for x in looked[:12]]
    assert {x.candidate.key for x in field[12:]} == {C.key}  # what the record chose is the best of b as well
    more = more_of(looked, field)
    assert [x.candidate for x in more] == [x.candidate for x in looked[12 : 12 + len(more)]]
    assert len(field) + len(more) <= 32
    times = {x.candidate.key: x.seconds for x in looked}
    finish = race(bench(times, noise=0.003), [x.candidate for x in field], {})
    assert finish is not None
    level = level_with(finish, looked)
    assert {x.candidate.key for x in level} == {x.candidate.key for x in looked[12:60]}
    slower = [replace(x, least=x.seconds - 0.001) for x in looked]
    assert {x.candidate.key for x in level_with(finish, slower)} <= {x.candidate.key for x in looked[12:24]}
