"""Search: all of a small space, seeds first, conditional names, constraints, resuming, no candidate twice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from attnreg.errors import TuneError
from attnreg.measure import Candidate
from attnreg.space import SearchSpace
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.search import Proposal, Search, make_sampler
from attnreg.tuning.seeds import starting_points
from attnreg.tuning.storage import open_storage, open_study

optuna.logging.set_verbosity(optuna.logging.WARNING)

LARGE = JointSpace(
    {
        "a": SearchSpace(
            {"m": (16, 32, 64, 128), "n": (16, 32, 64, 128, 256), "stages": (1, 2, 3, 4, 5), "pack": (False, True)},
            constraints=[("m * n <= 8192", lambda c: c["m"] * c["n"] <= 8192)],
            seeds=[{"m": 16, "n": 16, "stages": 1, "pack": True}],
        ),
        "b": SearchSpace({"kind": ("x", "y", "z")}),
        "c": SearchSpace(),
    }
)
SMALL = JointSpace({"a": SearchSpace({"m": (1, 2, 3), "n": (1, 2)}), "b": SearchSpace()})


def cost(c: Candidate) -> float | None:
    """Best at a(m=64, n=128, stages=3, pack); b(z) fails the gate."""
    if c.backend == "b":
        return None if c.config["kind"] == "z" else 2.5
    if c.backend == "c":
        return 3.0
    m, n, stages, pack = (c.config[x] for x in ("m", "n", "stages", "pack"))
    far = 0.3 * abs(math.log2(m / 64)) + 0.2 * abs(math.log2(n / 128)) + 0.1 * abs(stages - 3)
    return 1.0 + far + (0 if pack else 0.4)


def memory_study(seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=make_sampler(seed))


def run(search: Search, most: int = 10_000) -> list[Candidate]:
    out = []
    while len(out) < most and (proposal := search.ask()) is not None:
        out.append(proposal.candidate)
        search.tell(proposal, cost(proposal.candidate) if proposal.candidate.config.get("stages") else 1.0)
    return out


def defaults(space: JointSpace) -> list[tuple[Candidate, str]]:
    return [(Candidate(name, s.default), "default") for name, s in space.spaces.items()]


def test_a_small_space_is_looked_at_whole_once() -> None:
    looked = run(Search(memory_study(), SMALL, defaults(SMALL)))
    assert sorted(c.key for c in looked) == sorted(c.key for c in SMALL.points())
    assert [c.backend for c in looked[:2]] == ["a", "b"]


def test_seeds_come_first_and_those_outside_the_space_are_passed_over() -> None:
    seeds = [(Candidate("a", {"m": 128, "n": 256, "stages": 1, "pack": True}), "neighbour")]  # breaks the constraint
    seeds += [(Candidate("gone", {}), "neighbour"), (Candidate("c"), "static")]
    assert run(Search(memory_study(), LARGE, seeds), 1) == [Candidate("c")]


def test_near_backends_come_first_and_far_ones_after_their_seeds() -> None:
    space = JointSpace(
        {name: SearchSpace({"n": (1, 2, 3)}, seeds=[{"n": n} for n in seeds])
         for name, seeds in {"slow": [2], "unsaid": [], "quick": [2, 3], "near": [3]}.items()}
    )  # fmt: skip
    estimates = {"quick": 1.0, "near": 2.0, "slow": 2.1, "unsaid": None}
    record = (Candidate("slow", {"n": 3}), "record")
    points = starting_points(space, estimates, [record])
    assert [(c.backend, c.config["n"], why) for c, why in points] == [
        ("quick", 1, "default"), ("near", 1, "default"), ("unsaid", 1, "default"),
        ("slow", 3, "record"),
        ("quick", 2, "seed"), ("near", 3, "seed"), ("quick", 3, "seed"),
        ("slow", 1, "default"), ("slow", 2, "seed"),
    ]  # fmt: skip
    unsaid = starting_points(space, dict.fromkeys(estimates), [])
    assert [c.backend for c, why in unsaid if why == "default"] == ["near", "quick", "slow", "unsaid"]


@pytest.mark.parametrize("seed", range(5))
def test_a_large_space_is_searched_without_repeats_or_broken_constraints(seed: int) -> None:
    search = Search(memory_study(seed), LARGE, defaults(LARGE), limit=80, enumerate_up_to=50, seed=seed)
    while (proposal := search.ask()) is not None:
        assert LARGE.contains(proposal.candidate)
        assert proposal.candidate.key not in search.seen
        search.tell(proposal, cost(proposal.candidate))
    assert search.done <= 80
    assert search.best is not None
    assert search.best[1] == Candidate("a", {"m": 64, "n": 128, "stages": 3, "pack": True})


def test_it_stops_when_more_cannot_pay() -> None:
    search = Search(memory_study(), LARGE, defaults(LARGE), enumerate_up_to=50, patience=10)
    while (proposal := search.ask()) is not None:
        search.tell(proposal, cost(proposal.candidate))
    assert search.done < 120
    assert [t.user_attrs["why"] for t in search.results()][-10:].count("descent") == 0


def test_parameters_are_conditional_and_named_by_backend() -> None:
    search = Search(memory_study(), LARGE, defaults(LARGE), limit=12, enumerate_up_to=50)
    run(search)
    for trial in search.results():
        backend = trial.params["backend"]
        assert all(name == "backend" or name.startswith(f"{backend}.") for name in trial.params)


def test_what_failed_the_gate_is_told_as_a_violated_constraint() -> None:
    study = memory_study()
    search = Search(study, LARGE, [(Candidate("b", {"kind": "z"}), "seed")], limit=1, enumerate_up_to=50)
    proposal = search.ask()
    assert proposal is not None
    search.tell(proposal, None, kind="gate", reason="wrong")
    trial = study.trials[0]
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert search.best is None
    assert trial.user_attrs["reason"] == "wrong"
    assert any(v > 0 for v in trial.constraints.values())


def test_a_new_process_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    def search() -> Search:
        study = open_study(open_storage(tmp_path / "x.journal"), "s", make_sampler(0))
        return Search(study, SMALL, defaults(SMALL))

    first = run(search(), 4)
    second = search()
    assert second.done == 4
    rest = run(second)
    assert sorted(c.key for c in first + rest) == sorted(c.key for c in SMALL.points())


def test_a_trial_whose_process_is_gone_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(open_storage(tmp_path / "x.journal"), "s", make_sampler(0))
    monkeypatch.setattr("attnreg.tuning.search.owner", lambda: f"{__import__('socket').gethostname()}:999999999:1")
    lost = Search(study, SMALL, defaults(SMALL)).ask()
    assert lost is not None
    monkeypatch.undo()
    again = Search(open_study(open_storage(tmp_path / "x.journal"), "s", make_sampler(0)), SMALL, defaults(SMALL))
    proposal = again.ask()
    assert proposal is not None
    assert (proposal.candidate, proposal.why) == (lost.candidate, "again")


def test_two_searches_on_one_study_share_the_work(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    both = [Search(open_study(open_storage(path), "s", make_sampler(n)), SMALL, defaults(SMALL)) for n in range(2)]
    looked: list[Candidate] = []
    open_proposals: list[tuple[Search, Any]] = []
    while True:
        open_proposals = [(s, p) for s in both if (p := s.ask()) is not None]
        if not open_proposals:
            break
        for search, proposal in open_proposals:
            looked.append(proposal.candidate)
            search.tell(proposal, 1.0)
    assert sorted(c.key for c in looked) == sorted(c.key for c in SMALL.points())


@pytest.mark.parametrize("space", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("at", ["before its claim", "after its claim", "after it took it"])
def test_no_candidate_twice_however_two_searches_interleave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, space: JointSpace
) -> None:
    """The other search asks in the middle of this one's ask, at each step that others can see."""
    path = tmp_path / "shared.journal"
    one, two = (Search(open_study(open_storage(path), "x", make_sampler(7)), space, defaults(space)) for _ in range(2))
    others: list[Proposal] = []

    def interrupt() -> None:
        if len(others) < 12 and (proposal := two.ask()) is not None:
            others.append(proposal)

    enqueue, ask = one.study.enqueue_trial, one.study.ask

    def enqueue_between(*args: Any, **more: Any) -> None:
        if at == "before its claim":
            interrupt()
        enqueue(*args, **more)
        if at == "after its claim":
            interrupt()

    def ask_between() -> optuna.Trial:
        trial = ask()
        if at == "after it took it":
            interrupt()
        return trial

    monkeypatch.setattr(one.study, "enqueue_trial", enqueue_between)
    monkeypatch.setattr(one.study, "ask", ask_between)
    mine = []
    while len(mine) < 12 and (proposal := one.ask()) is not None:
        mine.append(proposal)
    assert others
    keys = [p.candidate.key for p in (*mine, *others)]
    assert len(keys) == len(set(keys))
    if space is SMALL:
        assert set(keys) == {c.key for c in SMALL.points()}


def test_what_a_dead_process_put_up_and_never_took_is_looked_at(tmp_path: Path) -> None:
    study = open_study(open_storage(tmp_path / "s.journal"), "x", make_sampler(0))
    lost = Candidate("a", {"m": 2, "n": 2})
    named = {"backend": "a", "config": dict(lost.config)}
    study.enqueue_trial(SMALL.to_params(lost), user_attrs={"owner": "gone", "why": "seed", "candidate": named})
    looked = run(Search(study, SMALL))
    assert sorted(c.key for c in looked) == sorted(c.key for c in SMALL.points())


@pytest.mark.parametrize("tail", [b'{"op_code": 4, "wor', b"\x00\x00\x00\n", b"garbage\n{"])
def test_a_torn_journal_loses_only_its_torn_end(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "x.journal"
    run(Search(open_study(open_storage(path), "s", make_sampler(0)), SMALL, defaults(SMALL)), 3)
    with open(path, "ab") as file:
        file.write(tail)
    search = Search(open_study(open_storage(path), "s", make_sampler(0)), SMALL, defaults(SMALL))
    assert search.done == 3
    run(search)
    assert search.done == 7


def test_a_database_url_works_as_storage(tmp_path: Path) -> None:
    """SQLite by one process: the code path of any database."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    assert len(run(Search(open_study(open_storage(url), "s", make_sampler(0)), SMALL, defaults(SMALL)), 3)) == 3
    search = Search(open_study(open_storage(url), "s", make_sampler(0)), SMALL, defaults(SMALL))
    assert search.done == 3
    assert len(run(search)) == 4


def test_a_finished_study_is_not_added_to(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "x.journal")
    study = open_study(storage, "s", make_sampler(0))
    study.set_user_attr("done", {})
    assert open_study(storage, "s", make_sampler(0)).study_name != study.study_name


def test_a_storage_that_cannot_be_opened_says_so_without_the_password() -> None:
    with pytest.raises(TuneError, match=r"storage postgresql://me:\*\*\*@host/db cannot be opened") as error:
        open_storage("postgresql://me:secret@host/db")
    assert "secret" not in str(error.value)
