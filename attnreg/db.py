"""Work on tuning databases: load, compare, merge, check, promote, prune and export; nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from attnreg import registry
from attnreg.backend import error_text
from attnreg.errors import PluginError, RecordError
from attnreg.evidence import combine
from attnreg.hardware import Hardware
from attnreg.records import Gate, Record
from attnreg.records_json import line
from attnreg.registry import reasons_of, space_of
from attnreg.store_files import Broken, file_of, files, read, rewrite

__all__ = [
    "Difference",
    "Merged",
    "OtherThreads",
    "Removed",
    "check",
    "diff",
    "export",
    "load",
    "merge",
    "promote",
    "prune",
    "stale",
]


@dataclass(frozen=True)
class Difference:
    """One problem in two databases. kind: "only left", "only right", "choice" (another winner), "evidence"."""

    kind: str
    left: Record | None
    right: Record | None


@dataclass(frozen=True)
class Merged:
    """What a merge did. added: of an identity that was not there. combined: (before, other, after). same: known."""

    added: tuple[Record, ...] = ()
    combined: tuple[tuple[Record, Record, Record], ...] = ()
    same: int = 0
    broken: tuple[Broken, ...] = ()


@dataclass(frozen=True)
class Removed:
    """A record that prune takes out, and why."""

    record: Record
    why: str


@dataclass(frozen=True)
class OtherThreads(Broken):
    """A record with nothing wrong but that this process has other threads than it was measured with."""


def load(path: str | Path) -> tuple[list[Record], list[Broken]]:
    """The records of a database file, of a machine class's folder, or of a whole database.

    Raises RecordError if there is no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise RecordError(f"{path}: there is no such file or folder")
    paths = [path] if path.is_file() else [f for folder in (path, *_folders(path)) for f in files(folder)]
    contents = [read(p) for p in paths]
    return [r for c in contents for r in c.records], [b for c in contents for b in c.named()]


def stale(record: Record, hardware: Hardware) -> tuple[str, ...]:
    """What differs between the record's circumstances and today's on this hardware; empty if the record is fresh.

    Today's are the versions that are loaded, and on a CPU the threads that torch has in this process.
    """
    threads = torch.get_num_threads() if hardware.kind == "cpu" else None
    return record.stale(hardware, _versions(record, hardware), threads)


def _outdated(record: Record, hardware: Hardware) -> tuple[str, ...]:
    """What makes the record stale in any process here: all but the threads, which are of the one that asks."""
    return record.stale(hardware, _versions(record, hardware))


def _versions(record: Record, hardware: Hardware) -> dict[str, str]:
    return registry.current().versions(record.problem.bucket(), hardware)


def diff(left: Iterable[Record], right: Iterable[Record]) -> list[Difference]:
    """What differs between two sets of records, by identity, sorted by problem."""
    a, b = ({r.identity: r for r in side} for side in (left, right))
    out = []
    for identity in sorted({*a, *b}):
        one, other = a.get(identity), b.get(identity)
        if one is None:
            out.append(Difference("only right", None, other))
        elif other is None:
            out.append(Difference("only left", one, None))
        elif one.choice != other.choice:
            out.append(Difference("choice", one, other))
        elif line(one) != line(other):
            out.append(Difference("evidence", one, other))
    return out


def merge(sources: Sequence[str | Path], into: str | Path) -> Merged:
    """Add every record of the sources to the database folder `into`.

    Records of one identity are combined: their evidence is kept and its intervals decide. A source's broken lines
    are named and left where they are. Raises RecordError if `into` cannot be written.
    """
    loaded = [load(source) for source in sources]
    made = _put([r for records, _ in loaded for r in records], Path(into))
    return replace(made, broken=tuple(b for _, broken in loaded for b in broken))


def _put(incoming: Sequence[Record], root: Path) -> Merged:
    added: list[Record] = []
    combined: list[tuple[Record, Record, Record]] = []
    same = 0
    by_path: dict[Path, list[Record]] = {}
    for record in incoming:
        by_path.setdefault(file_of(root, record), []).append(record)
    for path, records in sorted(by_path.items()):
        for change in _combine_into(root, path, records):
            before, other, after = change
            if before is None:
                added.append(after)
            elif line(before) == line(after):
                same += 1
            else:
                combined.append((before, other, after))
    return Merged(tuple(added), tuple(combined), same)


def _combine_into(root: Path, path: Path, records: Sequence[Record]) -> list[tuple[Record | None, Record, Record]]:
    """Combine records into one file; (what stood there, the record, what stands there now) for each."""
    out: list[tuple[Record | None, Record, Record]] = []

    def change(now: Sequence[Record]) -> list[Record]:
        kept: dict[str, Record] = {}
        for r in now:  # two lines of one identity, as a merge of branches leaves them, become one
            kept[r.identity] = combine([kept[r.identity], r]) if r.identity in kept else r
        for record in records:
            before = kept.get(record.identity)
            kept[record.identity] = after = record if before is None else combine([before, record])
            out.append((before, record, after))
        return list(kept.values())

    rewrite(root, path, change)
    return out


def check(path: str | Path, hardware: Hardware | None = None) -> list[Broken]:
    """Everything wrong with a database: broken lines, misplaced or doubled records, records that would not be used.

    A record that only its number of threads keeps from use is named too, as OtherThreads, and is sound.

    hardware: what to judge staleness and spaces on; records of other machine classes are only read.
    """
    records, out = load(path)
    root = Path(path)
    seen: dict[str, Record] = {}
    for record in records:
        where = f"{root}: {record.backend} for {record.problem}"
        if record.identity in seen:
            out.append(Broken(where, "another line has the same identity; `attnreg db merge` combines them"))
        seen[record.identity] = record
        if hardware is not None and record.slug == hardware.slug:
            wrong = _unusable(record, hardware)
            kind = Broken if wrong else OtherThreads
            out += [Broken(where, why) for why in wrong]
            out += [kind(where, why) for why in _of_other_threads(record, hardware)]
    for file in [p for folder in _folders(root) for p in files(folder)]:
        for record in read(file).records:
            if file.parent.name != record.slug:
                out.append(Broken(str(file), f"holds a record of {record.slug}: it stands in the wrong folder"))
    return out


def promote(
    source: str | Path, into: str | Path, hardware: Hardware, *, force: bool = False
) -> tuple[Merged, list[Removed]]:
    """Merge the records of this machine class that are fit to ship into another database, such as the shipped one.

    Fit is: measured, fresh, quiet, past the gate, and inside its backend's space now. Returns the merge and what was
    held back; force holds nothing back but other machine classes.
    """
    records, broken = load(source)
    fit, held = [], []
    for record in records:
        why = _unfit(record, hardware) if not force or record.slug != hardware.slug else []
        if why:
            held.append(Removed(record, "; ".join(why)))
        else:
            fit.append(record)
    return replace(_put(fit, Path(into)), broken=tuple(broken)), held


def prune(
    path: str | Path, hardware: Hardware, *, which: Callable[[Record], str] | None = None, apply: bool = False
) -> list[Removed]:
    """Records of this machine class that no longer hold; taken out if `apply`, else only listed.

    path: a database, a machine class's folder in one, or a file of such. which: says why a record should go, "" to keep
    it; stale ones unless given, but for those whose threads alone differ: they hold in a process with as many.
    Raises RecordError where there is no such file or folder, or it cannot be written.
    """
    path = Path(path)
    if not path.exists():
        raise RecordError(f"{path}: there is no such file or folder")

    def judge(record: Record) -> str:
        if record.slug != hardware.slug:
            return ""
        if which is not None:
            return which(record)
        return "; ".join(_outdated(record, hardware))

    out: list[Removed] = []
    folder = path if path.name == hardware.slug else path / hardware.slug
    for file in [path] if path.is_file() else files(folder):
        out += [Removed(r, why) for r in read(file).records if (why := judge(r))]
        if apply:
            # Writers of a database wait for one another at its root.
            root = file.parent.parent if file.parent.name == hardware.slug else file.parent
            rewrite(root, file, lambda now: [r for r in now if not judge(r)])
    return out


def export(records: Iterable[Record], path: str | Path) -> int:
    """Write records as one file of JSON lines, sorted, for `merge` elsewhere; returns how many."""
    lines = sorted({line(record) for record in records})
    Path(path).write_text("".join(text + "\n" for text in lines), encoding="utf-8")
    return len(lines)


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir()) if root.is_dir() else []


def _unusable(record: Record, hardware: Hardware) -> list[str]:
    """Why no process here would use it."""
    out = [f"stale: {what}" for what in _outdated(record, hardware)]
    if not record.passed:
        out.append("no gate" if record.gate is None else f"not past the gate: {_failed(record.gate)}")
    entry = registry.current().entries.get(record.backend)
    if entry is None:
        return [*out, f"backend {record.backend} is not loaded"]
    bucket = record.problem.bucket()  # what a call would ask about
    out += [f"{record.backend} refuses: {reason}" for reason in reasons_of(entry.backend, bucket, hardware)]
    try:
        space = space_of(entry.backend, bucket, hardware)
        out += [f"configuration: {reason}" for reason in space.reasons(record.config)]
    except PluginError as error:
        out.append(f"{record.backend}: {error}")
    except (Exception, SystemExit) as error:
        out.append(f"{record.backend}: its space() holds a constraint that raised {error_text(error)}")
    return out


def _of_other_threads(record: Record, hardware: Hardware) -> list[str]:
    """The part of its staleness that lies in this process alone."""
    lasting = _outdated(record, hardware)
    return [f"stale: {what}" for what in stale(record, hardware) if what not in lasting]


def _failed(gate: Gate) -> str:
    """The errors that are above their bounds."""
    pairs = {"error": (gate.error, gate.bound), "gradients' error": (gate.grad_error, gate.grad_bound)}
    return ", ".join(f"{name} {e:.3g}, bound {most:.3g}" for name, (e, most) in pairs.items() if not e <= most)


def _unfit(record: Record, hardware: Hardware) -> list[str]:
    if record.slug != hardware.slug:
        return [f"measured on {record.slug}, and this is {hardware.slug}"]
    out = _unusable(record, hardware) + _of_other_threads(record, hardware)
    if record.origin != "measured":
        out.append("not measured")
    if record.policy.noisy:
        out.append("measured on a disturbed machine")
    return out
