"""attnreg.db and `attnreg db`: compare, merge, check, promote, prune, export; nothing is dropped in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from records_for_tests import problem, record, rival
from typer.testing import CliRunner

from attnreg import db, registry, store
from attnreg.cli import app, commands
from attnreg.hardware import detect
from attnreg.records import Gate, Policy, Record, hardware_facts
from attnreg.records_json import line
from attnreg.store import Store
from attnreg.store_files import file_of

assert commands
HERE = detect()


def mine(**changes: Any) -> Record:
    """A record of the machine that the test runs on, by a backend and version that are loaded."""
    version = registry.current().get("eager").backend.version
    base = record(
        backend="eager",
        version=version,
        config={},
        hardware=hardware_facts(HERE),
        problem=problem(batch=1),
        runner_up=None,
        policy=Policy(threads=torch.get_num_threads()),
    )
    return replace(base, **changes)


def write(root: Path, *records: Record) -> Path:
    for one in records:
        Store(root, None).add(one)
    return root


def in_folder(root: Path) -> list[Record]:
    return db.load(root)[0]


def test_load_reads_files_folders_and_databases(tmp_path: Path) -> None:
    root = write(tmp_path / "db", record(), mine())
    assert len(in_folder(root)) == 2
    assert len(in_folder(root / record().slug)) == 1
    assert len(in_folder(file_of(root, record()))) == 1
    with pytest.raises(db.RecordError, match="no such file"):
        db.load(tmp_path / "missing")


def test_diff_says_what_differs() -> None:
    other = record(backend="sdpa", version="2.13", config={})
    later = record(date="2026-12-01T00:00:00Z")
    far = record(problem=problem(sq=64, skv=64))
    assert db.diff([record()], [record()]) == []
    assert [d.kind for d in db.diff([record()], [other])] == ["choice"]
    assert [d.kind for d in db.diff([record()], [later])] == ["evidence"]
    assert sorted(d.kind for d in db.diff([record()], [far])) == ["only left", "only right"]


def test_merge_adds_combines_and_loses_nothing(tmp_path: Path) -> None:
    one = record(runner_up=rival("sdpa", (1.0, 1.02, 1.04)))
    loser = replace(rival("cpu", (1.2, 1.25, 1.3)), config=one.config)
    two = record(backend="sdpa", version="2.13", config={}, date="2026-11-25T00:00:00Z", runner_up=loser)
    far = record(problem=problem(sq=64, skv=64))
    a, b = write(tmp_path / "a", one), write(tmp_path / "b", two, far)
    made = db.merge([b], a)
    assert len(made.added) == 1
    [(before, other, after)] = made.combined
    assert (before.backend, other.backend, after.backend) == ("cpu", "sdpa", "sdpa")
    assert [e["backend"] for e in after.evidence] == ["cpu"]
    again = db.merge([b, a], a)
    assert (again.added, again.combined, again.same) == ((), (), 4)
    into_b = db.merge([tmp_path / "a"], b)
    assert [line(r) for r in in_folder(a)] == [line(r) for r in in_folder(b)]
    assert into_b.broken == ()


def test_merge_of_branches_with_two_lines_of_one_identity(tmp_path: Path) -> None:
    root = write(tmp_path / "db", record())
    path = file_of(root, record())
    twin = record(date="2026-12-01T00:00:00Z")
    path.write_text(path.read_text().replace("\n]", ",\n" + line(twin) + "\n]"))
    assert any("same identity" in b.reason for b in db.check(root))
    db.merge([write(tmp_path / "other", record(problem=problem(sq=64, skv=64)))], root)
    kept = next(r for r in in_folder(root) if r.problem == problem())
    assert {kept.date, *(e["date"] for e in kept.evidence)} == {record().date, twin.date}


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    root = write(tmp_path / "db", mine())
    assert db.check(root, HERE) == []
    bad = [
        mine(problem=problem(batch=2), version="0"),
        mine(problem=problem(batch=4), config={"no": 1}),
        mine(problem=problem(batch=8), backend="gone"),
        mine(problem=problem(batch=16), gate=None),
        mine(problem=problem(batch=32), gate=Gate(5.0, 1e-6)),
        mine(problem=problem(batch=64), policy=Policy(threads=torch.get_num_threads() + 1)),
    ]
    write(root, *bad)
    path = file_of(root, mine())
    path.write_text(path.read_text() + "garbage\n")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "x.json").write_text(line(record()) + "\n")
    text = "\n".join(f"{b.where} {b.reason}" for b in db.check(root, HERE))
    for said in ("not JSON", "version of eager", "configuration: ", "backend gone is not loaded", "wrong folder"):
        assert said in text
    for said in ("B16", "B32", "B64"):
        assert said in text
    for said in (" no gate", "not past the gate: error 5, bound 1e-06", "stale: threads ("):
        assert said in text


class Raiser:
    """A backend of a plugin that fails at whatever it is asked."""

    name, version = "raiser", "1"

    def supports(self, problem: Any, hardware: Any) -> list[str]:
        raise SystemExit("no")

    def space(self, problem: Any, hardware: Any) -> Any:
        class SilentError(Exception):
            def __str__(self) -> str:
                raise ValueError

        raise SilentError

    def prepare(self, problem: Any, config: Any) -> Any: ...


def test_check_survives_a_plugin_that_fails_at_every_question(tmp_path: Path) -> None:
    root = write(tmp_path / "db", mine(backend="raiser", version="1"))
    with registry.using(registry.Registry({"raiser": registry.Entry(Raiser(), "a_plugin", "here")})):
        said = [b.reason for b in db.check(root, HERE)]
        assert said == [
            "raiser refuses: its supports() raised SystemExit: no",
            "raiser: its space() raised SilentError",
        ]
        assert CliRunner().invoke(app, ["db", "check", str(root)]).exit_code == 1


def test_other_thread_counts_are_told_and_are_no_fault(tmp_path: Path) -> None:
    """A database ships to machines with any number of threads: its records hold where there are as many."""
    here = torch.get_num_threads()
    other = [mine(problem=problem(batch=n), policy=Policy(threads=here + 1)) for n in (2, 4)]
    root = write(tmp_path / "db", mine(), *other)
    assert [type(b) for b in db.check(root, HERE)] == [db.OtherThreads] * 2
    done = CliRunner().invoke(app, ["db", "check", str(root)])
    assert done.exit_code == 0
    assert f"nothing wrong in {root}" in " ".join(done.output.split())
    assert f"2 records wait for a process with as many threads: threads ({here + 1} then, {here} now)" in done.output
    told = CliRunner().invoke(app, ["db", "check", str(root), "--json"])
    assert (told.exit_code, [b["wrong"] for b in json.loads(told.output)]) == (0, [False, False])
    write(root, mine(problem=problem(batch=8), policy=Policy(threads=here + 1), version="0"))
    both = [b for b in db.check(root, HERE) if "B8" in b.where]
    assert [b.reason.split()[1] for b in both] == ["version", "threads"]
    assert not any(isinstance(b, db.OtherThreads) for b in both)
    assert CliRunner().invoke(app, ["db", "check", str(root)]).exit_code == 1
    held = db.promote(root, tmp_path / "ship", HERE)[1]
    assert ["threads (" in h.why for h in held] == [True] * 3, "what ships was measured as this process runs"


def test_promote_ships_only_what_is_fit_and_names_the_rest(tmp_path: Path) -> None:
    sizes = iter(range(2, 100))
    noisy = mine(problem=problem(batch=next(sizes)), policy=Policy(threads=torch.get_num_threads(), noisy=True))
    stale = mine(problem=problem(batch=next(sizes)), version="0")
    ungated = mine(problem=problem(batch=next(sizes)), gate=None)
    source = write(tmp_path / "user", mine(), noisy, stale, ungated, record())
    made, held = db.promote(source, tmp_path / "ship", HERE)
    assert [r.problem for r in in_folder(tmp_path / "ship")] == [mine().problem] == [r.problem for r in made.added]
    why = {h.record.problem.batch if h.record.slug == HERE.slug else 0: h.why for h in held}
    assert "disturbed" in why[noisy.problem.batch]
    assert "stale" in why[stale.problem.batch]
    assert "no gate" in why[ungated.problem.batch]
    assert len(held) == 4 - (record().slug == HERE.slug)


def test_prune_lists_first_and_removes_only_when_told(tmp_path: Path) -> None:
    root = write(tmp_path / "db", mine(), mine(problem=problem(batch=3), version="0"))
    listed = db.prune(root, HERE)
    assert [r.why for r in listed] == [f"version of eager (0 then, {mine().version} now)"]
    assert len(in_folder(root)) == 2
    db.prune(root, HERE, apply=True)
    assert [r.problem for r in in_folder(root)] == [mine().problem]


def test_prune_keeps_records_of_other_thread_counts(tmp_path: Path) -> None:
    other = mine(policy=Policy(threads=torch.get_num_threads() + 1))
    assert [why for why in db.stale(other, HERE) if why.startswith("threads (")]
    root = write(tmp_path / "db", mine(), other, mine(problem=problem(batch=3), policy=other.policy, version="0"))
    gone = db.prune(root, HERE, apply=True)
    assert [r.record.version for r in gone] == ["0"]
    assert len(in_folder(root)) == 2


def test_prune_takes_a_database_a_folder_or_a_file(tmp_path: Path) -> None:
    stale = mine(problem=problem(batch=3), version="0")
    for part in ("", HERE.slug, f"{HERE.slug}/{file_of(tmp_path, stale).name}"):
        root = write(tmp_path / f"db{len(part)}", mine(), stale)
        assert len(db.prune(root / part, HERE)) == 1
        assert len(db.prune(root / part, HERE, apply=True)) == 1
        assert [r.problem for r in in_folder(root)] == [mine().problem]
    with pytest.raises(db.RecordError, match="no such file"):
        db.prune(tmp_path / "missing", HERE)


def test_the_command_line_end_to_end(tmp_path: Path) -> None:
    run = CliRunner()
    here = Store(tmp_path / "user", tmp_path / "ship")
    (tmp_path / "ship").mkdir()
    with store.using(here):
        assert "nothing wrong" in run.invoke(app, ["db", "check", str(write(tmp_path / "user", mine()))]).output
        assert "eager" in run.invoke(app, ["db", "ls"]).output
        rows = run.invoke(app, ["db", "ls", "--json"]).output.splitlines()
        assert json.loads(rows[0])["backend"] == "eager"
        shown = run.invoke(app, ["db", "show", "eager"]).output
        for said in ("median", "bound", "holds for", HERE.slug):
            assert said in shown
        assert "1 records written" in run.invoke(app, ["db", "export", str(tmp_path / "x.jsonl")]).output
        assert (
            "1 added"
            in run.invoke(app, ["db", "merge", str(tmp_path / "x.jsonl"), "--into", str(tmp_path / "y")]).output
        )
        same = run.invoke(app, ["db", "diff", str(tmp_path / "user"), str(tmp_path / "y")])
        assert (same.exit_code, same.output.strip()) == (0, "no difference")
        assert "1 added" in run.invoke(app, ["db", "promote"]).output
        assert "0 stale" in run.invoke(app, ["db", "prune"]).output
        write(tmp_path / "y", record(problem=problem(sq=64, skv=64)))
        assert run.invoke(app, ["db", "diff", str(tmp_path / "user"), str(tmp_path / "y")]).exit_code == 1
        path = file_of(tmp_path / "user", mine())
        path.write_text("junk\n" + path.read_text())
        broken = run.invoke(app, ["db", "check", "--json"])
        assert broken.exit_code == 1
        assert json.loads(broken.output)[0]["where"] == f"{path}:1"
        assert "set aside" in run.invoke(app, ["db", "ls"]).output
