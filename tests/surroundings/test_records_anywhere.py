"""Law: records are read from wherever they can be, and kept in a folder that can be written; calls need neither."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conditions import UNKNOWN_USER, Ran, forked, started

from attnreg import errors, folders, store
from attnreg.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from records_for_tests import problem, record


def here(size: int) -> Any:
    return record(problem=problem(sq=size, skv=size))


def add_and_list() -> dict[str, Any]:
    now = store._of_this_user()
    now.add(here(64))
    now.add(here(128))
    return {"user": str(now.user), "sizes": sorted(r.problem.sq for _, r in now.records("user"))}


def private(tmp: Path, user: int = 54321) -> Path:
    return tmp / f"attnreg-{user}" / "data" / "tuning_db"


def test_a_folder_that_can_only_be_read_is_read_and_another_written(tmp_path: Path) -> None:
    team = tmp_path / "team"
    Store(team / "tuning_db", None).add(here(512))
    for folder in (team, *(path for path in team.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    ran = forked(add_and_list, UNKNOWN_USER, ATTNREG_DATA_DIR=str(team), TMPDIR=str(tmp_path))
    assert ran.said == {"user": str(private(tmp_path)), "sizes": [64, 128, 512]}
    assert len(ran.warned) == 1
    assert all(word in ran.warned[0] for word in (str(team), "cannot be written", "ATTNREG_DATA_DIR"))
    read = forked(
        lambda: {"sizes": [r.problem.sq for _, r in store._of_this_user().records("user") if r.problem.sq == 512]},
        UNKNOWN_USER,
        ATTNREG_DATA_DIR=str(team),
        TMPDIR=str(tmp_path / "none"),
    )
    assert read == Ran({"sizes": [512]}, []), "reading alone is worth no warning"


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "HOME is not set, and user 54321"),
        ({"HOME": "/nonexistent"}, "/nonexistent does not exist"),
        ({"ATTNREG_DATA_DIR": "~nobody-here"}, "no user 'nobody-here'"),
        ({"ATTNREG_DATA_DIR": "{tmp}/closed/x"}, "Permission denied"),
    ],
    ids=str,
)
def test_without_a_home_records_go_to_a_private_folder(tmp_path: Path, environ: dict[str, str], why: str) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    filled = {name: text.format(tmp=tmp_path) for name, text in environ.items()}
    ran = forked(add_and_list, UNKNOWN_USER, TMPDIR=str(tmp_path), **filled)
    assert ran.said == {"user": str(private(tmp_path)), "sizes": [64, 128]}
    assert len(ran.warned) == 1
    assert why in ran.warned[0]


def test_where_no_folder_can_be_written_records_are_refused_and_calls_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnreg.folders.system.TEMPORARY", ())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setenv("ATTNREG_DATA_DIR", "~nobody-here")
    with pytest.warns(RuntimeWarning, match="records and studies are not kept"):
        now = store._of_this_user()
    assert now.user is None
    assert list(now.records("user")) == []
    with pytest.raises(errors.RecordError, match="ATTNREG_DATA_DIR"):
        now.add(here(64))


TUNE = """
import os, torch, attnreg
from attnreg import AttentionSpec
os.makedirs("/tmp/home")
q = torch.randn(1, 2, 32, 16)
with attnreg.autotune(), attnreg.use_backend("eager"):
    out = attnreg.attention(AttentionSpec(), q, q, q)
said["right"] = torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-5)
"""


def test_a_call_that_tunes_goes_on_where_the_disk_is_full() -> None:
    mounts = [word for folder in ("/tmp", "/var/tmp", "/dev/shm") for word in ("--mount", folder, "size=4k")]
    program = "from attnreg.tuning import api; api.MISSED = api.Options(trials=1, seconds=5.0, isolate=False)\n" + TUNE
    ran = started(program, mounts, HOME="/tmp/home")
    assert ran.said == {"right": True}
    assert any("could not be tuned" in text and "No space left" in text for text in ran.warned), ran.warned


def test_doctor_names_each_folder_and_what_it_stands_in_for(tmp_path: Path) -> None:
    program = """
    from typer.testing import CliRunner
    from attnreg.cli import app, commands
    import json
    done = CliRunner().invoke(app, ["doctor", "--json"])
    said["findings"] = json.loads(done.stdout)["findings"]
    """
    ran = started(program, UNKNOWN_USER, TMPDIR=str(tmp_path), HOME="/nonexistent")
    found = {f["subject"]: f for f in ran.said["findings"]}
    for subject, kind in (("records and studies", "data"), ("cpu: kernel cache", "cache")):
        said = found[subject]
        assert not said["ok"]
        assert str(tmp_path / "attnreg-54321" / kind) in said["detail"]
        assert "/nonexistent does not exist" in said["detail"]
        assert folders.choice.VARIABLES[kind] in said["todo"]


def test_the_temporary_folder_may_be_missing(tmp_path: Path) -> None:
    """A measuring worker keeps what candidates print in a file without a name."""
    work = """
    import tempfile
    from attnreg import folders
    said["folder"] = str(folders.temporary())
    with folders.scratch_file() as file:
        said["written"] = file.write(b"abc")
    """
    assert started(work, TMPDIR=str(tmp_path / "none")).said == {"folder": "/tmp", "written": 3}
    assert os.path.isdir("/tmp")
