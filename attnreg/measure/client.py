"""The tuner's end of a worker: starts it, watches its time and memory, ends it, and starts it anew."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from typing import IO, Any, Literal, NoReturn

import torch

from attnreg import folders
from attnreg.errors import TuneError
from attnreg.measure import child
from attnreg.measure.candidates import About, Candidate, Died, Opened, Plan, Refusal, Round, Verdict
from attnreg.measure.memory import available, resident
from attnreg.measure.patience import Patience

__all__ = ["Worker"]

START_LIMIT = 180.0
POLL = 0.02


class Worker:
    """A bench in a process of its own, kept from one candidate to the next; a candidate that kills it is a result.

    Use as a context manager. `restarts` counts how often it had to be started again.
    """

    def __init__(self, plan: Plan) -> None:
        threads = plan.threads or torch.get_num_threads()
        self.plan = Plan(**{**vars(plan), "threads": threads})
        self.memory_limit = plan.memory_limit or int(0.8 * available())
        self.restarts = -1
        self._about = About({}, "")
        self._process: subprocess.Popen[bytes] | None = None
        self._to: IO[str] | None = None
        self._from = -1
        self._buffer = b""
        self._log: IO[bytes] | None = None
        self._at: Candidate | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def about(self) -> About:
        """See `Bench.about`."""
        if self._process is None:
            self._start()
        return self._about

    def gate(self, candidate: Candidate, budget: Literal["quick", "full"] = "quick") -> Verdict:
        """See `Bench.gate`. Raises Died where the candidate takes the worker with it."""
        return Verdict(**self._ask("gate", [candidate], self.plan.time_limit, budget=budget))

    def open(self, candidate: Candidate, give_up: float = 0.0) -> Opened:
        """See `Bench.open`."""
        return Opened(**self._ask("open", [candidate], self.plan.time_limit, give_up=give_up))

    def rounds(self, candidates: list[Candidate], count: int) -> list[Round]:
        """See `Bench.rounds`. The time limit holds for each sample, not for all of them."""
        answer = self._ask("rounds", candidates, self.plan.time_limit, count=count)
        return [Round(tuple(r["seconds"]), tuple(r["quiet"])) for r in answer]

    def close(self, candidate: Candidate) -> None:
        """See `Bench.close`."""
        if self._process is not None:
            self._ask("close", [candidate], self.plan.time_limit)

    def _ask(self, op: str, candidates: list[Candidate], limit: float, **more: Any) -> Any:
        if self._process is None:
            self._start()
        named = [{"backend": c.backend, "config": dict(c.config)} for c in candidates]
        self._at = candidates[0]
        return self._exchange({"op": op, "candidates": named, **more}, limit)

    def _start(self) -> None:
        """Start the process and give it the plan."""
        self._log = folders.scratch_file()  # lives as long as the process; _end closes it
        # ATTNREG_AUTOTUNE off: a worker that tuned would start workers of its own.
        environ = {**folders.child_environ(), "ATTNREG_AUTOTUNE": ""}
        self._process, self._to, self._from = child.start("attnreg.measure.worker", environ, self._log)
        self._buffer, self._at = b"", None
        self.restarts += 1
        try:
            self._about = About(**self._exchange({"op": "plan", "plan": self.plan.to_json()}, START_LIMIT))
        except Refusal as why:
            raise TuneError(f"the measuring worker cannot be set up for {self.plan.problem}: {why}") from why

    def _exchange(self, request: dict[str, Any], limit: float) -> Any:
        assert self._to is not None
        try:
            self._to.write(json.dumps(request) + "\n")
            self._to.flush()
        except OSError:
            self._died()
        while True:
            message = json.loads(self._line(limit))
            if "at" in message:
                self._at = Candidate(message["at"]["backend"], message["at"]["config"])
            elif "done" in message:
                return message["done"]
            elif "refused" in message:
                raise Refusal(message["refused"], self._at)
            else:
                raise TuneError(f"the measuring worker failed: {message['failed']}\n{message['trace']}")

    def _line(self, limit: float) -> bytes:
        """The next line of the worker, while its time and memory are watched."""
        assert self._process is not None
        patience = Patience(self._process.pid, limit)
        while b"\n" not in self._buffer:
            if patience.over():
                self._end()
                raise Died("hang", f"hung: no answer within {limit:g} s", self._at)
            ready, _, _ = select.select([self._from], [], [], POLL)
            if ready:
                chunk = os.read(self._from, 1 << 16)
                if not chunk:
                    self._died()
                self._buffer += chunk
            elif self.memory_limit and (held := resident(self._process.pid)) > self.memory_limit:
                self._end()
                text = f"took {held / 2**30:.2f} GiB; the limit is {self.memory_limit / 2**30:.2f} GiB"
                raise Died("memory", text, self._at)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self) -> NoReturn:
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = 0
        said = self._last_words()
        self._end()
        if code < 0:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
            kind = "memory" if name == "SIGKILL" else "crash"
            hint = " (out of memory?)" if kind == "memory" else ""
            raise Died(kind, f"crashed with {name}{hint}{said}", self._at)
        raise Died("crash", f"ended the process with status {code}{said}", self._at)

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        with contextlib.suppress(OSError):
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(self._log.tell() - 2000, 0))
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
            return f": {lines[-1][:200]}" if lines else ""
        return ""

    def _end(self) -> None:
        """Kill the worker and whatever it started, and forget it."""
        process, self._process = self._process, None
        if process is not None:
            child.kill(process)
        if self._to is not None:
            with contextlib.suppress(OSError):
                self._to.close()
            self._to = None
        if self._from >= 0:
            os.close(self._from)
            self._from = -1
        if self._log is not None:
            self._log.close()
            self._log = None
