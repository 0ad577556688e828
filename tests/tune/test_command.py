"""`attnreg tune`: what it takes, what it prints for people and for programs, and that tuned calls use the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnreg import AttentionSpec, masks
from attnreg.cli import app, commands
from attnreg.store import Store
from attnreg.suites import attention_problem
from attnreg.tuning import write_problems

pytestmark = pytest.mark.alone

assert commands
RUN = CliRunner()


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    spec = AttentionSpec(mask=masks.Causal())
    write_problems(path, [attention_problem(spec, (2, 2), n, n, 16) for n in (32, 64)])
    return path


def test_a_dry_run_says_what_it_would_do_and_does_nothing(problems: Path, own_store: Store) -> None:
    made = RUN.invoke(app, ["tune", str(problems), "--dry-run"])
    assert made.exit_code == 0
    assert "eager (1)" in made.output
    rows = [
        json.loads(line) for line in RUN.invoke(app, ["tune", str(problems), "--dry-run", "--json"]).output.splitlines()
    ]
    assert [row["points"]["eager"] for row in rows] == [1, 1]
    assert not any(row["known"] for row in rows)
    assert list(own_store.records()) == []


def test_it_tunes_prints_and_next_time_passes_over(problems: Path, own_store: Store) -> None:
    command = ["tune", str(problems), "--backends", "eager,sdpa", "--budget", "2", "--seconds", "12"]
    first = RUN.invoke(app, [*command, "--json"])
    assert first.exit_code == 0
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["tuned", "tuned"]
    assert all(row["winner"]["backend"] in ("eager", "sdpa") and row["trials"] == 2 for row in rows)
    assert len(list(own_store.records("user"))) == 2
    second = RUN.invoke(app, command)
    assert second.exit_code == 0
    assert second.stdout.count("--again tunes anew") == 2
    assert second.stderr.count("--again tunes anew") == 2  # and a line for each where no bars show
    shown = RUN.invoke(app, ["tune", str(problems), "--dry-run"])
    assert "user" in shown.output


def test_a_summary_for_people(problems: Path) -> None:
    made = RUN.invoke(app, ["tune", str(problems), "--only", "Sq32", "--backends", "eager", "--no-keep"])
    assert made.exit_code == 0
    for word in ("problem 1", "eager", "winner", "runner-up"):
        assert word in made.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to tune"),
        (["--suite", "nope"], "no suite is named 'nope'"),
        (["--model-shape", "nope"], "no model shape is named 'nope'"),
        (["missing.jsonl"], "cannot be read"),
        (["--suite", "prefill", "--cache", "tepid"], "expected warm or cold"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], said: str) -> None:
    made = RUN.invoke(app, ["tune", *arguments])
    assert made.exit_code != 0
    assert said in made.output + str(made.exception)


def test_a_problem_that_no_backend_runs_is_an_error_of_its_own(tmp_path: Path, own_store: Store) -> None:
    path = tmp_path / "p.jsonl"
    write_problems(path, [attention_problem(AttentionSpec(), (2, 2), 16, 16, 16, device="cuda")])
    made = RUN.invoke(app, ["tune", str(path), "--json"])
    assert made.exit_code == 1
    assert json.loads(made.stdout)["status"] == "error"
