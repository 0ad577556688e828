"""Law: the password of a storage is in nothing that attnreg prints, raises or writes; what is no URL is none."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from test_fleet import server
from typer.testing import CliRunner

import attnreg
from attnreg import AttentionSpec, errors, redaction
from attnreg.cli import app, commands, main
from attnreg.problem import Problem
from attnreg.suites import attention_problem
from attnreg.tuning import Options, write_problems
from attnreg.tuning.location import location
from attnreg.tuning.session import tune_problem
from attnreg.tuning.storage import open_storage

assert commands
assert server
RUN = CliRunner()
PASSWORD = "Tr0ub4dor-and-3"
PROBLEM = attention_problem(AttentionSpec(), (2, 2), 16, 16, 16)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", {})
    monkeypatch.setattr(redaction, "_kept", {})


REFUSED = [
    ("postgresql:/u:{}@h/n", "it looks like a database URL and is none"),
    ("postgresql:u:{}@h/n", "it looks like a database URL and is none"),
    ("postgresql:///u:{}@h/n", "behind two slashes"),
    ("postgres//u:{}@h/n", "it looks like a database URL and is none"),
    ("postgresql//h/n?password={}", "it looks like a database URL and is none"),
    ("postgres//h/n", "a URL has a colon before its slashes"),
    ("postgres://u:{}@h/n", "did you mean postgresql://?"),
    ("http://u:{}@h/n", "databases are postgresql, mysql"),
    ("mysql:u:{}@h/n", "it looks like a database URL and is none"),
    ("mysql:h/n", "a URL goes on with two slashes"),
    ("redis:6379", "a URL goes on with two slashes"),
    ("file:/tmp/x.journal", "a URL goes on with two slashes"),
    ("//u:{}@h/n", "it looks like a database URL and is none"),
    ("u:{}@h/n", "it looks like a database URL and is none"),
    (" postgresql://u:{}@h/n", "a URL begins with its scheme"),
    ("'postgresql://u:{}@h/n'", "a URL begins with its scheme"),
    ("postgresql ://u:{}@h/n", "a URL begins with its scheme"),
    ("host=h password={} dbname=n", "it looks like a database URL and is none"),
    ("postgresql://u:a@{}@h/n", "a password writes @ %40"),
    ("postgresql://u:a/{}@h/n", "a password writes @ %40"),
    ("postgresql://u:a#{}@h/n", "a password writes @ %40"),
    ("postgresql://u:a?{}@h/n", "a host is a name"),
    ("postgresql://u:a {}@h/n", "a URL holds no spaces"),
    ("postgresql://u:{}@h:port/n", "a host is a name"),
    ("postgresql://h/n;password={}", "a password writes @ %40"),
    ("postgresql://h/n?{}", "name=value pairs"),
    ("sqlite://u:{}@h/n", "sqlite has no host"),
    ("", "it is empty"),
    ("  ", "it is empty"),
]
TAKEN = [
    ("postgresql://u:{}@h:5432/n?sslmode=require", "postgresql://u:{}@h:5432/n?sslmode=require"),
    ("POSTGRESQL+psycopg://u:{}@h/n", "postgresql+psycopg://u:{}@h/n"),
    ("postgresql://[::1]:5432/n?password={}", "postgresql://[::1]:5432/n?password={}"),
    ("postgresql://u@/n?host=/run/pg", "postgresql://u@/n?host=/run/pg"),
    ("sqlite:///a/b.db", "sqlite:///a/b.db"),
    ("study.journal", Path("study.journal")),
    ("./postgresql:x", Path("postgresql:x")),
    ("dir/run:1.journal", Path("dir/run:1.journal")),
    ("a@b/study.journal", Path("a@b/study.journal")),
    ("~/study.journal", Path.home() / "study.journal"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED)
@pytest.mark.parametrize("given", [str, Path])
def test_what_only_looks_like_a_url_is_refused_and_makes_no_folder(
    text: str, said: str, given: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = given(text.format(PASSWORD))
    if given is Path and ("@" not in str(where) and "password" not in str(where)):
        return  # a Path of a name that only begins so is meant
    for refuse in (location, lambda where: Options(storage=where), open_storage):
        with pytest.raises(errors.AttnregError, match="expected a journal file or a database URL") as caught:
            refuse(where)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))
        if given is str:
            assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "data"] if (tmp_path / "data").exists() else True
    assert not [path for path in tmp_path.rglob("*") if PASSWORD in path.name]


@pytest.mark.parametrize(("text", "want"), TAKEN)
def test_what_is_a_file_or_a_url_is_taken(text: str, want: str | Path) -> None:
    assert location(text.format(PASSWORD)) == (want.format(PASSWORD) if isinstance(want, str) else want)
    assert PASSWORD not in repr(Options(storage=text.format(PASSWORD)))


# Errors of SQLAlchemy and of drivers: nobody listens, an option that is none, a driver that is not there.
FAILING = [
    "postgresql+psycopg://u:{}@127.0.0.1:9/n?connect_timeout=2",
    "postgresql+psycopg://127.0.0.1:9/n?user=u&password={}&connect_timeout=2",
    "postgresql+psycopg://u@127.0.0.1:9/n?sslpassword={}&sslmode=require&connect_timeout=2",
    "postgresql+psycopg://u@127.0.0.1:9/n?passfile={}&connect_timeout=2",
    "postgresql+psycopg://u:{0}@127.0.0.1:9/n?{0}={0}",
    "postgresql+psycopg://u@127.0.0.1/n?port={}",
    "postgresql+psycopg://u:{}@no-such-host.invalid/n?connect_timeout=2",
    "postgresql+nodriver://u:{}@h/n",
    "mysql://u:{}@127.0.0.1:9/n",
    "oracle://u:{}@127.0.0.1:9/n",
]


@pytest.mark.parametrize("url", FAILING)
def test_a_storage_that_cannot_be_opened_is_told_without_its_password(
    url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(errors.TuneError, match="cannot be opened") as caught:
        open_storage(url.format(PASSWORD))
    error: BaseException | None = caught.value
    assert error is not None
    assert (error.__cause__, error.__context__) == (None, None), "what the driver said is no part of the traceback"
    printed = "".join(capfd.readouterr())
    if "port=" not in url:  # that is no secret, wherever it is repeated
        for text in ("".join(traceback.format_exception(error)), caplog.text, printed):
            assert PASSWORD not in text
    assert "***" in str(error) or "port=" in url


ARGUMENTS = [
    ["--storage", "{}"],
    ["--storage={}"],
    ["--storage", "{}", "--json"],
    ["--storage", "{}", "--dry-run"],
    ["--storage", "{}", "--dry-run", "--json"],
    ["--storag", "{}"],
    ["{}"],
    ["--budget", "{}"],
    ["--backends", "{}"],
    ["--only", "{}"],
]
URLS = [FAILING[1], "postgresql:/u:{}@h/n", "postgres//u:{}@h/n", "postgresql://u:a b {}@h/n"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_the_command_line_shows_no_password(url: str, arguments: list[str], tmp_path: Path) -> None:
    write_problems(tmp_path / "p.jsonl", [PROBLEM])
    command = ["tune", str(tmp_path / "p.jsonl"), *(text.format(url.format(PASSWORD)) for text in arguments)]
    done = RUN.invoke(app, [*command, "--backends", "eager"] if "--backends" not in command else command)
    said = done.output + (done.stderr or "") + "".join(traceback.format_exception(done.exception))
    for part in (PASSWORD, PASSWORD[:6], PASSWORD[-6:]):  # a frame that folds lines would show a half
        assert part not in said
    assert "Tr0ub" not in json.dumps([str(path) for path in tmp_path.rglob("*")])


def test_a_command_of_its_own_shows_no_password(tmp_path: Path) -> None:
    write_problems(tmp_path / "p.jsonl", [PROBLEM])
    command = [sys.executable, "-m", "attnreg", "tune", str(tmp_path / "p.jsonl"), "--backends", "eager", "--json"]
    environ = {**os.environ, "ATTNREG_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run(
        [*command, "--storage", FAILING[4].format(PASSWORD)], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    assert "***" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("kind", [errors.TuneError, OSError, RuntimeError])
def test_whatever_ends_the_command_shows_no_password(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise kind(f"postgresql://u:{PASSWORD}@h/n is gone") from ValueError(f"password={PASSWORD}")

    write_problems(tmp_path / "p.jsonl", [PROBLEM])
    monkeypatch.setattr("attnreg.cli.tune.tune_all", fails)
    monkeypatch.setattr(sys, "argv", ["attnreg", "tune", str(tmp_path / "p.jsonl")])
    with pytest.raises(SystemExit) as done:
        main()
    printed = "".join(capsys.readouterr())
    assert done.value.code == (1 if kind is RuntimeError else 2)
    assert PASSWORD not in printed
    assert "postgresql://u:***@h/n is gone" in printed


def test_a_program_s_tune_raises_without(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(errors.TuneError) as caught:
        attnreg.tune(AttentionSpec(), q, q, q, storage=FAILING[4].format(PASSWORD), backends=("eager",), isolate=False)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())


def test_a_database_that_goes_away_is_an_error_without_a_password(
    server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The search is under way when the driver fails, and repeats what it connects with."""
    url = server.replace("postgres@", f"postgres:{PASSWORD}@")
    from attnreg.tuning import session

    def gone(*_: object) -> str:
        from psycopg import OperationalError

        raise OperationalError(f"connection to {url} (password={PASSWORD}) was lost")

    monkeypatch.setattr(session, "_search", gone)
    with pytest.raises(errors.TuneError, match="was lost") as caught:
        tune_problem(PROBLEM, Options(storage=url, backends=("eager",), isolate=False))
    assert caught.value.__context__ is None
    assert PASSWORD not in "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    monkeypatch.setattr(session, "_search", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # what is no error of a database's keeps its traceback
        tune_problem(PROBLEM, Options(storage=url, backends=("eager",), isolate=False))


def test_a_hidden_url_still_opens_its_database(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line hands on what it shows; the storage gets the password."""
    url, opened = server.replace("postgres@", f"postgres:{PASSWORD}@"), []

    def tune_all(problems: list[Problem], options: Options, **_: object) -> list[tuple[Problem, errors.TuneError]]:
        assert PASSWORD not in repr(vars(options))
        opened.append(open_storage(str(options.storage)))
        return [(problem, errors.TuneError("not tuned")) for problem in problems]

    monkeypatch.setattr("attnreg.cli.tune.tune_all", tune_all)
    write_problems(tmp_path / "p.jsonl", [PROBLEM])
    for option in (["--storage", url], [f"--storage={url}"]):
        done = RUN.invoke(app, ["tune", str(tmp_path / "p.jsonl"), "--backends", "eager", *option])
        assert done.exit_code == 1, done.output
    assert [storage.get_all_studies() for storage in opened] == [[], []]
