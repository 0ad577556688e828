"""The worker: answers, survives, is ended with its tuner; and the clock, memory and leak watch behind it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attnreg import AttentionSpec, masks, registry
from attnreg.hardware import Hardware, detect
from attnreg.measure import Candidate, Died, LocalBench, Plan, Refusal, Worker
from attnreg.measure.memory import peak_over, resident
from attnreg.measure.timing import Clock
from attnreg.problem import Problem
from attnreg.space import SearchSpace
from attnreg.suites import attention_problem
from attnreg.tuning import Options, tune_problem

pytestmark = pytest.mark.alone

PROBLEM = attention_problem(AttentionSpec(mask=masks.Causal()), (2, 2), 64, 64, 16)
EAGER = Candidate("eager")


def test_one_worker_answers_and_ends_with_its_block() -> None:
    with Worker(Plan(PROBLEM, leak_seconds=0.1)) as worker:
        assert worker.about().versions["eager"] == registry.current().get("eager").backend.version
        assert worker.gate(EAGER, "quick").ok
        assert worker.open(EAGER).seconds > 0
        rounds = worker.rounds([EAGER, Candidate("sdpa", {"kernel": "auto"})], 3)
        assert len(rounds) == 3
        assert all(len(r.seconds) == len(r.quiet) == 2 and min(r.seconds) > 0 for r in rounds)
        assert not worker.gate(Candidate("eager", {"no": 1}), "quick").ok
        assert not worker.gate(Candidate("nobody"), "quick").ok
        with pytest.raises(Refusal, match="no backend is named 'nobody'"):
            worker.open(Candidate("nobody"))
        process = worker._process
        assert process is not None
        assert worker.restarts == 0
    assert process.poll() is not None


def test_a_worker_that_died_is_started_again(planted: registry.Registry) -> None:
    plan = Plan(PROBLEM, time_limit=60.0, leak_seconds=0.1)
    with Worker(plan) as worker:
        for name, kind in (("planted_crash", "crash"), ("planted_leave", "crash")):
            with pytest.raises(Died) as died:
                worker.open(Candidate(name))
            assert (died.value.kind, died.value.candidate) == (kind, Candidate(name))
        assert worker.open(EAGER).seconds > 0
        assert worker.restarts == 2
        with pytest.raises(Died) as died:  # in a round, the one that ran is named, not the first
            worker.rounds([EAGER, Candidate("planted_crash")], 1)
        assert died.value.candidate == Candidate("planted_crash")


def test_backends_are_asked_about_the_bucket_as_by_a_call() -> None:
    asked: list[Problem] = []
    real = registry.current().get("eager").backend

    class Spy:
        name, version = "spy", "1"

        def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
            asked.append(problem)
            return []

        def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
            asked.append(problem)
            return real.space(problem, hardware)

        def version_for(self, problem: Problem, hardware: Hardware) -> str:
            asked.append(problem)
            return "1"

        def prepare(self, problem: Problem, config: Any) -> Any:
            asked.append(problem)
            return real.prepare(problem, config)

    problem = attention_problem(AttentionSpec(mask=masks.Causal()), (2, 2), 50, 50, 16, batch=3)
    with registry.using(registry.Registry({"spy": registry.Entry(Spy(), "spy", "here")})):
        report = tune_problem(problem, Options(isolate=False, keep=False))
        assert report.record is not None
        assert report.record.problem == problem
        assert problem.bucket() in asked
        assert {p for p in asked if p != p.bucket()} == set()


def test_what_candidates_print_does_not_reach_the_pipe(planted: registry.Registry) -> None:
    with Worker(Plan(PROBLEM, leak_seconds=0.1)) as worker:
        assert worker.gate(Candidate("planted_chatty"), "quick").ok
        assert worker.open(Candidate("planted_chatty")).seconds > 0


def test_the_leak_watch_tells_a_leak_from_a_cache(planted: registry.Registry) -> None:
    with LocalBench(Plan(PROBLEM)) as bench:
        assert bench.open(Candidate("planted_leak")).leak >= 2 * 64 * 16 * 4
        assert bench.open(EAGER).leak == 0


def test_a_leak_is_found_in_a_candidate_that_is_too_slow_to_time(planted: registry.Registry) -> None:
    with LocalBench(Plan(PROBLEM, sample_seconds=0.0)) as bench:
        slow = bench.open(Candidate("planted_leak"), give_up=1e-9)
        assert slow.given_up
        assert slow.leak >= 2 * 64 * 16 * 4
        assert bench.open(EAGER, give_up=1e-9).leak == 0


def test_what_is_given_up_has_a_known_peak_and_short_calls_are_not_given_up() -> None:
    large = attention_problem(AttentionSpec(), (2, 2), 1024, 1024, 16)
    with LocalBench(Plan(large, sample_seconds=0.0)) as bench:
        made = bench.open(EAGER, give_up=1e-9)
        assert made.given_up
        assert made.peak_memory > 2 * 1024 * 1024 * 4  # at least the scores
    with LocalBench(Plan(PROBLEM, sample_seconds=10.0)) as bench:
        assert not bench.open(EAGER, give_up=1e-9).given_up  # one call of so short a kernel tells nothing


def test_a_leak_is_found_however_slow_the_machine_is(
    planted: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few calls are enough: a busy machine affords no more, and a large problem neither."""
    monkeypatch.setattr("attnreg.measure.local.LocalBench._leak", _as_if_slow)
    with LocalBench(Plan(PROBLEM)) as bench:
        assert 2 * 64 * 16 * 4 <= bench.open(Candidate("planted_leak")).leak <= 4 * 2 * 64 * 16 * 4
        for name in ("eager", "sdpa", "cpu"):
            default = registry.current().get(name).backend.space(PROBLEM, detect()).default
            assert bench.open(Candidate(name, default)).leak == 0


_leak = LocalBench._leak


def _as_if_slow(bench: LocalBench, call: Any, seconds: float) -> int:
    return _leak(bench, call, 10.0)


def test_peak_memory_is_what_a_call_takes_for_a_while() -> None:
    def call() -> None:
        torch.ones(16 << 20).sum()

    assert 60 << 20 < peak_over(call, "cpu") < 90 << 20
    assert peak_over(lambda: None, "cpu") < 4 << 20
    assert resident() > 10 << 20
    assert resident(pid=999_999_999) == 0


def test_the_clock_repeats_short_calls_and_flushes_when_cold() -> None:
    hardware = detect()
    calls: list[float] = []

    def call() -> None:
        calls.append(time.perf_counter())

    Clock(hardware, "warm", 1e-3).sample(call, 1e-5)
    assert len(calls) == 101  # one to warm up
    calls.clear()
    Clock(hardware, "cold", 1e-3).sample(call, 4e-4)
    assert len(calls) == 3
    assert min(b - a for a, b in itertools.pairwise(calls)) > 1e-5  # the flush lies between


def test_the_tuner_is_not_imported_by_the_package() -> None:
    import subprocess
    import sys

    code = "import attnreg, sys; sys.exit('optuna' in sys.modules or 'attnreg.tuning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_tuner_imports_optuna() -> None:
    import attnreg

    root = Path(attnreg.__file__).parent
    found = {p.relative_to(root).parts[0] for p in root.rglob("*.py") if "import optuna" in p.read_text()}
    assert found == {"tuning"}


def test_no_pickle_no_eval_in_the_database_and_the_worker() -> None:
    import attnreg

    root = Path(attnreg.__file__).parent
    paths = [*root.glob("records*.py"), *root.glob("store*.py"), root / "evidence.py", root / "db.py"]
    paths += [*root.joinpath("measure").glob("*.py"), *root.joinpath("tuning").glob("*.py")]
    for path in paths:
        text = path.read_text()
        for word in ("pickle", "eval(", "exec(", "import_module", "__import__", "shell=True", "os.system"):
            assert word not in text, (path, word)
