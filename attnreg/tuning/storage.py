"""Where studies live: one journal a problem by default, a journal or a database of the user's choice otherwise."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError

from attnreg.backend import error_text
from attnreg.errors import InputError, TuneError
from attnreg.folders import Lock, ready
from attnreg.tuning.location import is_database, location, shown

__all__ = ["abandoned", "database_error", "digest", "ended", "left_behind", "open_storage", "open_study", "owner"]

STALE_SECONDS = 1800.0
"""A trial of another host that runs for longer than this is taken as abandoned."""
DRIVERS = (
    "sqlalchemy",
    "alembic",
    "optuna",
    "psycopg",
    "psycopg2",
    "pymysql",
    "MySQLdb",
    "oracledb",
    "pyodbc",
    "sqlite3",
)
"""Packages whose errors are a database's."""


def open_storage(where: str | Path) -> BaseStorage:
    """A journal file, or a database for a URL such as postgresql://host/name. Raises TuneError if it cannot be opened.

    A journal line that a kill left half written is cut off: Optuna would refuse the whole file.
    """
    try:
        place = location(where)
    except InputError as error:
        raise TuneError(str(error)) from None
    if isinstance(place, Path):
        return _journal(place)
    try:
        return _database(place)
    except Exception as error:
        why = error_text(error)
    # Out of the handler, so that what the driver said is no part of the traceback: it may hold the password.
    raise TuneError(f"storage {shown(place)} cannot be opened: {why}")


def database_error(where: str | Path | None, error: BaseException) -> str:
    """What went wrong with the database, without its password; empty for what is no error of a database's."""
    if where is None or not is_database(where):
        return ""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.partition(".")[0] in DRIVERS:
            return f"storage {shown(where)}: {error_text(error)}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _journal(path: Path) -> JournalStorage:
    try:
        ready(path.parent)
        # The kernel frees it when its holder is killed; Optuna's own would stay behind.
        lock = Lock(path.with_name(path.name + ".lock"))
        lock.acquire()
        try:
            _cut_torn_line(path)
        finally:
            lock.release()
        # Optuna keeps its base class for locks private; a lock is anything with acquire and release.
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]  # as above
    except Exception as error:
        raise TuneError(f"storage {path} cannot be opened: {error_text(error)}") from error


def _database(url: str) -> RDBStorage:
    """The database behind a URL. Workers that start together race to create its tables; the losers look again."""
    scheme, sep, rest = url.partition("://")
    if scheme == "postgresql" and not find_spec("psycopg2") and find_spec("psycopg"):
        url = f"postgresql+psycopg{sep}{rest}"  # SQLAlchemy takes the older driver unless told
    for wait in (0.2, 1.0, 3.0):
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except (IntegrityError, ProgrammingError):
            time.sleep(wait)
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


def open_study(
    storage: BaseStorage,
    name: str,
    sampler: optuna.samplers.BaseSampler,
    finished: Callable[[optuna.Study], bool] = lambda study: False,
) -> optuna.Study:
    """The unfinished study of that name, or a new generation of it: a finished one is never added to.

    finished: says so of a study whose tuner was killed before it could note it.
    """
    generation = 1
    while True:
        study = optuna.create_study(
            storage=storage, sampler=sampler, study_name=f"{name}#{generation}", load_if_exists=True
        )
        if "done" not in study.user_attrs and not finished(study):
            return study
        generation += 1


def digest(parts: Mapping[str, Any]) -> str:
    """A name for what a study is about, the same in every process: 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def owner() -> str:
    """This process, so that another can see whether it still lives."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def abandoned(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Running trials whose process is gone."""
    now = datetime.datetime.now()
    out = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        gone = ended(str(trial.user_attrs.get("owner", "")))
        if gone is None:
            age = (now - trial.datetime_start).total_seconds() if trial.datetime_start else STALE_SECONDS + 1
            gone = age > STALE_SECONDS
        if gone:
            out.append(trial)
    return out


def ended(name: str) -> bool | None:
    """Is the process that `owner` named gone? None where it ran on another host."""
    host, _, rest = name.partition(":")
    pid, _, started = rest.partition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return None
    return _started(int(pid)) != started


def left_behind(storage: BaseStorage, study: optuna.Study, prefix: str) -> tuple[dict[str, Any], int] | None:
    """What the last study before this one was about, and how many results it holds, if it was never finished.

    prefix: what the names of studies of one problem begin with. Another version or space makes another study; what
    is not gone on with should at least be said.
    """
    mine = storage.get_study_id_from_name(study.study_name)
    ids = {storage.get_study_id_from_name(s.study_name): s for s in storage.get_all_studies()}
    before = [n for n, s in ids.items() if n < mine and s.study_name.startswith(prefix)]
    if not before or "done" in ids[max(before)].user_attrs:
        return None
    count = storage.get_n_trials(max(before), state=(TrialState.COMPLETE,))
    return (dict(ids[max(before)].user_attrs.get("about", {})), count) if count else None


def _started(pid: int) -> str:
    """When the process started, in the kernel's ticks; empty if there is none. Numbers are reused, start times not."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return "alive"
    return ""


def _cut_torn_line(path: Path) -> None:
    """Drop the end of the file after its last whole line, and a last line that is no JSON."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        try:
            json.loads(data[start:end])
            break
        except ValueError:
            end = start
    if end != len(data):
        with open(path, "r+b") as file:
            file.truncate(end)
