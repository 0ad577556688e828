"""The worker's end: a process that reads requests as JSON lines on one pipe and answers on another."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnreg.measure.candidates import Candidate, Plan, Refusal
from attnreg.measure.local import LocalBench

__all__ = ["serve"]


def serve(incoming: int, outgoing: int) -> None:
    """Answer requests until the pipe closes. A candidate's own print goes to stderr, never into the pipe."""
    _die_with_parent()
    _volunteer_for_oom()
    with os.fdopen(incoming, "r", encoding="utf-8") as requests, os.fdopen(outgoing, "w", encoding="utf-8") as answers:

        def say(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        bench: LocalBench | None = None
        for text in requests:
            request = json.loads(text)
            try:
                if request["op"] == "plan":
                    plan = Plan.from_json(request["plan"])
                    bench = LocalBench(plan, at=lambda c: say({"at": {"backend": c.backend, "config": dict(c.config)}}))
                    gc.freeze()  # what is loaded by now stays: each later collection need not walk it
                    say({"done": asdict(bench.about())})
                else:
                    assert bench is not None, "the plan comes first"
                    say({"done": _answer(bench, request)})
            except Refusal as refusal:
                say({"refused": str(refusal)})
            except Exception as error:
                say({"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})


def _answer(bench: LocalBench, request: dict[str, Any]) -> Any:
    candidates = [Candidate(c["backend"], c["config"]) for c in request["candidates"]]
    op = request["op"]
    if op == "gate":
        return asdict(bench.gate(candidates[0], request["budget"]))
    if op == "open":
        return asdict(bench.open(candidates[0], request["give_up"]))
    if op == "rounds":
        return [asdict(r) for r in bench.rounds(candidates, request["count"])]
    assert op == "close", op
    return bench.close(candidates[0])


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent is gone: a hung kernel would never read the closed pipe."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _volunteer_for_oom() -> None:
    """If memory runs out, this process should end, and no other."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
