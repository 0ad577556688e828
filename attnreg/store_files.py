"""Database files: one record a line, sorted; atomic writes under a lock; broken lines set aside and named."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnreg.errors import RecordError
from attnreg.folders import LockTimeoutError, locked, ready
from attnreg.records import Record
from attnreg.records_json import SCHEMA, line, parse_line, schema_of

__all__ = ["Broken", "Contents", "file_of", "files", "read", "rewrite"]

LOCK_SECONDS = 60.0
_MAX_FILE = 1 << 28


@dataclass(frozen=True)
class Broken:
    """A line, file or plugin record that was set aside: where it stands, and why it cannot be used."""

    where: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """What a file holds: records; lines of a newer schema, kept as they are; and broken lines with their text."""

    records: tuple[Record, ...] = ()
    newer: tuple[str, ...] = ()
    broken: tuple[tuple[Broken, str], ...] = ()

    def named(self) -> list[Broken]:
        """All that was set aside."""
        return [broken for broken, _ in self.broken]


def file_of(root: Path, record: Record) -> Path:
    """The file of a record: a folder a class of machine, a file a dtype and direction."""
    direction = "backward" if record.problem.needs_grad else "forward"
    return root / record.slug / f"{record.problem.dtype}-{direction}.json"


def files(folder: Path) -> list[Path]:
    """The database files of one machine class, sorted; none where there is no such folder."""
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and path.is_file())
    return []


def read(path: Path) -> Contents:
    """Everything in a file. Never raises for what the file holds; a file that cannot be read is named as broken.

    A file is a JSON array with one record a line; bare lines are read as well.
    """
    try:
        if path.stat().st_size > _MAX_FILE:
            raise OSError(f"larger than {_MAX_FILE} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        return Contents()
    except OSError as error:
        return Contents(broken=((Broken(str(path), f"cannot be read: {error}"), ""),))
    records: list[Record] = []
    newer: list[str] = []
    broken: list[tuple[Broken, str]] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        text = raw.decode("utf-8", "backslashreplace").strip().rstrip(",").rstrip()
        if text in ("", "[", "]", "[]"):
            continue
        try:
            records.append(parse_line(text))
        except RecordError as error:
            found = Broken(f"{path}:{number}", str(error))
            if _is_newer(text):
                newer.append(text)
                broken.append((found, ""))
            else:
                broken.append((found, text))
    return Contents(tuple(records), tuple(newer), tuple(broken))


def rewrite(root: Path, path: Path, change: Callable[[Sequence[Record]], Sequence[Record]]) -> list[Record]:
    """Replace a file's records by what `change` makes of them, whole or not at all; returns the new records.

    Writers of one database wait for one another; readers see the old file or the new one. Lines of a newer
    schema stay; broken lines move to `<file>.broken` beside it. Raises RecordError where the database cannot be
    written or stays locked.
    """
    try:
        ready(path.parent)
        with locked(root / ".lock", LOCK_SECONDS):
            now = read(path)
            made = sorted(change(now.records), key=lambda record: (record.problem.key(), line(record)))
            lines = sorted({*map(line, made), *now.newer})
            aside = [text for _, text in now.broken if text]
            if aside:
                _append(path.with_name(path.name + ".broken"), aside)
            _sweep(path)
            _replace(path, "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
    except LockTimeoutError as error:
        raise RecordError(
            f"{root}: locked by another process for over {LOCK_SECONDS:g} s ({error.filename})"
        ) from error
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error}; set ATTNREG_DATA_DIR to a folder that can") from error
    return list(made)


def _is_newer(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        schema = schema_of(json.loads(text))
        return schema is not None and schema > SCHEMA
    return False


def _append(path: Path, lines: Sequence[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(text + "\n" for text in lines))
        file.flush()
        os.fsync(file.fileno())


def _sweep(path: Path) -> None:
    """Take away what writers that were killed left beside the file; under the lock nobody else writes."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def _replace(path: Path, text: str) -> None:
    """Write beside the file, then move over it: a reader never sees half of it, not even after a power cut."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a database may be shared
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
