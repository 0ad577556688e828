"""Law: what one distribution has broken in its metadata breaks no call, hides no plugin, and is named by doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attnreg import metadata

PLUGIN = """
import attnreg

class Mine:
    name, version = "mine", "1"
    def supports(self, problem, hardware): return ["not today"]
    def space(self, problem, hardware): return attnreg.SearchSpace()
    def prepare(self, problem, config): raise NotImplementedError

@attnreg.hookimpl
def attnreg_backends():
    return [Mine()]
"""
CALL = """
import sys, torch, attnreg
from attnreg import registry
sys.path.insert(0, sys.argv[1])
x = torch.ones(1, 1, 2, 4)
assert torch.equal(attnreg.attention(attnreg.AttentionSpec(), x, x, x), x)
loaded = registry.current()
print(sorted(loaded.entries), [(f.plugin, f.step, f.reason) for f in loaded.failures])
"""
GOOD = "Metadata-Version: 2.1\nName: {}\nVersion: 2.0\n"
OURS, OTHER = "[attnreg]\nmine = mine_plugin\n", "[console_scripts]\nx = y:z\n"


def write(site: Path, name: str, points: bytes | None, meta: bytes | None, folder: str = "") -> Path:
    """A distribution as files, in whatever state."""
    info = site / (folder or f"{name}-2.0.dist-info")
    info.mkdir(parents=True)
    if points is not None:
        (info / "entry_points.txt").write_bytes(points)
    if meta is not None:
        (info / "METADATA").write_bytes(meta.replace(b"{}", name.encode()))
    return info


# name: (entry_points.txt, METADATA, what doctor says of it)
OTHERS: dict[str, tuple[bytes | None, bytes | None, str]] = {
    "no_equals": (b"[console_scripts]\nthis is nothing\n", GOOD.encode(), "line 2 is no `name = value`"),
    "latin_one": ("[x]\nn = caf\xe9\n".encode("latin-1"), GOOD.encode(), "UnicodeDecodeError"),
    "binary": (bytes(range(128, 256)), GOOD.encode(), "UnicodeDecodeError"),
    "no_metadata": (OTHER.encode(), None, "METADATA is missing"),
    "no_name": (OTHER.encode(), b"Metadata-Version: 2.1\n", "METADATA is missing"),
    "empty_folder": (None, None, "METADATA is missing"),
    "meta_latin": (None, "Name: x\nVersion: 1\nAuthor: \xe9\n".encode("latin-1"), "METADATA is missing"),
}


def run(script: list[str], *, path: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    here = os.environ.get("PYTHONPATH", "")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path) if path else "", here])), **more}
    return subprocess.run([sys.executable, *script], capture_output=True, text=True, env=environ, check=False)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", OTHERS)
def test_the_culprit_is_named_and_the_plugins_are_found(name: str, on_path: Path) -> None:
    points, meta, why = OTHERS[name]
    info = write(on_path, name, points, meta)
    said = {c.place: c.reason for c in metadata.culprits()}
    assert why in said[str(info)]
    found, wrong = metadata.entry_points("attnreg")
    assert {"eager", "sdpa", "cpu"} <= {f.name for f in found}
    assert wrong == [], "it names no plugin of ours, so it is no failure of one"


def test_all_of_them_at_once_break_no_call_and_no_command(tmp_path: Path) -> None:
    for name, (points, meta, _) in OTHERS.items():
        write(tmp_path, name, points, meta)
    done = run(["-c", CALL, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert "'eager'" in done.stdout
    assert done.stdout.strip().endswith("[]")
    done = run(["-m", "attnreg", "doctor", "--json"], path=tmp_path)  # torch and pydantic read them at import
    assert done.returncode == 0, done.stderr
    assert "no_equals" in done.stderr
    told = [f["detail"] for f in json.loads(done.stdout)["findings"] if f["plugin"] == "metadata"]
    for name, (_, _, why) in OTHERS.items():
        assert any(f"{name}-2.0.dist-info: " in detail and why in detail for detail in told)


# name: (entry_points.txt, METADATA, loads, the failure's step and reason)
PLUGINS: dict[str, tuple[bytes, bytes | None, bool, tuple[str, str] | None]] = {
    "good": (OURS.encode(), GOOD.format("good").encode(), True, None),
    "no_metadata": (OURS.encode(), None, True, None),
    "empty_metadata": (OURS.encode(), b"", True, None),
    "meta_latin": (OURS.encode(), "Name: caf\xe9\n".encode("latin-1"), True, None),
    "broken_line": (OURS.encode() + b"[other]\nnothing\n", GOOD.encode(), False, ("metadata", "line 4 is no")),
    "not_utf8": (OURS.encode() + b"[x]\nn = \xe9\n", GOOD.encode(), False, ("metadata", "UnicodeDecodeError")),
    "marked": (b"\xef\xbb\xbf" + OURS.encode(), GOOD.encode(), False, ("metadata", r"\ufeff[attnreg]")),
    "no_module": (b"[attnreg]\nmine = not a module!\n", GOOD.encode(), False, ("import", "is no module")),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_loads_if_its_entry_points_can_be_read_and_is_named_if_not(
    name: str, on_path: Path, loaded: Callable[[], object]
) -> None:
    points, meta, loads, failure = PLUGINS[name]
    (on_path / "mine_plugin.py").write_text(PLUGIN)
    write(on_path, name, points, meta)
    try:
        registry = loaded()
    finally:
        sys.modules.pop("mine_plugin", None)
    assert ("mine" in registry.entries) is loads  # type: ignore[attr-defined]  # a Registry
    said = [(f.step, f.reason) for f in registry.failures]  # type: ignore[attr-defined]
    assert len(said) == (failure is not None)
    if failure is not None:
        assert said[0][0] == failure[0]
        assert failure[1] in said[0][1]


def test_of_two_distributions_of_one_name_the_first_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, points in (("a", OTHER), ("b", OURS)):
        write(tmp_path / folder, "Twice.Named", points.encode(), GOOD.format("twice-named").encode())
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    assert "mine" in {f.name for f in metadata.entry_points("attnreg")[0]}, "b comes first"
    monkeypatch.syspath_prepend(str(tmp_path / "a"))
    write(tmp_path / "a", "", OTHER.encode(), None, "twice_named-3.0.dist-info")
    assert "mine" not in {f.name for f in metadata.entry_points("attnreg")[0]}


class Finder:
    """A finder of another tool, whose distributions break at everything."""

    @staticmethod
    def find_spec(*_: object, **__: object) -> None: ...

    @staticmethod
    def find_distributions(context: object = None) -> list[object]:
        raise RuntimeError("broken finder")


def test_a_finder_that_raises_hides_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    found, wrong = metadata.entry_points("attnreg")
    assert "eager" in {f.name for f in found}
    assert any("broken finder" in c.reason for c in wrong)


@pytest.mark.parametrize(("meta", "said"), [(GOOD.format("some"), "2.0"), (None, "unknown"), ("", "unknown")])
def test_a_version_is_text_whatever_the_metadata(meta: str | None, said: str, on_path: Path) -> None:
    write(on_path, "some_name_of_ours", None, None if meta is None else meta.encode())
    assert metadata.version("some_name_of_ours") == said
    assert metadata.version("nothing_of_that_name") is None


NOISY = """
import atexit, os, subprocess, sys
def noise(where):
    print("NOISE print", where)
    sys.stdout.write("NOISE write\\n")
    os.write(1, b"NOISE descriptor\\n")
    subprocess.run([sys.executable, "-c", "print('NOISE child')"])
noise("import")
atexit.register(noise, "exit")
import attnreg

class Mine:
    name, version = "mine", "1"
    def supports(self, problem, hardware): noise("supports"); return []
    def space(self, problem, hardware): noise("space"); return attnreg.SearchSpace()
    def estimate(self, problem, hardware): noise("estimate"); return 1.0
    def prepare(self, problem, config): noise("prepare"); return lambda q, k, v, **named: v

@attnreg.hookimpl
def attnreg_backends(): noise("hook"); return [Mine()]

@attnreg.hookimpl
def attnreg_doctor(hardware): noise("doctor"); return [attnreg.Finding("noisy", True, "fine")]
"""


@pytest.mark.parametrize(
    "command", ["doctor --json", "plugins --json", "explain --shape 1x1x2x4 --json", "variants --json", "plugins"]
)
def test_what_plugins_write_goes_to_stderr(command: str, tmp_path: Path) -> None:
    (tmp_path / "noisy_plugin.py").write_text(NOISY)
    write(tmp_path, "noisy", b"[attnreg]\nnoisy = noisy_plugin\n", GOOD.format("noisy").encode())
    done = run(["-m", "attnreg", *command.split()], path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NOISE" not in done.stdout
    for kind in ("print import", "print hook", "print exit", "write", "descriptor", "child"):
        assert f"NOISE {kind}" in done.stderr, "it is not lost"
    assert "mine" in done.stdout
    if command.endswith("--json"):
        json.loads(done.stdout)


def test_a_program_keeps_its_stdout_after_plugins_have_loaded(tmp_path: Path) -> None:
    done = run(["-c", "import attnreg; from attnreg import registry; registry.current(); print('here')"])
    assert done.stdout == "here\n", done.stderr
