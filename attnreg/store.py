"""Store: tuning records in layers, user above plugin above shipped, and the matches they have for a problem."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal

import torch

from attnreg import folders
from attnreg.errors import RecordError, SpecError
from attnreg.evidence import combine
from attnreg.hardware import Hardware
from attnreg.match import Match, Rung, distance
from attnreg.problem import Problem
from attnreg.records import Record, problem_class
from attnreg.records_json import from_json
from attnreg.store_files import Broken, Contents, file_of, files, read, rewrite

__all__ = ["Match", "Store", "current", "offer", "on_change", "shipped_dir", "using"]

_LAYERS: tuple[Rung, ...] = ("user", "plugin", "shipped")
MAX_DISTANCE = 4.0
"""Octaves of batch and length, in all, beyond which a neighbour says nothing."""
MAX_MATCHES = 64
"""The nearest so many records are looked at: a class of problems may have hundreds."""


@dataclass
class _Cached:
    signature: tuple[Any, ...]
    contents: Contents


@dataclass
class Store:
    """Records of two folders and of plugins. `find` looks them up; `add` writes to the user's folder.

    user, shipped: `<folder>/<hardware slug>/*.json`; None for none. plugins: gives (plugin, record as plain
    data), asked at each look. also: more folders of the user's, which are only read. Reading is lazy and follows
    the files' changes; what cannot be read is in `broken`.
    """

    user: Path | None = None
    shipped: Path | None = None
    plugins: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]] | None = None
    also: tuple[Path, ...] = ()
    _cache: dict[Path, _Cached] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _from_plugins: tuple[list[tuple[str, Mapping[str, Any]]], Contents] | None = field(default=None, repr=False)
    _index: tuple[tuple[Any, ...], dict[str, list[tuple[Rung, Record]]]] | None = field(default=None, repr=False)

    def find(
        self,
        problem: Problem,
        hardware: Hardware,
        versions: Mapping[str, str],
        *,
        cache: Literal["warm", "cold"] = "warm",
    ) -> list[Match]:
        """The records that speak for the problem, best first; never raises for what a database holds.

        versions: backend name -> version, as loaded. Order: fresh before stale, exact before nearest, then user,
        plugin, shipped, then who compared more of the loaded backends, then the sizes nearest to the problem's;
        static records last. A neighbour agrees in everything but batch, lengths and pages.
        """
        try:
            wanted = problem_class(problem)
        except SpecError:  # a custom mask has no key
            return []
        threads = torch.get_num_threads() if hardware.kind == "cpu" else None
        slugs = (hardware.slug, hardware.arch.replace("_", "-").lower())
        bucket = problem.bucket()
        near = [(distance(bucket, r.problem.bucket()), layer, r) for layer, r in self._indexed(slugs).get(wanted, ())]
        near = [item for item in near if item[2].policy.cache == cache and item[0] <= MAX_DISTANCE]
        near.sort(key=lambda item: item[0])
        ranked = []
        for away, layer, record in near[:MAX_MATCHES]:
            stale = record.stale(hardware, versions, threads)
            if record.origin == "static":  # made for the architecture: only its compiler's input can age
                stale = tuple(what for what in stale if what.startswith("version of"))
            rung: Rung = "static" if record.origin == "static" else layer if away == 0 else "nearest"
            match = Match(rung, record.backend, dict(record.config), record, away, stale, layer)
            within = distance(problem, record.problem)
            compared = len(set(versions) & set(record.software.get("backends", ())))
            order = (rung == "static", bool(stale), away > 0, away, _LAYERS.index(layer), -compared, within)
            ranked.append((order, record.date, match))
        ranked.sort(key=lambda item: item[1], reverse=True)
        ranked.sort(key=lambda item: item[0])
        return [match for _, _, match in ranked]

    def add(self, record: Record) -> Record:
        """Keep a record in the user's folder, combined with what is there of its identity; returns the result.

        Raises RecordError where there is no user folder or it cannot be written.
        """
        if self.user is None:
            raise RecordError("there is no folder to keep records in; set ATTNREG_DATA_DIR to one that can be written")
        kept: list[Record] = [record]

        def change(now: Iterable[Record]) -> list[Record]:
            same = [r for r in now if r.identity == record.identity]
            kept[0] = combine([*same, record])
            return [*(r for r in now if r.identity != record.identity), kept[0]]

        rewrite(self.user, file_of(self.user, record), change)
        if self.also:
            folders.tell("data", self.user.parent)
        _changed()
        return kept[0]

    def records(self, layer: Rung | None = None) -> Iterator[tuple[Rung, Record]]:
        """Every record of one layer, or of all."""
        for name in _LAYERS if layer is None else (layer,):
            for contents in self._contents(name, None):
                for record in contents.records:
                    yield name, record

    def broken(self) -> list[Broken]:
        """What was set aside in any layer, and why: for `attnreg doctor` and `attnreg db check`."""
        return [b for layer in _LAYERS for contents in self._contents(layer, None) for b in contents.named()]

    def _contents(self, layer: Rung, slugs: Iterable[str] | None) -> list[Contents]:
        if layer == "plugin":
            return [self._plugin_records()]
        roots = self._of_user() if layer == "user" else [self.shipped] if self.shipped is not None else []
        return [self._read(path) for root in roots for folder in _folders(root, slugs) for path in files(folder)]

    def _of_user(self) -> list[Path]:
        return [*([self.user] if self.user is not None else []), *self.also]

    def _read(self, path: Path) -> Contents:
        signature = _signature(path)
        with self._lock:
            cached = self._cache.get(path)
            if cached is None or cached.signature != signature:
                cached = self._cache[path] = _Cached(signature, read(path))
            return cached.contents

    def _plugin_records(self) -> Contents:
        """What the plugins offer, read anew only when they offer something else."""
        offered = list(self.plugins()) if self.plugins is not None else []
        with self._lock:
            if self._from_plugins is None or self._from_plugins[0] != offered:
                self._from_plugins = (offered, _checked(offered))
            return self._from_plugins[1]

    def _indexed(self, slugs: tuple[str, ...]) -> dict[str, list[tuple[Rung, Record]]]:
        """Records of a machine class by problem class, rebuilt when a file changed."""
        roots = [*self._of_user(), *([self.shipped] if self.shipped is not None else [])]
        paths = [path for root in roots for folder in _folders(root, slugs) for path in files(folder)]
        state = (slugs, self._plugin_records(), *((path, _signature(path)) for path in paths))
        with self._lock:
            if self._index is None or self._index[0] != state:
                index: dict[str, list[tuple[Rung, Record]]] = {}
                for layer in _LAYERS:
                    for contents in self._contents(layer, slugs):
                        for record in contents.records:
                            if record.slug in slugs:
                                index.setdefault(problem_class(record.problem), []).append((layer, record))
                self._index = (state, index)
            return self._index[1]


def shipped_dir() -> Path:
    """The records that come with attnreg: inside the installed package, or beside it in a checkout."""
    inside = Path(str(package_files("attnreg"))) / "tuning_db"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "tuning_db"


_current: Store | None = None
_guard = threading.RLock()
_listeners: list[Callable[[], None]] = []
_plugin_source: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]] | None = None


def current() -> Store:
    """The store in force: the user's folder, the plugins' records and the shipped ones."""
    global _current
    if _current is None:
        with _guard:
            if _current is None:
                _current = _of_this_user()
    return _current


def _of_this_user() -> Store:
    """Records go to the folder that can be written; those of the folder that is named are read even where it cannot."""
    written = folders.chosen("data")
    also: tuple[Path, ...] = ()
    try:
        named = folders.named("data")
        if named != written:
            also = (named / "tuning_db",)
            os.scandir(named).close()
    except OSError:  # neither to write nor to read
        folders.tell("data", written)
    return Store(written / "tuning_db" if written is not None else None, shipped_dir(), _plugin_records, also)


def _plugin_records() -> Iterable[tuple[str, Mapping[str, Any]]]:
    return _plugin_source() if _plugin_source is not None else ()


def offer(source: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]]) -> None:
    """Say where plugin records come from, (plugin, plain data) each: the store itself knows no registry."""
    global _plugin_source
    _plugin_source = source
    _install(None)


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` when records were added or another store comes into force."""
    _listeners.append(listener)


@contextlib.contextmanager
def using(store: Store) -> Iterator[Store]:
    """Put another store in force, for tests and tools. Applies to the whole process."""
    before = _current
    _install(store)
    try:
        yield store
    finally:
        _install(before)


def _install(store: Store | None) -> None:
    global _current
    with _guard:
        _current = store
    _changed()


def _changed() -> None:
    for listener in _listeners:
        listener()


def _folders(root: Path, slugs: Iterable[str] | None) -> list[Path]:
    if slugs is not None:
        return [root / slug for slug in dict.fromkeys(slugs)]
    with contextlib.suppress(OSError):
        return sorted(path for path in root.iterdir() if path.is_dir())
    return []


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _checked(offered: Iterable[tuple[str, Mapping[str, Any]]]) -> Contents:
    records: list[Record] = []
    broken: list[tuple[Broken, str]] = []
    for number, (plugin, data) in enumerate(offered):
        try:
            records.append(from_json(data))
        except RecordError as error:
            broken.append((Broken(f"plugin {plugin}, record {number}", str(error)), ""))
    return Contents(tuple(records), (), tuple(broken))
