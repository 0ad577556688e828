"""Registry: load plugins one by one, validate what they give, keep what failed with its cause."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pluggy

from attnreg import hookspecs, metadata
from attnreg.backend import Backend, Finding, error_text, safe_repr, versions_for
from attnreg.derivatives import refusals
from attnreg.errors import PluginError, UnknownBackendError
from attnreg.hardware import Hardware
from attnreg.problem import Problem
from attnreg.space import SearchSpace

__all__ = ["Entry", "Failure", "Registry", "current", "on_change", "reasons_of", "space_of", "using"]

GROUP = "attnreg"
OWN = "attnreg"
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Entry:
    """A loaded backend and where it came from; name and version are read off it once, since a property may fail."""

    backend: Backend
    plugin: str
    origin: str
    name: str = field(init=False)
    version: str = field(init=False)

    def __post_init__(self) -> None:
        for attribute in ("name", "version"):
            object.__setattr__(self, attribute, getattr(self.backend, attribute, None))


@dataclass(frozen=True)
class Failure:
    """A plugin, or one thing that it gave, that was set aside: who, at which step, why, and the traceback."""

    plugin: str
    origin: str
    step: str
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Plugin:
    """A plugin that loaded: its module or object, called hook by hook in isolation."""

    name: str
    origin: str
    manager: pluggy.PluginManager


@dataclass(frozen=True)
class Registry:
    """What was loaded: backends by name, plugins, plugin records (raw), and failures. Frozen once built."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    plugins: tuple[Plugin, ...] = ()
    failures: tuple[Failure, ...] = ()
    blocked: tuple[str, ...] = ()
    records: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def get(self, name: str) -> Entry:
        """The backend of that name. Raises UnknownBackendError that tells what is loaded, blocked or failed."""
        if name in self.entries:
            return self.entries[name]
        text = f"no backend is named {name!r}; loaded: {', '.join(sorted(self.entries)) or 'none'}"
        if name in self.blocked:
            text += f"; {name!r} is blocked by ATTNREG_BLOCK"
        for failure in self.failures:
            text += f"; plugin {failure.plugin!r} was set aside at {failure.step}: {failure.reason}"
        raise UnknownBackendError(text)

    def versions(self, problem: Problem, hardware: Hardware) -> dict[str, str]:
        """Backend name -> version of its kernels for the problem, as loaded now."""
        return versions_for({name: entry.backend for name, entry in self.entries.items()}, problem, hardware)

    def findings(self, hardware: Hardware) -> list[tuple[str, Finding]]:
        """What each plugin's `attnreg_doctor` says; one that raises is itself a finding."""
        out: list[tuple[str, Finding]] = []
        for plugin in self.plugins:
            try:
                said = _flat(plugin.manager.hook.attnreg_doctor(hardware=hardware))
                out += [(plugin.name, _checked(found)) for found in said]
            except (Exception, SystemExit) as error:
                out.append((plugin.name, _complaint(error_text(error))))
        return out


def load(environ: Mapping[str, str] = os.environ) -> Registry:
    """Load every entry point of group `attnreg`, and the modules that ATTNREG_PLUGINS names.

    Our own plugins come first, so that no other can take their names; the rest is sorted, since entry-point
    order is the file system's. ATTNREG_BLOCK names plugins or backends to leave out.
    """
    blocked = tuple(filter(None, re.split(r"[,\s]+", environ.get("ATTNREG_BLOCK", ""))))
    build = _Builder(blocked)
    points, culprits = metadata.entry_points(GROUP)
    build.failures += [Failure(c.name, c.place, "metadata", c.reason) for c in culprits]
    for name, origin, loader in _sources(points, environ):
        if name not in blocked:
            build.add(name, origin, loader)
    return Registry(build.entries, tuple(build.plugins), tuple(build.failures), blocked, tuple(build.records))


def _sources(
    points: Iterable[metadata.Found], environ: Mapping[str, str]
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    seen = set()
    for point in sorted(points, key=lambda p: (p.distribution != OWN, p.name, p.distribution, p.version)):
        if (point.name, point.value) not in seen:  # an editable install can list itself twice
            seen.add((point.name, point.value))
            yield point.name, f"{point.distribution} {point.version}", functools.partial(_load, point)
    for module in filter(None, re.split(r"[,\s]+", environ.get("ATTNREG_PLUGINS", ""))):
        yield module, "ATTNREG_PLUGINS", functools.partial(importlib.import_module, module)


def _load(found: metadata.Found) -> object:
    if not found.point.pattern.match(found.value):  # Python's own error names neither
        raise PluginError(f"the entry point {found.name} = {found.value!r} is no module and no module:attribute")
    return found.point.load()


class _Builder:
    """Collects what loads and what fails, one plugin at a time."""

    def __init__(self, blocked: tuple[str, ...]) -> None:
        self.blocked = blocked
        self.entries: dict[str, Entry] = {}
        self.plugins: list[Plugin] = []
        self.failures: list[Failure] = []
        self.records: list[tuple[str, Mapping[str, Any]]] = []

    def add(self, name: str, origin: str, loader: Callable[[], object]) -> None:
        step = "import"
        try:
            plugin = loader()
            step = "registration"
            manager = _manager(name, plugin)
            step = "attnreg_backends"
            backends = _flat(manager.hook.attnreg_backends())
            step = "attnreg_records"
            records = _flat(manager.hook.attnreg_records())
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            self.failures.append(Failure(name, origin, step, error_text(error), traceback.format_exc()))
            return
        self.plugins.append(Plugin(name, origin, manager))
        for step, keep, items in (
            ("attnreg_backends", self._keep_backend, backends),
            ("attnreg_records", self._keep_record, records),
        ):
            for item in items:
                try:
                    keep(item, name, origin)
                except PluginError as error:
                    self.failures.append(Failure(name, origin, step, str(error)))
                except (Exception, SystemExit) as error:  # an attribute of the plugin's that raises
                    self.failures.append(Failure(name, origin, step, error_text(error), traceback.format_exc()))

    def _keep_backend(self, backend: Any, plugin: str, origin: str) -> None:
        entry = Entry(backend, plugin, origin)
        reason = self._wrong(entry)
        if reason:
            raise PluginError(reason)
        if entry.name not in self.blocked:
            self.entries[entry.name] = entry

    def _keep_record(self, record: object, plugin: str, origin: str) -> None:
        if not isinstance(record, Mapping):
            raise PluginError(f"expected records as plain dicts, got {safe_repr(record)}")
        self.records.append((plugin, record))

    def _wrong(self, entry: Entry) -> str:
        """Why this is no backend, or none under this name; empty if all is well."""
        backend, name, version = entry.backend, entry.name, entry.version
        if not isinstance(name, str) or not NAME.fullmatch(name):
            what = f"got {safe_repr(name)} from {safe_repr(backend)}"
            return f"a backend needs a lower-case name such as 'my_flash', {what}"
        if not isinstance(version, str) or not version:
            what = f"got {safe_repr(version)}"
            return f"backend {name!r} needs a version, a string that changes with its kernels, {what}"
        missing = [m for m in ("supports", "space", "prepare") if not callable(getattr(backend, m, None))]
        if missing or isinstance(backend, type):
            what = "is a class; give an instance" if isinstance(backend, type) else f"lacks {', '.join(missing)}"
            return f"backend {name!r} {what}"
        taken = self.entries.get(name)
        return f"the name {name!r} is taken by plugin {taken.plugin!r} ({taken.origin})" if taken else ""


def _manager(name: str, plugin: object) -> pluggy.PluginManager:
    """A manager of its own for each plugin, so that a broken one cannot disturb another."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name)
    manager.check_pending()  # finds hooks that do not exist, which are misspelt ones
    if not manager.get_hookcallers(plugin):
        raise PluginError(
            "implements no hook: mark functions named attnreg_backends, attnreg_records or attnreg_doctor "
            "with @attnreg.hookimpl"
        )
    return manager


def _flat(results: Iterable[Iterable[Any] | None]) -> list[Any]:
    return [item for result in results if result is not None for item in result]


def _checked(found: object) -> Finding:
    """The finding that a plugin gave, or a finding about it where its fields cannot be printed."""
    if not isinstance(found, Finding):
        return _complaint(f"must give attnreg.Finding, got {safe_repr(found)}")
    texts = (found.subject, found.detail, found.todo)
    if not isinstance(found.ok, bool) or not all(isinstance(text, str) for text in texts):
        return _complaint(f"expected Finding(subject: str, ok: bool, detail: str, todo: str), got {safe_repr(found)}")
    return found


def _complaint(detail: str) -> Finding:
    return Finding("attnreg_doctor", False, detail, "report it to the plugin")


def reasons_of(backend: Backend, problem: Problem, hardware: Hardware) -> list[str]:
    """What `supports` says; a backend that raises, or says junk, refuses by that."""
    try:
        said: Any = backend.supports(problem, hardware)
    except (Exception, SystemExit) as error:
        return [f"its supports() raised {error_text(error)}"]
    if not isinstance(said, (list, tuple)) or not all(isinstance(line, str) for line in said):
        return [f"its supports() must return a list of str, got {safe_repr(said)}"]
    return [*said, *refusals(backend, problem)]


def space_of(backend: Backend, problem: Problem, hardware: Hardware) -> SearchSpace:
    """What `space` gives. Raises PluginError that tells what it raised, or returned where that is no SearchSpace."""
    try:
        said: Any = backend.space(problem, hardware)
    except (Exception, SystemExit) as error:
        raise PluginError(f"its space() raised {error_text(error)}") from error
    if not isinstance(said, SearchSpace):
        raise PluginError(f"its space() must return a SearchSpace, got {safe_repr(said)}")
    return said


_lock = threading.RLock()
_registry: Registry | None = None
_listeners: list[Callable[[], None]] = []


def current() -> Registry:
    """The registry in force; plugins are loaded at the first call."""
    global _registry
    if _registry is None:
        with _lock:
            if _registry is None:
                _registry = load()
    return _registry


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` whenever another registry comes into force: what was derived from the old one is void."""
    _listeners.append(listener)


def _install(registry: Registry | None) -> None:
    global _registry
    with _lock:
        _registry = registry
    for listener in _listeners:
        listener()


@contextlib.contextmanager
def using(registry: Registry) -> Iterator[Registry]:
    """Put another registry in force, for tests and tools. Applies to the whole process, not to one thread."""
    before = _registry
    _install(registry)
    try:
        yield registry
    finally:
        _install(before)
