"""The study of one question: a problem on a machine class, under versions, spaces and policy; its name, and its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage

from attnreg import folders, store
from attnreg.measure import Plan
from attnreg.records import software
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.search import make_sampler
from attnreg.tuning.storage import digest, left_behind, open_storage, open_study

__all__ = ["note_record", "study_of"]

SCHEMA = 2
"""Of what a study holds; trials of another one mean something else and are not gone on with."""


def study_of(
    plan: Plan, slug: str, versions: Mapping[str, str], space: JointSpace, where: str | Path | None, seed: int
) -> tuple[optuna.Study, tuple[str, ...]]:
    """The unfinished study of exactly this question or a new one, and what should be said of an older question's.

    slug: of the machine class. versions: of the backends. where: a journal or a URL; None for the problem's own
    journal in the user's data folder. Raises TuneError if the storage cannot be opened.
    """
    problem = digest({"problem": plan.problem.to_json()})
    about = {
        "problem": plan.problem.to_json(),
        "hardware": slug,
        "software": {**software(), "backends": dict(versions)},
        "spaces": space.fingerprint(),
        "policy": {name: getattr(plan, name) for name in ("cache", "threads", "time_limit", "memory_limit")},
        "schema": SCHEMA,
    }
    storage = open_storage(where) if where is not None else _own_storage(slug, f"{problem}.journal")
    of_problem = f"attnreg-{problem}-"
    study = open_study(storage, of_problem + digest(about), make_sampler(seed), _recorded(plan))
    if "about" in study.user_attrs:
        return study, ()
    study.set_user_attr("about", {**about, "text": str(plan.problem)})
    older = left_behind(storage, study, of_problem)
    if older is None:
        return study, ()
    differ = ", ".join(_differences(older[0], about)) or "what it was about"
    return study, (f"an unfinished search with {older[1]} results is not gone on with: {differ} changed since",)


def _own_storage(slug: str, name: str) -> BaseStorage:
    """A journal in the user's data folder; in memory, so that nothing is resumed, where there is no such folder."""
    folder = folders.chosen("data")
    folders.tell("data", folder)
    return open_storage(folder / "studies" / slug / name) if folder is not None else InMemoryStorage()


def note_record(study: optuna.Study, date: str) -> None:
    """To be called before the record of that date is written: a tuner killed right after has finished its study."""
    study.set_user_attr("made", date)


def _recorded(plan: Plan) -> Callable[[optuna.Study], bool]:
    """Is the study's record in the user's database, though its tuner was killed before it could call the study done?"""

    def recorded(study: optuna.Study) -> bool:
        date = study.user_attrs.get("made")
        mine = (r for _, r in store.current().records("user") if r.problem == plan.problem) if date else ()
        return any(date in (r.date, *(e["date"] for e in r.evidence)) for r in mine)

    return recorded


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """The names of what differs, in dots."""
    out = []
    for name in sorted({*before, *now} - {"text"}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += _differences(old, new, f"{path}{name}.")
        elif old != new:
            out.append(path + name)
    return out
