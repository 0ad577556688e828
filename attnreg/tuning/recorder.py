"""Record the problems of a running model, without tuning; read such lists back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from attnreg import modes
from attnreg.errors import RecordError, SpecError
from attnreg.problem import GRADS, Problem

__all__ = ["Recorder", "read_problems", "record", "write_problems"]

STRIDES = ("contiguous", "rows", "expanded", "strided")


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
    Raises RecordError if the file holds something else or cannot be written.
    """
    path = Path(path)
    known = read_problems(path) if path.exists() else []
    with _opened(path) as file:
        recorder = Recorder(file, known)
        with modes.recording(recorder):
            yield recorder


def _opened(path: Path) -> IO[str]:
    """The file, to be added to; a last line that was left open is ended."""
    try:
        file = open(path, "a+b")  # noqa: SIM115  # handed on, or closed below
        try:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            return io.TextIOWrapper(file, encoding="utf-8")
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error}; name a file in a folder that can") from error


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
            data = data["problem"] if isinstance(data, dict) and "problem" in data else data
            out.append(_checked(Problem.from_json(data)))
        except (RecordError, ValueError, RecursionError) as error:
            raise RecordError(f"{path}:{number}: {error}") from error
    return out


def _checked(problem: Problem) -> Problem:
    """The problem if a call can make it. Raises RecordError naming the field that does not fit."""
    p = problem
    floats = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    tensors = {t.name for t in p.tensors} | p.spec.tensors()
    known = {"q", "k", "v", *(n for n in GRADS if n in tensors)}
    rules = [
        ("dtype", p.dtype in floats, f"one of {', '.join(floats)}"),
        ("kv_dtype", p.kv_dtype in (*floats, "int8"), f"one of {', '.join(floats)}, int8"),
        ("q_heads", p.q_heads > 0, "at least 1"),
        ("kv_heads", p.kv_heads > 0 and p.q_heads % p.kv_heads == 0, f"a divisor of q_heads={p.q_heads}"),
        ("grads", p.grads <= known, f"names of {', '.join(sorted(known))}"),
        ("square", p.square == (p.sq == p.skv), f"{p.sq == p.skv} for sq={p.sq}, skv={p.skv}"),
        ("strides", len(p.strides) == 3 and set(p.strides) <= set(STRIDES), f"three of {', '.join(STRIDES)}"),
        ("device", p.device in ("cpu", "cuda"), "cpu or cuda"),
    ]
    for name, fits, wanted in rules:
        if not fits:
            value = getattr(p, name)
            raise RecordError(
                f"problem: {name}: expected {wanted}, got {sorted(value) if name == 'grads' else value!r}"
            )
    return problem


def write_problems(path: str | Path, problems: list[Problem]) -> None:
    """Write a list that `read_problems` reads."""
    Path(path).write_text("".join(_line(problem) + "\n" for problem in problems), encoding="utf-8")


def _line(problem: Problem) -> str:
    return json.dumps({"problem": problem.to_json()}, sort_keys=True)
