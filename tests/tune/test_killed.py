"""kill -9 at any point: at each step of search, race and record, and at random moments; the same command goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import finished

from attnreg.spec import AttentionSpec
from attnreg.store import Store
from attnreg.suites import attention_problem
from attnreg.tuning import write_problems

POINTS = 4
"""Of the space: eager, and three kernels of SDPA."""
SEARCH, FINALS = "attnreg.tuning.search:Search", "attnreg.tuning.finals"
JOURNAL = "optuna.storages.journal:JournalFileBackend.append_logs"
STEPS = [
    (f"{SEARCH}._claim", "before", 1),
    (f"{SEARCH}._claim", "after", 3),
    ("attnreg.tuning.evaluate:Evaluator.evaluate", "after", 2),
    ("optuna.trial:Trial.set_user_attr", "after", 7),
    (f"{SEARCH}.tell", "after", POINTS),
    (JOURNAL, "torn", 9),
    (JOURNAL, "torn", 40),
    (f"{FINALS}:_full_gate", "before", 2),
    (f"{FINALS}:_keep_lap", "before", 1),
    (f"{FINALS}:_keep_lap", "after", 1),
    ("attnreg.store:Store.add", "before", 1),
    ("attnreg.store_files:_replace", "before", 1),
    ("os:replace", "before", 1),
    ("attnreg.store:Store.add", "after", 1),
]


class Forks:
    """The process that runs the command, and the folder of the test."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        folder.mkdir()
        self.process, self.folder, self.data = process, folder, folder / "data"
        self.problems = folder / "problems.jsonl"
        write_problems(self.problems, [attention_problem(AttentionSpec(), (1, 1), 32, 32, 16)])

    def tune(self, *more: str, **how: Any) -> tuple[dict[str, Any], str, float]:
        """Run the command; returns how it ended, what it printed, and the seconds that it took."""
        arguments = ["tune", str(self.problems), "--backends", "sdpa,eager", *more]
        out = self.folder / "out"
        request = {"arguments": arguments, "data": str(self.data), "out": str(out), **how}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer, out.read_text() if out.exists() else "", answer["seconds"]

    def kept(self) -> int:
        """Trials whose result the journals hold."""
        return finished(self.data)

    def measured(self) -> list[str]:
        """Every measurement of a candidate, of all runs."""
        path = self.data / "evaluated"
        return path.read_text().splitlines() if path.exists() else []

    def records(self) -> list[Any]:
        """What is in the database; nothing of it may be broken or left over."""
        store = Store(self.data / "tuning_db", None)
        records = [record for _, record in store.records("user")]
        assert store.broken() == []
        return records


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as running:
        yield running
        assert running.stdin is not None
        running.stdin.close()


@pytest.fixture
def forks(process: subprocess.Popen[str], tmp_path: Path) -> Forks:
    return Forks(process, tmp_path / "t")


def killed(answer: dict[str, Any]) -> bool:
    return os.WIFSIGNALED(answer["status"]) and os.WTERMSIG(answer["status"]) == signal.SIGKILL


def check_finished(forks: Forks, kills: int) -> None:
    """One valid record, of evidence measured once; each kill cost at most one candidate's measurement."""
    [record] = forks.records()
    assert record.backend in ("sdpa", "eager")
    assert record.trials == POINTS
    assert record.evidence == ()
    assert record.times is not None
    assert record.times.n >= 1
    measured = forks.measured()
    assert len(set(measured)) == POINTS
    assert len(measured) - POINTS <= kills
    assert not list(forks.data.rglob("*.tmp"))
    answer, said, _ = forks.tune("--json")
    assert answer["status"] == 0
    assert json.loads(said)["status"] == "known"


@pytest.mark.parametrize(("at", "when", "n"), STEPS, ids=[f"{at.rpartition(':')[2]}, {w} {n}" for at, w, n in STEPS])
def test_killed_at_a_step(forks: Forks, at: str, when: str, n: int) -> None:
    answer, _, _ = forks.tune("--json", at=at, when=when, n=n)
    assert killed(answer), "it never came to this step"
    kept = forks.kept()
    assert len(forks.measured()) - kept <= 1
    already = len(forks.records())
    assert (at, when) != ("os:replace", "before") or list(forks.data.rglob("*.tmp")), "the step was another one"
    answer, said, _ = forks.tune("--json")
    assert answer["status"] == 0
    result = json.loads(said)
    if already:
        assert result["status"] == "known"
    else:
        assert result["status"] == "tuned"
        assert result["resumed"] == kept
    check_finished(forks, kills=1)


def test_it_says_that_it_goes_on(forks: Forks) -> None:
    answer, _, _ = forks.tune(at=f"{SEARCH}.tell", when="after", n=2)
    assert killed(answer)
    answer, said, _ = forks.tune()
    assert answer["status"] == 0
    assert "resumed 2 trials" in said


def test_what_the_race_had_measured_is_not_measured_again(forks: Forks) -> None:
    answer, _, _ = forks.tune("--json", at="attnreg.store:Store.add", when="before", n=1)
    assert killed(answer)
    laps = sum(path.read_text().count('"lap ') for path in forks.data.rglob("*.journal"))
    assert laps >= 1
    answer, _, _ = forks.tune("--json")
    assert answer["status"] == 0
    assert sum(path.read_text().count('"lap ') for path in forks.data.rglob("*.journal")) == laps


def test_a_tune_killed_after_its_record_was_written_is_over(forks: Forks) -> None:
    """Asked again, it measures again: samples that are in the record already must not count as new evidence."""
    answer, _, _ = forks.tune("--json", at="attnreg.store:Store.add", when="after", n=1)
    assert killed(answer)
    answer, said, _ = forks.tune("--json", "--again")
    assert answer["status"] == 0
    assert json.loads(said)["resumed"] == 0
    assert len(forks.measured()) == 2 * POINTS


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(forks: Forks, seed: int, tmp_path: Path) -> None:
    """Three kills of its process group, each at a moment drawn from the whole length of a run."""
    rng = random.Random(seed)
    whole = Forks(forks.process, tmp_path / "whole").tune("--json")[2]
    kills = 0
    for _ in range(3):
        answer, _, _ = forks.tune("--json", seconds=rng.uniform(0, whole))
        kills += killed(answer)
        assert len(forks.measured()) - forks.kept() <= kills
    answer, _, _ = forks.tune("--json")
    assert answer["status"] == 0
    check_finished(forks, kills)
