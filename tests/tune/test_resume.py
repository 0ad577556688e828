"""kill -9 at any point: the same command goes on with what was measured, says so, and loses at most one trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnreg.spec import AttentionSpec
from attnreg.store import Store
from attnreg.suites import attention_problem
from attnreg.tuning import write_problems

COMMAND = [sys.executable, "-m", "attnreg", "tune"]


def finished(data: Path) -> int:
    """Trials that the journals hold a result of."""
    count = 0
    for journal in data.rglob("*.journal"):
        for raw in journal.read_bytes().splitlines():
            try:
                entry = json.loads(raw)
            except ValueError:
                continue
            count += entry.get("op_code") == 6 and entry.get("state") == 1
    return count


@pytest.mark.parametrize("after", [1, 3])
def test_kill_and_go_on(tmp_path: Path, own_store: Store, after: int) -> None:
    problems = tmp_path / "problems.jsonl"
    write_problems(problems, [attention_problem(AttentionSpec(), (2, 2), 64, 64, 16)])
    data = tmp_path / "data"
    environ = {**os.environ, "ATTNREG_DATA_DIR": str(data), "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, str(problems), "--backends", "sdpa,eager", "--json"]
    running = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while finished(data) < after and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running.poll() is None, "it ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = finished(data)
    assert kept >= after
    again = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(again.stdout)
    assert result["status"] == "tuned"
    assert kept - 1 <= result["resumed"] <= kept
    assert result["trials"] == finished(data) == 4
    once_more = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(once_more.stdout)["status"] == "known"
    assert len(list(own_store.records("user"))) == 1
    assert worker_count() == 0


def worker_count() -> int:
    """Measuring workers that a killed tune left behind."""
    count = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes()
        except OSError:
            continue
        parent = _parent(entry.parent)
        count += b"attnreg.measure.worker" in text and parent == 1
    return count


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return -1
