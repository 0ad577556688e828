"""Law: a compiler that answers --version and builds nothing is started once a process, and named; calls go on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conditions import started

from attnreg import errors
from attnreg_cpu import build, toolchain
from attnreg_cpu.doctor import findings

REAL = build.find_compiler() or ""
pytestmark = pytest.mark.skipif(not REAL, reason="needs a C++ compiler")

# What the script does when it is asked to compile, and what is said of it.
BROKEN = {
    "no headers": ("echo 'fatal error: cmath: No such file or directory' >&2; exit 1", "No such file or directory"),
    "no linker": ("echo 'collect2: fatal error: cannot find ld' >&2; exit 1", "cannot find ld"),
    "it crashes": ("kill -SEGV $$", "status -11"),
    "it makes nothing": ("exit 0", "made no file"),
    "it makes no library": ('for made; do :; done; echo junk > "$made"; exit 0', "cannot be loaded"),
    "it hangs": ("sleep 60", "took over"),
}


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Makes a compiler that does so, and puts it in force; gives the file in which its starts are counted."""
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "TRIAL_TIMEOUT", 1.0)

    def make(does: str) -> Path:
        script, log = tmp_path / "compiler", tmp_path / "log"
        log.touch()
        script.write_text(
            f'#!/bin/sh\ncase "$1" in --version|-dumpmachine) exec {shlex.quote(REAL)} "$@";; esac\n'
            f"echo started >> {shlex.quote(str(log))}\n{does}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        build.find_compiler.cache_clear()
        return log

    yield make
    monkeypatch.undo()
    build.find_compiler.cache_clear()


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_compiler_is_started_once_and_named(what: str, compiler: Callable[[str], Path]) -> None:
    does, said = BROKEN[what]
    log = compiler(does)
    for defines in ({}, {"A": 1}, {"A": 2}):
        with pytest.raises(errors.BackendError) as caught:
            build.build("selftest.cpp", defines)
        assert said in str(caught.value)
    finding = next(f for f in findings() if f.subject == "cpu: compiler")
    assert (finding.ok, said in finding.detail, bool(finding.todo)) == (False, True, True)
    assert said in build.lacking()
    assert log.read_text() == "started\n"


def test_what_the_system_lacks_is_no_fault_of_the_compiler(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    gone = tmp_path / "room"
    compiler(f'if [ -e {gone} ]; then exec {REAL} "$@"; fi; echo "cannot write: No space left on device" >&2; exit 1')
    with pytest.raises(errors.BackendError, match="No space left on device") as caught:
        build.build("selftest.cpp", {})
    assert isinstance(caught.value.__cause__, OSError)
    assert build.lacking() == ""
    gone.touch()
    assert build.build("selftest.cpp", {}).is_file()


def test_a_source_that_is_refused_is_no_fault_of_the_compiler(compiler: Callable[[str], Path]) -> None:
    log = compiler(f'exec {REAL} "$@"')
    with pytest.raises(errors.BackendError, match="failed with status"):
        build.build("forward.cpp", {"ATTNREG_HEAD_K": "nonsense"})
    assert build.lacking() == ""
    build.build("selftest.cpp", {})
    assert log.read_text() == "started\n" * 3, "the trial and two kernels"


def test_doctor_builds_and_loads_a_kernel(compiler: Callable[[str], Path]) -> None:
    log = compiler(f'exec {REAL} "$@"')
    finding = next(f for f in findings() if f.subject == "cpu: compiler")
    assert finding.ok
    assert "builds and loads a kernel" in finding.detail
    assert log.read_text() == "started\n"


CALLS = """
import torch, attnreg
from attnreg import AttentionSpec, masks
spec = AttentionSpec(mask=masks.Causal())
said["chosen"], said["right"] = [], []
for size, d in ((1, 16), (70, 16), (70, 24), (300, 24)):
    q, k = torch.randn(1, 2, size, d), torch.randn(1, 2, 300, d)
    out = attnreg.attention(spec, q, k, k)
    said["chosen"].append(attnreg.explain(spec, q, k, k).backend)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, torch.ones(size, 300).tril(300 - size).bool())
    said["right"].append(torch.allclose(out, want, atol=1e-5))
"""


def test_calls_go_on_with_the_next_backend_and_one_warning(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    log = compiler(BROKEN["no headers"][0])
    ran = started(CALLS, CXX=str(tmp_path / "compiler"), ATTNREG_CACHE_DIR=str(tmp_path / "cache"), HOME=str(tmp_path))
    assert ran.said["right"] == [True] * 4
    assert "cpu" not in ran.said["chosen"]
    assert len(ran.warned) == 1, ran.warned
    assert "cannot build and load a one-line kernel" in ran.warned[0]
    assert log.read_text() == "started\n"
