"""Studies: one question, one study; what an older question left unfinished is said, and never gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from test_fleet import WORKER
from test_resume import finished

from attnreg.measure import Plan
from attnreg.space import SearchSpace
from attnreg.spec import AttentionSpec
from attnreg.store import Store
from attnreg.suites import attention_problem
from attnreg.tuning import write_problems
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.search import Search
from attnreg.tuning.storage import open_storage
from attnreg.tuning.studies import study_of

optuna.logging.set_verbosity(optuna.logging.WARNING)

PLAN = Plan(attention_problem(AttentionSpec(), (2, 2), 64, 64, 16))
CHOICES = {"m": (1, 2, 3), "n": (1, 2)}
SPACE = JointSpace({"a": SearchSpace(CHOICES), "b": SearchSpace()})
VERSIONS = {"a": "1", "b": "1"}
CHANGES = {
    "a constraint in words": (JointSpace({**SPACE.spaces, "a": SearchSpace(CHOICES, constraints=[("x", bool)])}), {}),
    "a constraint": (
        JointSpace({**SPACE.spaces, "a": SearchSpace(CHOICES, constraints=[("", lambda c: c["m"] < 3)])}),
        {},
    ),
    "a value": (JointSpace({**SPACE.spaces, "a": SearchSpace({"m": (1, 2), "n": (1, 2)})}), {}),
    "a version": (SPACE, {"a": "2"}),
}
SAID = {"a version": "software.backends.a"}


def look(study: optuna.Study, space: JointSpace, most: int) -> int:
    """Look at some candidates; returns how many results the study held before."""
    search = Search(study, space)
    before = search.done
    while search.done < before + most and (proposal := search.ask()) is not None:
        search.tell(proposal, 1.0)
    return before


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("shared", [False, True], ids=["own journal", "shared journal"])
def test_a_changed_question_is_another_study_and_the_unfinished_one_is_named(
    tmp_path: Path, own_store: Store, what: str, shared: bool
) -> None:
    where = tmp_path / "shared.journal" if shared else None
    space, versions = CHANGES[what]
    first, notes = study_of(PLAN, "here", VERSIONS, SPACE, where, 0)
    assert notes == ()
    look(first, SPACE, 3)
    # Another problem in the same storage is no older question.
    other = replace(PLAN, problem=attention_problem(AttentionSpec(), (2, 2), 64, 64, 32))
    assert study_of(other, "here", VERSIONS, SPACE, where, 0)[1] == ()
    changed, notes = study_of(PLAN, "here", {**VERSIONS, **versions}, space, where, 0)
    assert look(changed, space, 1) == 0
    assert notes == (
        f"an unfinished search with 3 results is not gone on with: {SAID.get(what, 'spaces.a')} changed since",
    )
    again, notes = study_of(PLAN, "here", {**VERSIONS, **versions}, space, where, 0)
    assert (look(again, space, 0), notes) == (1, ())
    back, _ = study_of(PLAN, "here", VERSIONS, SPACE, where, 0)  # the older question itself goes on
    assert look(back, SPACE, 0) == 3


def test_a_finished_study_of_an_older_question_is_not_worth_a_word(own_store: Store) -> None:
    first, _ = study_of(PLAN, "here", VERSIONS, SPACE, None, 0)
    look(first, SPACE, 3)
    first.set_user_attr("done", {})
    assert study_of(PLAN, "here", {**VERSIONS, "a": "2"}, SPACE, None, 0)[1] == ()


@pytest.mark.parametrize("change", [{"cache": "cold"}, {"threads": 7}, {"time_limit": 1.0}, {"memory_limit": 1 << 30}])
def test_results_under_other_limits_are_not_taken_over(own_store: Store, change: dict[str, object]) -> None:
    """What hung within a second may be fine within a minute."""
    first, _ = study_of(PLAN, "here", VERSIONS, SPACE, None, 0)
    look(first, SPACE, 3)
    second, [note] = study_of(replace(PLAN, **change), "here", VERSIONS, SPACE, None, 0)  # type: ignore[arg-type]
    assert look(second, SPACE, 0) == 0
    assert f"policy.{next(iter(change))} changed" in note


def test_workers_share_a_journal_and_look_at_each_point_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path / "fleet.journal")]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(2)]
    counts = [int(process.communicate(timeout=240)[0]) for process in running]
    assert sum(counts) == 19
    assert min(counts) > 0


def test_two_tunes_at_once_on_one_journal_make_one_record(tmp_path: Path, own_store: Store) -> None:
    problems, journal = tmp_path / "problems.jsonl", tmp_path / "shared.journal"
    write_problems(problems, [PLAN.problem])
    command = [sys.executable, "-m", "attnreg", "tune", str(problems), "--backends", "sdpa,eager", "--json"]
    command += ["--storage", str(journal)]
    environ = {**os.environ, "ATTNREG_DATA_DIR": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=240)[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert {r["status"] for r in results} <= {"tuned", "known"}
    assert finished(tmp_path) == 4
    studies = open_storage(journal).get_all_studies()
    assert [s.study_name.rpartition("#")[2] for s in studies] == ["1"]
    [(_, record)] = own_store.records("user")
    assert record.trials in (3, 4)  # the other one may still be at the last when the first goes to the race
