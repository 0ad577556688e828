"""Record the problems of a running model, without tuning; read such lists back."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from attnreg import modes
from attnreg.errors import RecordError, SpecError
from attnreg.problem import Problem

__all__ = ["Recorder", "read_problems", "record", "write_problems"]


class Recorder:
    """Collects problems, one of each bucket, and writes each as a JSON line as it comes.

    problems: what was collected. skipped: problems that have no JSON (custom masks), as text.
    """

    def __init__(self, file: IO[str] | None = None, known: list[Problem] | None = None) -> None:
        self.problems: list[Problem] = list(known or [])
        self.skipped: list[str] = []
        self._file = file
        self._lock = threading.Lock()
        self._keys = {problem.bucket().key() for problem in self.problems}

    def __call__(self, problem: Problem) -> None:
        """Note a problem; one whose bucket is known is not noted again."""
        with self._lock:
            try:
                key = problem.bucket().key()
            except SpecError:
                self.skipped.append(str(problem))
                return
            if key in self._keys:
                return
            self._keys.add(key)
            self.problems.append(problem)
            if self._file is not None:
                self._file.write(_line(problem) + "\n")
                self._file.flush()


@contextlib.contextmanager
def record(path: str | Path) -> Iterator[Recorder]:
    """Within the block, the problem of every attention call is written to `path`, one JSON line a bucket of sizes.

    Nothing is tuned, and nothing is slower once a call repeats. A file that exists is added to. Calls inside
    torch.compile are not seen: run the model once in the block as it is, then `attnreg tune problems.jsonl`.
    Raises RecordError if the file holds something else.
    """
    path = Path(path)
    known = read_problems(path) if path.exists() else []
    with open(path, "a", encoding="utf-8") as file:
        recorder = Recorder(file, known)
        with modes.recording(recorder):
            yield recorder


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a file that `record` wrote. Raises RecordError naming the line that is none."""
    out = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from error
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            data = json.loads(text)
            out.append(Problem.from_json(data["problem"] if isinstance(data, dict) and "problem" in data else data))
        except (RecordError, ValueError, RecursionError) as error:
            raise RecordError(f"{path}:{number}: {error}") from error
    return out


def write_problems(path: str | Path, problems: list[Problem]) -> None:
    """Write a list that `read_problems` reads."""
    Path(path).write_text("".join(_line(problem) + "\n" for problem in problems), encoding="utf-8")


def _line(problem: Problem) -> str:
    return json.dumps({"problem": problem.to_json()}, sort_keys=True)
