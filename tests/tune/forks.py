"""Runs `attnreg tune` in forks of one process, so that a run costs no imports; a fork can kill itself at a named point.

Requests and answers are JSON lines on stdin and stdout. A request: "arguments" of the command; "data", a folder; "out",
a file for what the fork prints; and either "at" ("module:name" or "module:Class.name"), "when" ("before", "after" or
"torn") and "n", to die at the n-th call of that function, or "seconds", after which its process group is killed.
Answered with "status", as waitpid gives it, and "seconds".
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._inductor  # torch.use_deterministic_algorithms, which the gate calls, would import it in every fork

from attnreg import registry
from attnreg.cli import app, commands
from attnreg.measure import LocalBench
from attnreg.tuning import session
from attnreg.tuning.evaluate import Evaluator

assert commands


def main() -> None:
    """Serve until stdin ends."""
    torch.set_num_threads(1)
    registry.current()
    gc.freeze()  # as the worker does: each collection of the leak watch need not walk what the imports made
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if not child:
            run(request)
        if "seconds" in request:
            time.sleep(request["seconds"])
            kill(child)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


def kill(child: int) -> None:
    """Kill its process group, or it alone where it has not come as far as to lead one."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)


def run(request: dict[str, Any]) -> None:
    """In the fork: the command, with candidates measured in this very process."""
    os.setsid()
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.environ["ATTNREG_DATA_DIR"] = request["data"]
    session.Worker = LocalBench  # type: ignore[misc]  # a worker would import everything anew
    note_evaluations(Path(request["data"]))
    if "at" in request:
        plant(request["at"], request["when"], request["n"])
    app(request["arguments"])  # ends the process


def note_evaluations(data: Path) -> None:
    """Write down each candidate that was measured: what a kill loses is measured twice."""
    data.mkdir(exist_ok=True)
    evaluate = Evaluator.evaluate

    def noted(self: Evaluator, candidate: Any) -> Any:
        outcome = evaluate(self, candidate)
        with open(data / "evaluated", "a") as file:
            file.write(candidate.key + "\n")
        return outcome

    Evaluator.evaluate = noted  # type: ignore[method-assign]  # for this process only


def plant(at: str, when: str, n: int) -> None:
    """Die at the n-th call of a function: before it, after it, or with half of what it should write."""
    module, _, path = at.partition(":")
    owner: Any = importlib.import_module(module)
    *way, name = path.split(".")
    for part in way:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), [0]

    def planted(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == n and when == "torn":
            tear(*args)
        if calls[0] == n and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **more)
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, planted)


def tear(backend: Any, logs: list[dict[str, Any]]) -> None:
    """Half of what a journal would write: cut off within a line."""
    text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
    with open(backend._file_path, "a") as file:
        file.write(text[: len(text) // 2])


if __name__ == "__main__":
    main()
