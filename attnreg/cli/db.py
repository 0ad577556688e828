"""`attnreg db`: look at tuning records, compare, merge, check, promote, prune and export them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from attnreg import db, store
from attnreg.cli import Commands, app, console, put, put_json, say
from attnreg.cli.options import output_file
from attnreg.errors import RecordError
from attnreg.hardware import detect
from attnreg.match import Match
from attnreg.measure import Candidate
from attnreg.records import Record
from attnreg.records_json import to_json
from attnreg.sheet import Sheet
from attnreg.store_files import Broken
from attnreg.tuning.report import seconds_text

commands = Commands(
    no_args_is_help=True, rich_markup_mode=None, help="Look at tuning records, compare, merge, check and ship them."
)
app.add_typer(commands, name="db")

AsJson = Annotated[bool, typer.Option("--json", help="Plain data for programs.")]
Where = Annotated[Path | None, typer.Option("--path", help="A database folder or file; all layers unless given.")]
Text = Annotated[str, typer.Argument(help="Only records whose text holds this.")]


@commands.command("ls")
def ls(text: Text = "", path: Where = None, as_json: AsJson = False) -> None:
    """List records: problem, winner, time, by how much it won, and whether it is fresh here."""
    rows, broken = _records(path, text)
    if as_json:
        for layer, record in rows:
            put_json({"layer": layer, "stale": list(_stale(record)), **to_json(record)})
        _say_broken(broken, as_json)
        return
    sheet = Sheet("layer", "machine", "problem", "winner", "time", "runner-up", "date", "state")
    for layer, record in rows:
        rival = record.runner_up
        won = f"{rival.backend} {rival.ratio[1]:.2f}x" if rival and rival.ratio else ""
        time = seconds_text(record.seconds) if record.seconds else ""
        cells = (layer, record.slug, str(record.problem), _choice(record), time, won, record.date[:10], _state(record))
        sheet.add(*cells)
    sheet.print(console)
    _say_broken(broken)


@commands.command("show")
def show(text: Text = "", path: Where = None, as_json: AsJson = False) -> None:
    """Show whole records: the sample, the interval, the runner-up, what was refused, what would make them stale."""
    rows, broken = _records(path, text)
    for layer, record in rows:
        if as_json:
            put_json(to_json(record), sort_keys=True)
            continue
        rung = "static" if record.origin == "static" else layer
        match = Match(rung, record.backend, dict(record.config), record, 0.0, _stale(record), layer)  # type: ignore[arg-type]  # layers are rungs
        say((str(record.problem), "bold"))
        for line in (f"chosen    {_choice(record)}", f"why       {match.describe()}", *match.evidence()):
            say(line, hang=10)
        put("")
    _say_broken(broken, as_json)


@commands.command("diff")
def diff(left: Path, right: Path, as_json: AsJson = False) -> None:
    """Compare two databases, folders or files; exit status 1 if they differ."""
    (a, broken_a), (b, broken_b) = db.load(left), db.load(right)
    found = db.diff(a, b)
    sheet = Sheet("what", "problem", str(left), str(right))
    for d in found:
        record = d.left or d.right
        assert record is not None
        sides = [_side(x) for x in (d.left, d.right)]
        if as_json:
            put_json({"what": d.kind, "problem": str(record.problem), "left": sides[0], "right": sides[1]})
        sheet.add(d.kind, str(record.problem), *sides)
    if not as_json:
        sheet.print(console) if found else say("no difference")
    _say_broken([*broken_a, *broken_b], as_json)
    if found:
        raise typer.Exit(1)


@commands.command("merge")
def merge(
    sources: list[Path],
    into: Annotated[Path | None, typer.Option(help="The database folder; the user's own unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add the sources' records to a database; conflicting ones keep both samples, and their intervals decide."""
    _say_merged(db.merge(sources, into if into is not None else _user()), as_json)


@commands.command("check")
def check(path: Annotated[Path | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Name what is broken, misplaced, doubled or would not be used here; exit status 1 if anything is.

    Records of other thread counts are told, and are no fault: a process with as many threads uses them.
    """
    here = store.current()
    roots = [path] if path is not None else [p for p in (here.user, here.shipped) if p is not None and p.exists()]
    found = [b for root in roots for b in db.check(root, detect())]
    if path is None:
        found += [b for b in here.broken() if b.where.startswith("plugin ")]
    wrong = [b for b in found if not isinstance(b, db.OtherThreads)]
    if as_json:
        rows = [{"where": b.where, "reason": b.reason, "wrong": not isinstance(b, db.OtherThreads)} for b in found]
        put_json(rows, indent=2)
    else:
        if not wrong:
            say(f"nothing wrong in {', '.join(map(str, roots)) or 'any database: there is none yet'}")
        _say_broken(wrong)
        for reason, count in Counter(b.reason for b in found if isinstance(b, db.OtherThreads)).items():
            say(f"{count} records wait for a process with as many threads: {reason.removeprefix('stale: ')}")
    if wrong:
        raise typer.Exit(1)


@commands.command("promote")
def promote(
    into: Annotated[Path | None, typer.Option(help="The database to ship; attnreg's own unless given.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="The user's own unless given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Stale and noisy records too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy this machine's records into another database, if they are measured, fresh, quiet and past the gate."""
    made, held = db.promote(source or _user(), into or _shipped(), detect(), force=force)
    _say_merged(made, as_json, [f"held back {_choice(h.record)} for {h.record.problem}: {h.why}" for h in held])


@commands.command("prune")
def prune(
    path: Annotated[Path | None, typer.Option("--path", help="The user's own database unless given.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Take them out; else they are only listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """List this machine's stale records and why they are stale; with --apply, take them out."""
    gone = db.prune(path or _user(), detect(), apply=apply)
    if as_json:
        put_json([{"why": g.why, **to_json(g.record)} for g in gone])
        return
    for g in gone:
        what = "removed" if apply else "stale"
        say(f"{what}: {_choice(g.record)} for {g.record.problem}: {g.why}")
    say(f"{len(gone)} stale records{'' if apply or not gone else '; --apply takes them out'}")


@commands.command("export")
def export(
    file: Annotated[Path, typer.Argument(callback=output_file)],
    text: Annotated[str, typer.Option("--only", help="Only records whose text holds this.")] = "",
    path: Where = None,
    as_json: AsJson = False,
) -> None:
    """Write records to one file of JSON lines, to be merged elsewhere."""
    rows, broken = _records(path, text)
    count = db.export([record for _, record in rows], file)
    if as_json:
        put_json(
            {"records": count, "file": str(file), "broken": [{"where": b.where, "reason": b.reason} for b in broken]}
        )
        return
    say(f"{count} records written to {file}")
    _say_broken(broken)


def _records(path: Path | None, text: str) -> tuple[list[tuple[str, Record]], list[Broken]]:
    if path is not None:
        records, broken = db.load(path)
        rows: list[tuple[str, Record]] = [(str(path), record) for record in records]
    else:
        here = store.current()
        rows, broken = [(layer, record) for layer, record in here.records()], here.broken()
    return [(layer, r) for layer, r in rows if text in f"{r.slug} {r.problem} {_choice(r)}"], broken


def _user() -> Path:
    user = store.current().user
    if user is None:
        raise RecordError("there is no user database in this store; name one")
    return user


def _shipped() -> Path:
    shipped = store.current().shipped
    if shipped is None:
        raise RecordError("there is no shipped database in this store; name one with --into")
    return shipped


def _stale(record: Record) -> tuple[str, ...]:
    here = detect()
    if record.slug != here.slug:
        return ()
    return db.stale(record, here)


def _state(record: Record) -> str:
    if record.slug != detect().slug:
        return "another machine"
    stale = _stale(record)
    marks = [f"stale: {', '.join(stale)}"] if stale else ["fresh"]
    return "; ".join(marks + (["noisy"] if record.policy.noisy else []) + (["tie"] if record.ties else []))


def _choice(record: Record) -> str:
    return str(Candidate(record.backend, record.config))


def _side(record: Record | None) -> str:
    return "-" if record is None else f"{_choice(record)} {seconds_text(record.seconds or 0.0)}"


def _say_merged(made: db.Merged, as_json: bool, more: list[str] | None = None) -> None:
    if as_json:
        data = {
            "added": [to_json(r) for r in made.added],
            "combined": [{"before": to_json(b), "other": to_json(o), "after": to_json(a)} for b, o, a in made.combined],
            "same": made.same,
            "broken": [{"where": b.where, "reason": b.reason} for b in made.broken],
            "held": more or [],
        }
        put_json(data)
        return
    for record in made.added:
        say(f"added    {_choice(record)} for {record.problem}")
    for before, other, after in made.combined:
        tie = f", a tie with {', '.join(t.backend for t in after.ties)}" if after.ties else ""
        say(f"combined {_choice(before)} and {_choice(other)}: {_choice(after)} for {after.problem}{tie}")
    for line in more or []:
        say((line, "yellow"))
    say(f"{len(made.added)} added, {len(made.combined)} combined, {made.same} known already")
    _say_broken(made.broken)


def _say_broken(broken: list[Broken] | tuple[Broken, ...], as_json: bool = False) -> None:
    """What could not be read; on stderr beside JSON."""
    for b in broken:
        text = f"set aside {b.where}: {b.reason}"
        typer.echo(text, err=True) if as_json else say((text, "yellow"))
