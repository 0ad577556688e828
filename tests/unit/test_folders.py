"""Law: one module decides where attnreg writes; what cannot be used is passed over with a reason, and said once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from attnreg import folders
from attnreg.folders import Kind, LockTimeoutError, choice, locked

START = choice.START
KINDS: list[Kind] = ["data", "cache"]


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*choice.VARIABLES.values(), *choice.XDG.values()):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(choice, "_faults", {})
    monkeypatch.setattr(choice, "_told", set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("own", "xdg", "want"),
    [
        (None, None, "{home}/{below}/attnreg"),
        ("", "", "{home}/{below}/attnreg"),
        ("/own", "/xdg", "/own"),
        (None, "/xdg", "/xdg/attnreg"),
        (None, "relative", "{home}/{below}/attnreg"),  # as the specification has it
        (None, "~/xdg", "{home}/xdg/attnreg"),
        (None, "~nobody-here/xdg", "{home}/{below}/attnreg"),
        ("~", None, "{home}"),
        ("~/a/b", None, "{home}/a/b"),
        ("~root/a", None, "{root}/a"),
        ("relative/a", None, "{start}/relative/a"),
        ("./~/a", None, "{start}/~/a"),
    ],
)
def test_what_names_the_folder(
    kind: Kind, own: str | None, xdg: str | None, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in ((choice.VARIABLES[kind], own), (choice.XDG[kind], xdg)):
        if value is not None:
            monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    root = os.path.expanduser("~root")
    filled = want.format(home=tmp_path / "home", below=choice.AT_HOME[kind], root=root, start=START)
    assert folders.named(kind) == Path(filled)


def test_a_relative_folder_does_not_follow_chdir(tmp_path: Path) -> None:
    """Neither in this process nor in one that it starts."""
    program = """
import os, subprocess, sys
from attnreg import folders
before = folders.named("data")
os.chdir("elsewhere")
assert folders.named("data") == before, before
child = [sys.executable, "-c", "from attnreg import folders; print(folders.named('data'), folders.named('cache'))"]
print(before, before.parent / "kernels")
sys.stdout.flush()
subprocess.run(child, env=folders.child_environ(), check=True)
"""
    (tmp_path / "elsewhere").mkdir()
    environ = {**os.environ, "ATTNREG_DATA_DIR": "records", "ATTNREG_CACHE_DIR": "kernels"}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    here = tmp_path.resolve()
    assert done.stdout.splitlines() == [f"{here}/records {here}/kernels"] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("{tmp}/file", "is no folder"),
        ("{tmp}/file/below", "{tmp}/file is no folder"),
        ("/proc/attnreg", "/proc"),
        ("~nobody-here/x", "there is no user 'nobody-here'"),
        ("{tmp}/loop/x", "Too many levels of symbolic links"),
        ("{tmp}/" + "n" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_used_is_passed_over_and_said_once(
    kind: Kind, named: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv(choice.VARIABLES[kind], named.format(tmp=tmp_path))
    used = None
    for folder in folders.places(kind):
        try:
            used = folders.ready(folder)
            break
        except OSError as error:
            folders.refuse(kind, folder, error)
    assert used == tmp_path / f"attnreg-{os.geteuid()}" / kind
    assert used.parent.stat().st_mode & 0o777 == 0o700
    with pytest.warns(RuntimeWarning) as warned:
        folders.tell(kind, used)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folders.tell(kind, used)
    report = folders.report(kind)
    assert report.path == used == folders.chosen(kind)
    text = str(warned[0].message)
    for said in (why.format(tmp=tmp_path), named.format(tmp=tmp_path), str(used), choice.VARIABLES[kind]):
        assert said in text
    assert [fault.why in text for fault in report.passed] == [True]


def test_a_folder_that_can_be_used_is_not_worth_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folders.tell("data", folders.chosen("data"))
    assert folders.report("data").passed == ()
    assert not folders.named("data").exists(), "nothing is made before it is needed"


def test_no_room_is_for_now_and_all_else_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "a"))
    folders.refuse("cache", tmp_path / "a", OSError(28, "No space left on device"))
    assert folders.chosen("cache") == tmp_path / "a"
    folders.refuse("cache", tmp_path / "a", OSError(13, "Permission denied"))
    assert folders.chosen("cache") != tmp_path / "a"


def test_without_any_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("attnreg.folders.system.TEMPORARY", ())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setenv("ATTNREG_DATA_DIR", "~nobody-here")
    assert folders.chosen("data") is None
    with pytest.warns(RuntimeWarning, match="records and studies are not kept"):
        folders.tell("data", None)
    assert folders.temporary() is None
    with folders.scratch_file() as file:
        file.write(b"x")
        assert file.seek(0) == 0
        assert file.read() == b"x"


def _count(path: Path, lock: Path, times: int) -> None:
    for _ in range(times):
        with locked(lock):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "lock files"])
def test_nobody_else_holds_a_lock_meanwhile(flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flock:
        monkeypatch.setattr("attnreg.folders.locks._open", lambda path: None)
    (tmp_path / "n").write_text("0")
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=_count, args=(tmp_path / "n", tmp_path / "lock", 25)) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert (tmp_path / "n").read_text() == "100"


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "lock files"])
def test_a_lock_that_is_held_is_waited_for_and_then_given_up(
    flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flock:
        monkeypatch.setattr("attnreg.folders.locks._open", lambda path: None)
    path = tmp_path / "lock"
    with locked(path) as got:
        assert got
        with pytest.raises(LockTimeoutError, match="lock"), locked(path, 0.05):
            pass
        with locked(path, 0.05, needed=False) as second:
            assert not second
    with locked(path, 0.05) as again:
        assert again


def test_a_lock_of_a_process_that_was_killed_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lock files as well, on this machine."""
    for way in ("flock", "lock files"):
        if way == "lock files":
            monkeypatch.setattr("attnreg.folders.locks._open", lambda path: None)
        child = os.fork()
        if child == 0:
            folders.Lock(tmp_path / way).acquire()
            os.kill(os.getpid(), 9)
        os.waitpid(child, 0)
        with locked(tmp_path / way, 20.0) as got:
            assert got


def test_a_lock_is_taken_twice_by_one_thread(tmp_path: Path) -> None:
    lock = folders.Lock(tmp_path / "lock")
    lock.acquire()
    lock.acquire()
    lock.release()
    with pytest.raises(LockTimeoutError), locked(tmp_path / "lock", 0.0):
        pass
    lock.release()
    with locked(tmp_path / "lock", 0.0) as got:
        assert got


def test_a_lock_that_cannot_be_made_is_said_or_done_without(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"lock"), locked(tmp_path / "none" / "lock"):
        pass
    with locked(tmp_path / "none" / "lock", needed=False) as got:
        assert not got
