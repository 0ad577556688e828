"""Law: a plugin loads alone; whatever is wrong with it is kept with its cause, and calls still work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from records_for_tests import problem
from typer.testing import CliRunner

import attnreg
from attnreg import AttentionSpec, errors, registry
from attnreg.cli import app, commands
from attnreg.hardware import Hardware, detect
from attnreg.problem import Problem

GOOD = """
    import attnreg, torch

    class Mine:
        name, version = "mine", "1"
        def supports(self, problem, hardware): return []
        def space(self, problem, hardware): return attnreg.SearchSpace()
        def prepare(self, problem, config):
            return lambda q, k, v, **named: torch.zeros(*q.shape[:-1], v.shape[-1]) + 42

    @attnreg.hookimpl
    def attnreg_backends():
        return [Mine()]
"""
NAMED = 'name, version = "mine", "1"'
RAISES = """
        @property
        def {}(self): raise RuntimeError('driver not found')"""
REPR_RAISES = """
        def __repr__(self): raise RuntimeError('no repr')"""
BROKEN = {
    "raises_at_import": ("raise RuntimeError('half installed')", "import", "half installed"),
    "exits_at_import": ("import sys; sys.exit('no licence')", "import", "no licence"),
    "missing_module": ("import a_module_that_is_not_there", "import", "a_module_that_is_not_there"),
    "misspelt_hook": (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_backend(): return []",
        "registration",
        "attnreg_backend",
    ),
    "wrong_argument": (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_doctor(machine): return []",
        "registration",
        "machine",
    ),
    "no_hook": ("x = 1", "registration", "implements no hook"),
    "raises_in_hook": (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_backends(): raise ValueError('no kernels built')",
        "attnreg_backends",
        "no kernels built",
    ),
    "returns_a_number": (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_backends(): return 3",
        "attnreg_backends",
        "int",
    ),
    "returns_strings": (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_backends(): return ['flash']",
        "attnreg_backends",
        "lower-case name",
    ),
    "returns_a_class": (GOOD.replace("[Mine()]", "[Mine]"), "attnreg_backends", "is a class"),
    "lacks_a_method": (GOOD.replace("def prepare", "def prepared"), "attnreg_backends", "lacks prepare"),
    "no_version": (GOOD.replace('"mine", "1"', '"mine", None'), "attnreg_backends", "version"),
    "takes_a_name": (GOOD.replace('"mine"', '"eager"'), "attnreg_backends", "taken by plugin 'eager'"),
    "base_exception": ("class X(BaseException): pass\nraise X('boom')", "import", "X: boom"),
    "error_without_text": (
        "class NoText(Exception):\n    def __str__(self): raise RuntimeError('nope')\nraise NoText",
        "import",
        "NoText",
    ),
    "markup": ("raise ImportError('pip install mylib[cuda]; see [/usr/lib]')", "import", "mylib[cuda]; see [/usr/lib]"),
    "name_raises": (GOOD.replace(NAMED, RAISES.format("name")), "attnreg_backends", "RuntimeError: driver not found"),
    "version_raises": (GOOD.replace(NAMED, NAMED + RAISES.format("version")), "attnreg_backends", "driver not found"),
    "prepare_raises": (
        GOOD.replace(NAMED, NAMED + RAISES.format("prepare")).replace("def prepare(self, problem", "def other(self, p"),
        "attnreg_backends",
        "driver not found",
    ),
    "repr_raises": (
        GOOD.replace(NAMED, 'name, version = "Bad Name", "1"' + REPR_RAISES),
        "attnreg_backends",
        "got 'Bad Name' from <Mine>",
    ),
    "record_is_no_dict": (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_records(): return [5]",
        "attnreg_records",
        "plain dicts, got 5",
    ),
}


def call() -> torch.Tensor:
    x = torch.ones(1, 1, 2, 4)
    out: torch.Tensor = attnreg.attention(AttentionSpec(), x, x, x)
    return out


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_set_aside_named_by_doctor_and_calls_work(
    name: str, install_plugin: Callable[[str, str], None], loaded: Callable[[], registry.Registry]
) -> None:
    source, step, why = BROKEN[name]
    install_plugin(name, source)
    found = [f for f in loaded().failures if f.plugin == name]
    assert [f.step for f in found] == [step]
    assert why in found[0].reason
    assert torch.equal(call(), torch.ones(1, 1, 2, 4))
    assert commands.doctor
    told = CliRunner().invoke(app, ["doctor", "--json"])
    assert [f for f in json.loads(told.stdout)["failures"] if f["plugin"] == name and why in f["reason"]]
    for command in ("doctor", "plugins"):
        said = CliRunner().invoke(app, [command]).stdout
        assert name in said
        assert why in " ".join(said.split()), "as it is: no markup, nothing lost; it may wrap"


def test_a_plugin_beside_a_broken_one_loads_and_runs_by_force(
    install_plugin: Callable[[str, str], None], loaded: Callable[[], registry.Registry]
) -> None:
    install_plugin("aaa_broken", "raise RuntimeError('x')")
    install_plugin("mine", GOOD)
    entry = loaded().get("mine")
    assert (entry.plugin, entry.origin) == ("mine", "mine 1.0")
    with attnreg.use_backend("mine"):
        assert float(call().mean()) == 42


def test_an_unmeasured_third_party_backend_is_never_chosen_by_itself(
    install_plugin: Callable[[str, str], None], loaded: Callable[[], registry.Registry]
) -> None:
    install_plugin("mine", GOOD.replace("def supports", "def estimate(self, p, h): return 1e-12\n        def supports"))
    loaded()
    assert float(call().mean()) == 1
    x = torch.ones(1, 1, 2, 4)
    row = next(r for r in attnreg.explain(AttentionSpec(), x, x, x).rows() if r.backend == "mine")
    assert row.verdict == "able"
    assert "not measured" in row.why[0]


FAILS_LATER = {
    "version": (
        """seen = 0
        @property
        def version(self):
            Mine.seen += 1
            if Mine.seen > 1: raise RuntimeError('driver gone')
            return "1" """,
        "not measured here",
    ),
    "version_for": ("""version = "1"\n        def version_for(self, p, h): raise SystemExit(3)""", "not measured here"),
    "estimate": ("""version = "1"\n        def estimate(self, p, h): raise SystemExit(3)""", "not measured here"),
    "supports": (
        """version = "1"\n        def supports(self, p, h): raise SystemExit('no [gpu]')""",
        "SystemExit: no [gpu]",
    ),
}


@pytest.mark.parametrize("name", FAILS_LATER)
def test_a_backend_that_fails_when_it_is_asked_breaks_neither_calls_nor_commands(
    name: str, install_plugin: Callable[[str, str], None], loaded: Callable[[], registry.Registry]
) -> None:
    body, why = FAILS_LATER[name]
    source = GOOD.replace(NAMED, f'name = "mine"\n        {body}')
    if name == "supports":
        source = source.replace("def supports(self, problem", "def able(self, problem")
    install_plugin("fails_later", source)
    assert loaded().get("mine").version == "1"
    assert torch.equal(call(), torch.ones(1, 1, 2, 4))
    for command in (["doctor"], ["plugins"], ["explain", "--shape", "1x1x2x4"]):
        said = CliRunner().invoke(app, command)
        assert said.exit_code == 0, said.output
        assert "mine" in said.stdout
    assert why in " ".join(said.stdout.split())


FINDINGS = {
    "bracketed": (
        "attnreg.Finding('lib', False, 'none in [/usr/lib]', 'mylib[cuda] :x:')",
        "none in [/usr/lib] -> mylib[cuda] :x:",
    ),
    "wrong_types": (
        "attnreg.Finding(7, False, None, None)",
        "got Finding(subject=7, ok=False, detail=None, todo=None)",
    ),
    "ok_is_a_number": ("attnreg.Finding('lib', 0, 'none')", "expected Finding(subject: str, ok: bool"),
    "no_finding": ("'text'", "must give attnreg.Finding, got 'text'"),
    "exits": ("exit('no licence')", "SystemExit: no licence"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_a_plugin_finds_is_printed_as_it_is_or_named_as_no_finding(
    name: str, install_plugin: Callable[[str, str], None], loaded: Callable[[], registry.Registry]
) -> None:
    given, said = FINDINGS[name]
    fine = "attnreg.Finding('own', True, 'all is well')"
    install_plugin(name, f"import attnreg\n@attnreg.hookimpl\ndef attnreg_doctor(hardware): return [{fine}, {given}]")
    loaded()
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 0, told.output
    assert said in " ".join(told.stdout.split())
    assert name == "exits" or "all is well" in told.stdout, "one bad finding does not take the others with it"
    found = [
        f for f in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["findings"] if f["plugin"] == name
    ]
    assert not found[-1]["ok"]


@pytest.mark.parametrize(("said", "gone"), [("sdpa", "sdpa"), ("cpu, sdpa", "cpu")])
def test_block_leaves_out_by_name(said: str, gone: str) -> None:
    loaded = registry.load({"ATTNREG_BLOCK": said})
    assert gone not in loaded.entries
    with pytest.raises(errors.UnknownBackendError, match="ATTNREG_BLOCK"):
        loaded.get(gone)


def test_plugins_of_the_environment_are_loaded(install_plugin: Callable[[str, str], None]) -> None:
    install_plugin("mine", GOOD)
    loaded = registry.load({"ATTNREG_PLUGINS": "mine nowhere_to_be_found"})
    assert [f.plugin for f in loaded.failures if f.origin == "ATTNREG_PLUGINS"] == ["mine", "nowhere_to_be_found"]
    assert "mine" in loaded.entries, "first from its entry point; the second copy is the one set aside"


def test_import_loads_no_plugin_no_triton_no_optuna() -> None:
    code = "import sys, attnreg; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    names = ["attnreg_eager", "attnreg_sdpa", "attnreg_flex", "attnreg_cpu", "attnreg_triton", "triton", "optuna"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    assert sorted(attnreg.__all__) == attnreg.__all__
    for name in attnreg.__all__:
        assert getattr(attnreg, name) is not None
    assert callable(attnreg.tune)
    assert callable(attnreg.record)


def test_records_name_the_version_of_the_kernels_that_serve_them() -> None:
    class Paths:
        name, version = "paths", "all"

        def version_for(self, problem: Problem, hardware: Hardware) -> str:
            if problem.sq == 2:
                raise RuntimeError("broken")
            return f"path-{problem.sq == 1}"

    class Plain:
        name, version = "plain", "1"

    here = detect("cpu")
    loaded = registry.Registry({b.name: registry.Entry(b, "p", "here") for b in (Paths(), Plain())})  # type: ignore[arg-type]
    for sq, expected in ((1, "path-True"), (8, "path-False"), (2, "all")):
        assert loaded.versions(problem(sq=sq), here) == {"paths": expected, "plain": "1"}
