"""Compile configurations in processes side by side; one that crashes or hangs its compiler is a refusal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from attnreg import folders
from attnreg.backend import StaticReport
from attnreg.errors import TuneError
from attnreg.measure import Candidate, child
from attnreg.problem import Problem
from attnreg.tuning.compile_worker import compiled

__all__ = ["Compilers", "Job"]


@dataclass(frozen=True)
class Job:
    """A configuration to compile for a target."""

    problem: Problem
    candidate: Candidate
    target: str


class _Process:
    """One compiling process and what it is at."""

    def __init__(self) -> None:
        # TRITON_INTERPRET would load kernels for the interpreter; a compiler needs one thread.
        environ = {name: value for name, value in folders.child_environ().items() if name != "TRITON_INTERPRET"}
        environ["OMP_NUM_THREADS"] = "1"
        self.process, self.to, self.incoming = child.start("attnreg.tuning.compile_worker", environ, subprocess.DEVNULL)
        self.buffer = b""
        self.job: Job | None = None
        self.deadline = 0.0

    def ask(self, job: Job, limit: float) -> None:
        self.job, self.deadline = job, time.monotonic() + limit
        request = {"problem": job.problem.to_json(), "backend": job.candidate.backend, "target": job.target}
        with contextlib.suppress(OSError):  # a process that died is noticed when its answer is read
            self.to.write(json.dumps({**request, "config": dict(job.candidate.config)}) + "\n")
            self.to.flush()

    def read(self) -> StaticReport | None:
        """The answer if it is whole. Raises EOFError where the process is gone."""
        chunk = os.read(self.incoming, 1 << 16)
        if not chunk:
            raise EOFError
        self.buffer += chunk
        if b"\n" not in self.buffer:
            return None
        line, _, self.buffer = self.buffer.partition(b"\n")
        return StaticReport(**json.loads(line))

    def end(self, grace: float = 0.0) -> int:
        """Kill it and what it started, after `grace` seconds to end by itself; its status, negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        code = child.kill(self.process)
        with contextlib.suppress(OSError):
            self.to.close()
        os.close(self.incoming)
        return code


class Compilers:
    """A pool of `processes` compilers, kept from one call of `run` to the next; 0 compiles in this process.

    time_limit: seconds that one configuration may take. Use as a context manager.
    """

    def __init__(self, processes: int = 0, time_limit: float = 300.0) -> None:
        if processes < 0:
            raise TuneError(f"jobs: expected 0 or more processes, got {processes}")
        self.count = processes
        self.time_limit = time_limit
        self._idle: list[_Process] = []

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().end()

    def run(self, following: Callable[[], Job | None], done: Callable[[Job, StaticReport], object]) -> None:
        """Compile what `following` gives until it gives None, telling each result to `done`; both in this thread."""
        if self.count == 0:
            while (job := following()) is not None:
                done(job, compiled(job.candidate.backend, job.problem, dict(job.candidate.config), job.target))
            return
        busy: list[_Process] = []
        try:
            more = True
            while more or busy:
                while more and len(busy) < self.count:
                    job = following()
                    if job is None:
                        more = False
                        break
                    process = self._idle.pop() if self._idle else _Process()
                    process.ask(job, self.time_limit)
                    busy.append(process)
                for process, report in self._finished(busy):
                    busy.remove(process)
                    job, process.job = process.job, None
                    assert job is not None
                    if process.process.poll() is None:
                        self._idle.append(process)
                    done(job, report)
                    more = True  # a result may free what `following` held back
        finally:
            for process in busy:
                process.end()

    def _finished(self, busy: list[_Process]) -> list[tuple[_Process, StaticReport]]:
        """Processes with an answer, dead or out of time; waits a little for the first."""
        out = []
        ready = select.select([p.incoming for p in busy], [], [], 0.2)[0] if busy else []
        for process in busy:
            assert process.job is not None
            target = process.job.target
            if process.incoming in ready:
                try:
                    report = process.read()
                except EOFError:
                    report = StaticReport(target, refused=f"does not compile: {_cause(process.end(5.0))}")
                if report is not None:
                    out.append((process, report))
            elif time.monotonic() > process.deadline:
                process.end()
                why = f"does not compile: no answer within {self.time_limit:g} s"
                out.append((process, StaticReport(target, refused=why)))
        return out


def _cause(code: int) -> str:
    if code < 0 and -code in list(signal.Signals):
        return f"its compiler crashed with {signal.Signals(-code).name}"
    return f"its compiler ended with status {code}"
