"""Replays: on measured spaces the tuner finds what exhaustive search finds, with a quarter of the looks."""

from __future__ import annotations

import io
import itertools
import json
import statistics
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from attnreg.errors import RecordError
from attnreg.measure import Candidate
from attnreg.suites import suite
from attnreg.tuning import replay
from attnreg.tuning.evaluate import Evaluator
from attnreg.tuning.finals import field_of, more_of
from attnreg.tuning.outcome import level_with
from attnreg.tuning.race import Finish, race
from attnreg.tuning.recording import Recording, recordings
from attnreg.tuning.replay import ReplayBench
from attnreg.tuning.report import Looked
from attnreg.tuning.search import Search, make_sampler

RECORDINGS = recordings()


def small() -> Recording:
    """A recording by hand: b is best; one point failed the gate."""
    points = [(Candidate("a", {"m": m}), (2.0 + m, 2.2 + m)) for m in (1, 2, 3)]
    points += [(Candidate("a", {"m": 4}), ()), (Candidate("b"), (1.0, 1.1))]
    problem = suite("prefill")[0].problem
    return Recording(
        "hand", problem, {"a": {"m": [1, 2, 3, 4]}, "b": {}}, tuple(points), (Candidate("b"),), {"hardware": "x"}
    )


def test_a_recording_reads_back(tmp_path: Path) -> None:
    (tmp_path / "hand.json").write_text(json.dumps(small().to_json()))
    assert recordings(tmp_path) == [small()]
    with pytest.raises(RecordError, match="recording"):
        Recording.from_json({"name": "x"})


def test_the_recorded_space_has_exactly_the_recorded_points() -> None:
    assert {c.key for c in small().space().points()} == {c.key for c, _ in small().points}
    for recording in RECORDINGS:
        assert {c.key for c in recording.space().points()} == {c.key for c, _ in recording.points}


def test_the_truth_takes_out_what_slowed_a_whole_round() -> None:
    points = tuple((Candidate("a", {"m": m}), (float(m), 10.0 * m, float(m))) for m in (1, 2, 3))
    made = Recording("drift", suite("prefill")[0].problem, {"a": {"m": [1, 2, 3]}}, points, (), {})
    one, two, three = (made.truth()[c.key] for c, _ in points)
    assert (two / one, three / one) == (pytest.approx(2), pytest.approx(3))


def test_a_replayed_round_is_a_recorded_one() -> None:
    bench = ReplayBench(small(), seed=0)
    a, b = Candidate("a", {"m": 1}), Candidate("b")
    assert not bench.gate(Candidate("a", {"m": 4}), "quick").ok
    assert {r.seconds for r in bench.rounds([a, b], 50)} == {(3.0, 1.0), (3.2, 1.1)}


def test_there_are_real_recordings_of_real_size() -> None:
    assert len(RECORDINGS) >= 3
    for recording in RECORDINGS:
        assert len(recording.points) > 150
        assert len(recording.truth()) > 100
        assert recording.about["hardware"]
        assert recording.about["date"]


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_within_one_per_cent_with_a_quarter_of_the_looks(recording: Recording) -> None:
    """Replays are data and seeds: this does not depend on the machine. `attnreg bench tuner` runs 20 seeds, and random
    search beside them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    looks, gaps = zip(*(replay.replay(recording, seed) for seed in range(5)), strict=True)
    assert statistics.median(looks) <= 0.25 * len(recording.points)
    assert statistics.median(gaps) <= 0.01


def tune(recording: Recording, seed: int) -> tuple[Finish, tuple[Looked, ...]]:
    """A whole tune of a recording, as long as it pays: its race, and who was level without racing."""
    bench = ReplayBench(recording, seed)
    evaluator = Evaluator(bench)
    study = optuna.create_study(sampler=make_sampler(seed))
    starts = [(c, "seed") for c in recording.starts]
    search = Search(study, recording.space(), starts, enumerate_up_to=0, seed=seed)
    looked = []
    while (proposal := search.ask()) is not None:
        outcome = evaluator.evaluate(proposal.candidate)
        search.tell(proposal, outcome.seconds)
        if outcome.seconds is not None:
            looked.append(Looked(proposal.candidate, outcome.seconds, proposal.why, 0, outcome.least))
    looked.sort(key=lambda x: x.seconds)
    field = field_of(looked)
    finish = race(bench, [x.candidate for x in (*field, *more_of(looked, field))], {})
    assert finish is not None
    return finish, level_with(finish, looked)


def agree(one: tuple[Finish, tuple[Looked, ...]], two: tuple[Finish, tuple[Looked, ...]]) -> bool:
    """Do they pick the same, or does one name the other's pick?"""
    named = [{f.winner, *f.ties, *(x.candidate for x in level)} for f, level in (one, two)]
    return one[0].winner in named[1] or two[0].winner in named[0]


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_two_tunes_agree_or_name_each_other(recording: Recording) -> None:
    """From the search on, on noise as it was measured."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tunes = [tune(recording, seed) for seed in range(700, 703)]
    assert all(agree(one, two) for one, two in itertools.combinations(tunes, 2))


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_two_races_of_one_field_agree_as_often_as_they_claim(recording: Recording) -> None:
    """At 99% confidence a race wrongs its true best once in a hundred times, and two do in two."""
    truth = recording.truth()
    field = sorted((c for c, times in recording.points if times), key=lambda c: truth[c.key])[:12]
    finishes = [race(ReplayBench(recording, seed), field, {}) for seed in range(12)]
    pairs = list(itertools.combinations(finishes, 2))
    apart = [1 for a, b in pairs if a and b and not agree((a, ()), (b, ()))]
    assert len(apart) <= 0.02 * len(pairs)


def test_the_table_names_every_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(replay, "recordings", lambda: [small()])
    rows = replay.show(Console(file=out, width=200), seeds=2)
    assert rows[0].name == "hand"
    assert "hand" in out.getvalue()
    assert "goal" in out.getvalue()
