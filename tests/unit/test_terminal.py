"""Law: every command prints on any encoding and any width; no value is cut; a reader may go at any time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attnreg import AttentionSpec, store
from attnreg.cli import app, commands
from attnreg.sheet import Sheet, paragraph
from attnreg.suites import attention_problem
from attnreg.tuning import write_problems

assert commands.explain
SHIPPED = "{tuning_db}/cpu-amd-family26-model2-avx512-2c"
OTHER = "{tuning_db}/cpu-amd-family25-model1-avx2-2c"
TUNED = "tune {here}/p.jsonl --dry-run"
# Each command that prints a table or values, and the names in its JSON whose values its text is not meant to hold.
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "kind device memory"),
    "plugins": ("plugins", ""),
    "explain": ("explain --shape 1x4x64x32 --mask causal&sliding_window(7) --grad", "problem note origin why"),
    "explain, mask": ("explain --shape 1x2x8x16 --mask causal --show-mask", "problem note origin mask why"),
    "variants": ("variants", ""),
    "build": ("build --dtypes float32 --head-dims 16", "hardware"),
    "targets": ("targets --published", "tile best"),
    "tune": (TUNED, "problem"),
    "db ls": (f"db ls --path {SHIPPED}", "RECORD"),
    "db show": (f"db show --path {SHIPPED}", "RECORD"),
    "db diff": (f"db diff {SHIPPED} {OTHER}", ""),
    "db merge": (f"db merge {SHIPPED} --into {{here}}/merged", "RECORD"),
    "db check": ("db check {here}/broken", ""),
    "db promote": (f"db promote --from {SHIPPED} --into {{here}}/promoted", "RECORD"),
    "db prune": ("db prune --path {here}/empty", "RECORD"),
    "db export": (f"db export {{here}}/out.jsonl --path {SHIPPED}", ""),
}
RECORD = {"backend", "slug"}
"""Of whole records: what every list of them shows as it is."""
WIDTHS = ("40", "80", "120", "")
"""As COLUMNS says; the last is a pipe's, where lines have any length."""


@pytest.fixture
def words(tmp_path: Path) -> Any:
    """A command's words, with its folders filled in; what it writes goes to a folder of its own."""
    write_problems(tmp_path / "p.jsonl", [attention_problem(AttentionSpec(), (2, 2), 16, 16, 16)])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a record that is none.json").write_text("{")
    (tmp_path / "empty").mkdir()
    shipped = store.current().shipped
    return lambda text: [w.format(here=tmp_path, tuning_db=shipped) for w in text.split()]


def run(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str = ""
) -> str:
    monkeypatch.setenv("COLUMNS", width) if width else monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit):
        app(command)
    return capsys.readouterr().out


def strings(data: object, skip: set[str], only: set[str]) -> Iterator[str]:
    """Every text in the JSON, but for those under the names of `skip`, and where there are any those of `only`."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name not in skip and (not only or name in only or isinstance(value, dict)):
                yield from strings(value, skip, only)
    elif isinstance(data, list):
        for value in data:
            yield from strings(value, skip, only)
    elif isinstance(data, str):
        yield data


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_value_is_cut_at_any_width(
    name: str, words: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, skipped = COMMANDS[name]
    plain = run([*words(command), "--json"], monkeypatch, capsys)
    lines = [plain] if plain.startswith(("{\n", "[")) else plain.splitlines()
    data = [json.loads(line) for line in lines if line]
    skip = {*skipped.split(), "trace"}
    values = set(strings(data, skip, RECORD if "RECORD" in skip else set())) if name != "db merge" else set()
    for width in WIDTHS:
        text = run(words(command.replace("merged", f"merged{width}")), monkeypatch, capsys, width)
        assert "…" not in text
        assert "..." not in text
        whole = squeezed(text)
        assert [v for v in values if squeezed(v) not in whole] == []
        if width and name != "explain, mask":  # a drawing has a width of its own
            wide = [line for line in text.splitlines() if len(line) > int(width)]
            assert [line for line in wide if len(line.split()) > 2] == [], "only a word that is longer stands out"


PRINTED = {
    "explain": "explain --shape 1x2x64x16 --mask causal --show-mask",
    "variants": "variants",
    "db ls": "db ls",
    "help": "tune --help",
}
ENCODINGS = ("latin-1", "cp1252", "ascii", "utf-16", "C")


def started(command: list[str], encoding: str = "utf-8", **more: Any) -> subprocess.CompletedProcess[bytes]:
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "PYTHONUTF8", "PYTHONIOENCODING")}
    said = {"LC_ALL": "C", "PYTHONUTF8": "0"} if encoding == "C" else {"PYTHONIOENCODING": encoding}
    return subprocess.run(
        [sys.executable, "-m", "attnreg", *command], env={**environ, **said}, capture_output=True, check=False, **more
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_drawing_prints_on_every_encoding(encoding: str) -> None:
    done = started(PRINTED["explain"].split(), encoding)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii" if encoding == "C" else encoding)
    assert "?" not in text
    assert "\\u" not in text
    rows = [line for line in text.splitlines() if re.match(r" *\d+ [|│]", line)]
    marks = {char for row in rows for char in re.split("[|│]", row)[1]}
    assert len(marks) == 3, "all, some and none are told apart"
    assert len({len(row) for row in rows}) == 1
    legend = text.splitlines()[-1]
    assert all(mark in legend for mark in marks)


@pytest.mark.parametrize("name", [n for n in PRINTED if n != "explain"])
def test_a_command_prints_in_ascii(name: str) -> None:
    done = started(PRINTED[name].split(), "ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii")


@pytest.mark.parametrize("command", ["db ls", "db ls --json", "explain --show-mask", "tune --help"])
def test_a_reader_may_go(command: str) -> None:
    script = f'"{sys.executable}" -m attnreg {command} | head -c 10'
    done = subprocess.run(["bash", "-c", script + '; echo "${PIPESTATUS[0]}"'], capture_output=True, check=False)
    assert done.stderr == b""
    assert len(done.stdout.splitlines()[0]) >= 10


def test_a_full_disk_is_one_message() -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m attnreg plugins > /dev/full'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "attnreg: [Errno 28] No space left on device\n"


def test_a_file_named_as_stdout_is_stdout() -> None:
    done = started(["db", "export", "/dev/stdout", "--json", "--only", "sm-90-nvidia-h200"])
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert len(lines) - 1 == next(json.loads(line)["records"] for line in lines if '"records"' in line)


def printed(sheet: Sheet | str, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(color_system=None)
    with console.capture() as said:
        paragraph(console, sheet) if isinstance(sheet, str) else sheet.print(console)
    return said.get().splitlines()


def test_a_wide_column_stands_below_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = Sheet("name", "why", "time", right=("time",))
    sheet.add("one", "a reason of several words\nand another [red]", "1 ms")
    sheet.add("two", "", "10 ms")
    assert printed(sheet, 80, monkeypatch) == [
        "name  why                         time",
        "one   a reason of several words   1 ms",
        "      and another [red]",
        "two                              10 ms",
    ]
    assert printed(sheet, 30, monkeypatch) == [
        "name   time",
        "one    1 ms",
        "  why  a reason of several",
        "       words",
        "       and another [red]",
        "two   10 ms",
    ]
    assert printed(sheet, 10, monkeypatch)[2:5] == ["  why", "    a", "    reason"]


def test_a_paragraph_breaks_between_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "ok   " + "x" * 40 + " of several words"
    assert printed(text, 20, monkeypatch) == ["ok", "  " + "x" * 40, "  of several words"]
