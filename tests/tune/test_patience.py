"""Patience counts only the time in which a process could have run; a worker that was stopped or starved is no hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from attnreg import AttentionSpec, masks
from attnreg.measure import Candidate, Plan, Worker
from attnreg.measure.patience import Patience, stopped, waited
from attnreg.suites import attention_problem

pytestmark = pytest.mark.alone


class Machine:
    """A clock, threads' waiting times, and a process that is stopped or not."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits = {"1": 7.0, "2": 3.0}
        self.stopped = False

    def patience(self, limit: float) -> Patience:
        return Patience(1, limit, lambda: self.now, lambda pid: dict(self.waits), lambda pid: self.stopped)

    def lasts(self, patience: Patience, *, share: float = 0.0, most: float = 1e3) -> float:
        """Seconds until it runs out, while thread 2 waits that share of the time."""
        start = self.now
        while not patience.over():
            self.now += 0.02
            self.waits["2"] += 0.02 * share
            if self.now - start > most:
                return most
        return self.now - start


def test_without_hindrance_the_limit_is_the_limit() -> None:
    machine = Machine()
    assert machine.lasts(machine.patience(10)) == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize(("share", "lasts"), [(0.5, 20.0), (0.75, 40.0), (1.0, 50.0)])
def test_waiting_for_a_processor_does_not_count_but_not_for_ever(share: float, lasts: float) -> None:
    machine = Machine()
    assert machine.lasts(machine.patience(10), share=share) == pytest.approx(lasts, rel=0.02)


def test_a_stopped_process_has_all_its_time_left() -> None:
    machine = Machine()
    patience = machine.patience(10)
    machine.stopped = True
    assert machine.lasts(patience, most=200) == 200
    machine.stopped = False
    assert machine.lasts(patience) == pytest.approx(10, abs=1.2)


def test_who_waits_standing_still_counts_nothing() -> None:
    machine = Machine()
    patience = machine.patience(10)
    machine.now += 300
    assert machine.lasts(patience) == pytest.approx(10, abs=0.1)


def test_what_the_system_tells() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert not stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while not stopped(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stopped(process.pid)
        process.kill()
    if sys.platform == "linux":
        assert all(seconds >= 0 for seconds in waited(os.getpid()).values())
    assert waited(999_999_999) == {}
    assert not stopped(999_999_999)


def test_a_worker_that_was_stopped_for_longer_than_its_limit_is_not_taken_for_hung() -> None:
    problem = attention_problem(AttentionSpec(mask=masks.Causal()), (2, 2), 64, 64, 16)
    with Worker(Plan(problem, time_limit=3.0, leak_seconds=0.1)) as worker:
        worker.about()
        assert worker._process is not None
        pid = worker._process.pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(5.0, os.kill, (pid, signal.SIGCONT)).start()
        assert worker.open(Candidate("eager")).seconds > 0
        assert worker.restarts == 0
