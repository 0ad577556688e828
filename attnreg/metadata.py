"""Metadata of the installed distributions, each read alone: what one has broken hides no other.

`importlib.metadata.entry_points()` parses every file of every distribution, and one that it cannot read ends it.
torch does that at its import, and pydantic at its first model, so this module also lets those two start.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, DistributionFinder, EntryPoint
from typing import Any

__all__ = ["Culprit", "Found", "culprits", "entry_points", "importing", "version"]

FILE = "entry_points.txt"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
NO_PLUGINS = "PYDANTIC_DISABLE_PLUGINS"


@dataclass(frozen=True)
class Culprit:
    """A distribution, or a place of sys.path, whose metadata cannot be read: its name, where it lies, and why."""

    name: str
    place: str
    reason: str


@dataclass(frozen=True)
class Found:
    """An entry point, and the distribution that has it."""

    name: str
    value: str
    distribution: str
    version: str
    point: EntryPoint


def entry_points(group: str) -> tuple[list[Found], list[Culprit]]:
    """The group's entry points, in the order of sys.path, and the distributions that may have some but cannot be read.

    A distribution is looked at only if its file names the group, so that what is broken elsewhere costs nothing.
    Of two distributions of one name the first counts, as for Python's own function.
    """
    out: list[Found] = []
    section = f"[{group}]"
    found, wrong = _distributions()
    for one in _first_of_each_name(found):
        try:
            text = one.read_text(FILE)
        except UnicodeDecodeError as error:
            if section.encode() in error.object:
                wrong.append(_culprit(one, error))
            continue
        except Exception as error:
            wrong.append(_culprit(one, error))
            continue
        if text is None or section not in text:
            continue
        try:
            points = [point for point in one.entry_points if point.group == group]
            if text.startswith("\ufeff"):  # Python passes over what stands before the first heading that it sees
                raise ValueError("it starts with a byte order mark")
        except Exception as error:
            wrong.append(_culprit(one, error))
            continue
        name, version = _name(one), _version(one)
        out += [Found(point.name, point.value, name, version, point) for point in points]
    return out, wrong


def culprits() -> list[Culprit]:
    """Every distribution whose entry points or name cannot be read, of any group: other tools stumble over them."""
    found, wrong = _distributions()
    for one in _first_of_each_name(found):
        try:
            _readable(one)
            list(one.entry_points)
        except Exception as error:
            wrong.append(_culprit(one, error))
            continue
        if _nameless(one):
            reason = "METADATA is missing, or cannot be read, or gives no name and version"
            wrong.append(Culprit(_name(one), _place(one), reason))
    return wrong


def version(name: str) -> str | None:
    """The version of an installed distribution; None if it is absent, "unknown" where its metadata does not say."""
    try:
        said = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception:
        return "unknown"
    return said if isinstance(said, str) and said else "unknown"  # Python's own gives None where METADATA is empty


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Let torch and pydantic be imported beside metadata that they cannot read.

    Both look for plugins of their own, by Python's function. Where that would fail, and only there, they are told
    meanwhile to look for none, and a warning names the culprit.
    """
    before = {name: os.environ.get(name) for name in (AUTOLOAD, NO_PLUGINS)}
    try:
        if not _python_can_read():
            os.environ.update({AUTOLOAD: "0", NO_PLUGINS: "__all__"})
            told = "; ".join(f"{c.name} ({c.place}): {c.reason}" for c in culprits()) or "Python names none"
            warnings.warn(
                f"attnreg: the metadata of installed distributions cannot be read, so torch and pydantic go without "
                f"plugins of their own: {told}",
                RuntimeWarning,
                stacklevel=3,
            )
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _python_can_read() -> bool:
    try:
        importlib.metadata.entry_points(group="torch.backends")
    except Exception:
        return False
    return True


def _distributions() -> tuple[list[Distribution], list[Culprit]]:
    """Every distribution that a finder gives; a finder that raises, or a place that breaks one, hides no other."""
    out: list[Distribution] = []
    wrong: list[Culprit] = []
    for finder in list(sys.meta_path):
        find = getattr(finder, "find_distributions", None)
        if find is None:
            continue
        try:
            out += find(DistributionFinder.Context())
        except Exception:  # one place by one, to find which
            for place in list(sys.path):
                try:
                    out += find(DistributionFinder.Context(path=[place]))
                except Exception as error:
                    wrong.append(Culprit(str(place), "sys.path", f"{type(finder).__name__} raised {_said(error)}"))
    return out, wrong


def _first_of_each_name(found: Iterable[Distribution]) -> list[Distribution]:
    out: dict[object, Distribution] = {}
    for one in found:
        name = _stem(one)[0] or _said_name(one)
        key = re.sub(r"[-_.]+", "_", name).lower() if name else id(one)
        out.setdefault(key, one)
    return list(out.values())


def _stem(one: Distribution) -> tuple[str, str]:
    """Name and version as the folder says them, such as `mine-1.0.dist-info`; empty where it says none."""
    base = os.path.basename(_place(one).rstrip("/\\"))
    stem, dot, kind = base.rpartition(".")
    if not dot or kind not in ("dist-info", "egg-info"):
        return "", ""
    name, _, rest = stem.partition("-")
    return name, rest.split("-")[0]


def _place(one: Distribution) -> str:
    """Where its metadata lie, as far as it tells."""
    try:
        return str(getattr(one, "_path", "") or one.locate_file(""))
    except Exception:
        return ""


def _said_name(one: Distribution) -> str:
    return _text(one, "Name")


def _name(one: Distribution) -> str:
    return _said_name(one) or _stem(one)[0] or "unknown"


def _version(one: Distribution) -> str:
    return _text(one, "Version") or _stem(one)[1] or "unknown"


def _text(one: Distribution, field: str) -> str:
    try:
        said: Any = one.metadata[field]
    except Exception:
        return ""
    return said if isinstance(said, str) else ""


def _nameless(one: Distribution) -> bool:
    return not (_said_name(one) and _text(one, "Version"))


def _readable(one: Distribution) -> None:
    """Raise what keeps the file from being read: Python's own function takes one that is forbidden for none."""
    path: Any = getattr(one, "_path", None)
    if path is not None and (path / FILE).exists():
        (path / FILE).read_bytes()


def _culprit(one: Distribution, error: Exception) -> Culprit:
    line = "" if isinstance(error, (UnicodeError, OSError)) else _bad_line(one)
    return Culprit(_name(one), _place(one), f"{FILE} cannot be read: {line or _said(error)}")


def _bad_line(one: Distribution) -> str:
    """The first line that is no heading, no comment and no `name = value`; Python's own error does not tell it."""
    try:
        lines = (one.read_text(FILE) or "").splitlines()
    except Exception:
        return ""
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith(("#", "[")) and "=" not in line:
            return f"line {number} is no `name = value`: {line!r}"
    return ""


def _said(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
