"""A compiling process: reads configurations as JSON lines on one pipe, answers what their binaries show on another."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from attnreg import registry
from attnreg.backend import StaticReport
from attnreg.problem import Problem

__all__ = ["compiled", "serve"]


def compiled(name: str, problem: Problem, config: dict[str, Any], target: str) -> StaticReport:
    """A loaded backend's report; refused where it raises, gives none, or spills."""
    try:
        backend: Any = registry.current().entries[name].backend
        report = backend.cross_compile(problem, dict(config), target)
    except Exception as error:
        return StaticReport(target, refused=f"does not compile: {type(error).__name__}: {str(error)[:300]}")
    if not isinstance(report, StaticReport):
        return StaticReport(target, refused="gives no report for this problem")
    if report.spills and not report.refused:
        # Whatever a backend thinks of it: nothing that a static record names may spill.
        raise_to = f"spills ({report.spills} bytes or instructions) at {report.registers} registers"
        return StaticReport(**{**asdict(report), "seconds": None, "refused": raise_to})
    return report


def serve(incoming: int, outgoing: int) -> None:
    """Answer requests until the pipe closes. What a compiler prints goes to the process's output, not the pipe."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a hung compiler sees no closed pipe
    with os.fdopen(incoming, "r", encoding="utf-8") as asked, os.fdopen(outgoing, "w", encoding="utf-8") as answers:
        for line in asked:
            request = json.loads(line)
            problem = Problem.from_json(request["problem"])
            report = compiled(request["backend"], problem, request["config"], request["target"])
            answers.write(json.dumps(asdict(report)) + "\n")
            answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
