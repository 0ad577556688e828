"""Compiling processes: results come back, and a compiler that crashes, hangs or spills is a refusal with its reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from attnreg import AttentionSpec, StaticReport
from attnreg.errors import TuneError
from attnreg.measure import Candidate
from attnreg.suites import attention_problem
from attnreg.tuning.compilers import Compilers, Job

PLUGIN = """
import os, time
from attnreg import SearchSpace, StaticReport, hookimpl

class Odd:
    name, version = "odd", "1"
    def supports(self, problem, hardware): return []
    def space(self, problem, hardware): return SearchSpace({"do": ("well",)}, default={"do": "well"})
    def prepare(self, problem, config): raise NotImplementedError
    def cross_compile(self, problem, config, target):
        what = config["do"]
        print("compilers talk")
        if what == "crash": os.abort()
        if what == "leave": os._exit(7)
        if what == "hang": time.sleep(60)
        if what == "raise": raise RuntimeError("ptxas says no")
        if what == "nothing": return None
        return StaticReport(target, registers=40, spills=8 if what == "spill" else 0, seconds=1e-3)

@hookimpl
def attnreg_backends(): return [Odd()]
"""
PROBLEM = attention_problem(AttentionSpec(), (1, 1), 64, 64, 16, device="cuda")
WANTED = {
    "well": "",
    "crash": "does not compile: its compiler crashed with SIGABRT",
    "leave": "does not compile: its compiler ended with status 7",
    "hang": "does not compile: no answer within 12 s",
    "raise": "does not compile: RuntimeError: ptxas says no",
    "nothing": "gives no report for this problem",
    "spill": "spills (8 bytes or instructions) at 40 registers",
}


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_compiler.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ATTNREG_PLUGINS", "odd_compiler")


def run(compilers: Compilers, *names: str) -> dict[str, StaticReport]:
    waiting = [Job(PROBLEM, Candidate("odd", {"do": name}), "sm_90") for name in names]
    out: dict[str, StaticReport] = {}

    def done(job: Job, report: StaticReport) -> None:
        out[str(job.candidate.config["do"])] = report

    compilers.run(lambda: waiting.pop(0) if waiting else None, done)
    return out


@pytest.mark.usefixtures("odd")
def test_each_end_of_a_compiler_is_a_result() -> None:
    with Compilers(2, time_limit=12.0) as compilers:
        found = run(compilers, *WANTED, "well")
        assert {name: report.refused for name, report in found.items()} == WANTED
        assert (found["well"].registers, found["well"].seconds) == (40, 1e-3)
        assert found["spill"].seconds is None
        start = time.monotonic()
        assert run(compilers, "well")["well"].refused == ""  # a process is kept
        assert time.monotonic() - start < 5.0


def test_processes_must_be_a_number() -> None:
    with pytest.raises(TuneError, match="jobs: expected 0 or more processes, got -1"):
        Compilers(-1)
