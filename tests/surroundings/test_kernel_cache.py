"""Law: whatever folder, lock or disk is missing, kernels are built, or a call goes on without; it is said once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conditions import UNKNOWN_USER, Ran, forked, started

from attnreg_cpu import build, library_files

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")


def once() -> dict[str, Any]:
    library = build.library("selftest.cpp", {})
    return {"lanes": library.attnreg_lanes(), "path": library._name}


def twice() -> dict[str, Any]:
    build.library("selftest.cpp", {"A": 1})
    return once()


REAL_USER = os.geteuid()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of selftest.cpp, as it was built for this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNREG_CACHE_DIR", str(tmp_path_factory.mktemp("made")))
        return build.build("selftest.cpp", {})


def holding(folder: Path, library: Path, mode: int = 0o755) -> Path:
    """A cache that holds the library."""
    (folder / "cpu").mkdir(parents=True)
    shutil.copy2(library, folder / "cpu")
    (folder / "cpu").chmod(mode)
    return folder


def private(tmp: Path, user: int) -> Path:
    return tmp / f"attnreg-{user}" / "cache" / "cpu"


def only_warning(ran: Ran, *words: object) -> None:
    assert len(ran.warned) == 1, ran.warned
    assert all(str(word) in ran.warned[0] for word in words), ran.warned


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "HOME is not set, and user 54321 is not in the password database"),
        ({"HOME": ""}, "HOME is not set"),
        ({"HOME": "/nonexistent"}, "/nonexistent does not exist"),
        ({"ATTNREG_CACHE_DIR": "~nobody-here/x"}, "there is no user 'nobody-here' with a home folder"),
    ],
    ids=str,
)
def test_without_a_home_a_private_folder_serves(tmp_path: Path, environ: dict[str, str], why: str) -> None:
    ran = forked(twice, UNKNOWN_USER, TMPDIR=str(tmp_path), **environ)
    folder = private(tmp_path, 54321)
    assert Path(ran.said["path"]).parent == folder
    assert (tmp_path / "attnreg-54321").stat().st_mode & 0o777 == 0o700
    only_warning(ran, why, folder.parent, "ATTNREG_CACHE_DIR")


def test_a_read_only_cache_that_holds_the_library_serves_it(tmp_path: Path, made: Path) -> None:
    cache = holding(tmp_path / "shared", made, 0o555)
    ran = forked(once, UNKNOWN_USER, ATTNREG_CACHE_DIR=str(cache), TMPDIR=str(tmp_path))
    assert ran == Ran({"lanes": ran.said["lanes"], "path": str(cache / "cpu" / made.name)}, [])
    assert [path.name for path in (cache / "cpu").iterdir()] == [made.name]


@pytest.mark.parametrize("what", ["read-only", "a file", "below a file", "a closed folder"])
def test_a_cache_that_cannot_be_written_is_named_once(tmp_path: Path, what: str) -> None:
    cache = tmp_path / "cache"
    if what == "read-only":
        cache.mkdir(mode=0o555)
    elif what == "a closed folder":
        cache.mkdir(mode=0)
    else:
        cache.touch()
        cache = cache / "below" if what == "below a file" else cache
    ran = forked(twice, UNKNOWN_USER, ATTNREG_CACHE_DIR=str(cache), TMPDIR=str(tmp_path))
    assert Path(ran.said["path"]).parent == private(tmp_path, 54321)
    only_warning(ran, cache, "cannot be" if what in ("read-only", "a closed folder") else "no folder")


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_lock_file_of_another_user_stops_nobody(tmp_path: Path, made: Path, mode: int) -> None:
    if REAL_USER != 0:
        pytest.skip("only root can leave a file of another user's")
    cache = tmp_path / "shared"
    (cache / "cpu").mkdir(parents=True)
    lock = cache / "cpu" / Path(made.name).with_suffix(".lock")
    lock.touch()
    os.chown(lock, 1, 1)
    lock.chmod(mode)
    ran = forked(once, UNKNOWN_USER, ATTNREG_CACHE_DIR=str(cache), TMPDIR=str(tmp_path))
    assert (Path(ran.said["path"]), ran.warned) == (cache / "cpu" / made.name, [])


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_that_cannot_execute_gives_way(tmp_path: Path, made: Path, filled: bool) -> None:
    cache, kept = tmp_path / "noexec", holding(tmp_path / "kept", made)
    cache.mkdir()

    def work() -> dict[str, Any]:
        if not filled:
            return twice()
        shutil.copytree(kept / "cpu", cache / "cpu")
        os.environ["CXX"] = "none-such"  # so nothing but a copy of what lies there can serve
        return once()

    ran = forked(work, ("--mount", str(cache), "noexec"), ATTNREG_CACHE_DIR=str(cache), TMPDIR=str(tmp_path))
    assert Path(ran.said["path"]) == private(tmp_path, REAL_USER) / made.name
    only_warning(ran, cache, "noexec")


def test_a_full_disk_gives_way_to_one_with_room(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    ran = forked(twice, ("--mount", str(tmp_path / "full"), "size=32k"), ATTNREG_CACHE_DIR=str(tmp_path / "full"),
              TMPDIR=str(tmp_path))  # fmt: skip
    assert Path(ran.said["path"]).parent == private(tmp_path, REAL_USER)
    only_warning(ran, tmp_path / "full", "its disk is full")


FULL = """
import os, torch, attnreg
from attnreg import AttentionSpec, masks
from attnreg_cpu import build
os.makedirs("/tmp/home")
try:
    build.build("selftest.cpp", {})
except build.BuildError as error:
    said["error"], said["cause"] = str(error), [type(error.__cause__).__name__, error.__cause__.errno]
q = torch.randn(1, 2, 40, 16)
out = attnreg.attention(AttentionSpec(mask=masks.Causal()), q, q, q)
want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
said["right"] = torch.allclose(out, want, atol=1e-5)
said["lasting"] = build.lacking()
"""


def test_where_every_disk_is_full_calls_go_on() -> None:
    mounts = [word for folder in ("/tmp", "/var/tmp", "/dev/shm") for word in ("--mount", folder, "size=32k")]
    ran = started(FULL, mounts, HOME="/tmp/home")
    assert ran.said["cause"] == ["OSError", 28]
    assert "No space left on device" in ran.said["error"]
    assert "/tmp/home/.cache/attnreg" in ran.said["error"]
    assert (ran.said["right"], ran.said["lasting"]) == (True, "")


NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int handle, int operation) { errno = atoi(getenv("NO_FLOCK")); return -1; }
"""
LOCKS = """
import errno, os
from pathlib import Path
from attnreg import store
from attnreg.tuning.search import make_sampler
from attnreg.tuning.storage import open_storage, open_study
from attnreg_cpu import build
from records_for_tests import problem, record
tmp = Path(os.environ["HOME"])
for name in ("ENOLCK", "ENOTSUP", "ENOSYS"):
    os.environ["NO_FLOCK"] = str(getattr(errno, name))
    for variable, folder in (("ATTNREG_CACHE_DIR", "cache"), ("ATTNREG_DATA_DIR", "data")):
        os.environ[variable] = str(tmp / name / folder)
    if name == "ENOLCK":
        said["path"] = build.library("selftest.cpp", {})._name
    with store.using(store._of_this_user()) as now:
        for size in (64, 512):
            now.add(record(problem=problem(sq=size, skv=size)))
        records = sorted(r.problem.sq for _, r in now.records("user"))
    journal = tmp / name / "x.journal"
    open_study(open_storage(journal), "x", make_sampler(0)).set_user_attr("a", 1)
    said[name] = [records, open_study(open_storage(journal), "x", make_sampler(0)).user_attrs]
"""


def test_a_file_system_without_flock(tmp_path: Path) -> None:
    """The library that is preloaded has a flock that answers as such file systems do."""
    source, shim = tmp_path / "flock.c", tmp_path / "flock.so"
    source.write_text(NO_FLOCK)
    compiler = build.find_compiler()
    assert compiler is not None
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", str(source), "-o", str(shim)], check=True)
    ran = started(LOCKS, LD_PRELOAD=str(shim), NO_FLOCK="38", HOME=str(tmp_path))
    assert Path(ran.said.pop("path")).parent == tmp_path / "ENOLCK" / "cache" / "cpu"
    assert ran.said == {name: [[64, 512], {"a": 1}] for name in ("ENOLCK", "ENOTSUP", "ENOSYS")}
    locked = [tmp_path / "ENOLCK" / "cache" / "cpu"]
    locked += [tmp_path / name / where for name in ran.said for where in ("data/tuning_db", ".")]
    assert [text.split(":")[1].strip() for text in ran.warned] == [str(folder.resolve()) for folder in locked]
    assert all("has no flock" in text for text in ran.warned)
    assert not list(tmp_path.rglob("*.held"))


SQUAT = ["a link", "a file", "another user's", "open to others"]


@pytest.mark.parametrize("what", SQUAT)
def test_a_private_folder_that_may_be_somebody_else_s_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path, what: str
) -> None:
    """Whoever can write a library there runs code as this user."""
    other, mine = tmp_path / "other", tmp_path / "tmp" / f"attnreg-{REAL_USER}"
    holding(other / "cache", made)
    mine.parent.mkdir()
    if what == "a link":
        mine.symlink_to(other)
    elif what == "a file":
        mine.touch(mode=0o600)
    else:
        shutil.copytree(other, mine)
        mine.chmod(0o777 if what == "open to others" else 0o700)
        if what == "another user's":
            if REAL_USER != 0:
                pytest.skip("only root can leave a folder of another user's")
            os.chown(mine, 1, 1)
    monkeypatch.setenv("TMPDIR", str(mine.parent))
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "none" / "such"))
    (tmp_path / "none").touch()
    assert all(mine not in path.parents for path in library_files.read_dirs())
    assert library_files.cache_dir() != mine / "cache" / "cpu"
    assert library_files.found(made.name) is None
