"""The compile-and-load layer: what a key depends on, who compiles, and what is said when that fails."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import stat
from pathlib import Path

import pytest

from attnreg import AttentionSpec, errors, hardware, masks
from attnreg.suites import attention_problem
from attnreg_cpu import build, params
from attnreg_cpu.doctor import findings
from attnreg_cpu.native import NativeBackend

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)


@needs_compiler
def test_a_second_build_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.build("selftest.cpp", {})
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.build("selftest.cpp", {}) == path
    assert path.parent == build.cache_dir()


@needs_compiler
def test_the_key_holds_macros_flags_architecture_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {
        build.library_path("selftest.cpp", {}),
        build.library_path("selftest.cpp", {"A": 1}),
        build.library_path("selftest.cpp", {"A": 2}),
        build.library_path("selftest.cpp", {}, ("-O1",)),
        build.library_path("forward.cpp", {}),
    }
    monkeypatch.setenv("ATTNREG_CPU_MARCH", "x86-64-v2")
    paths.add(build.library_path("selftest.cpp", {}))
    monkeypatch.setattr(build, "compiler_version", lambda _: "another compiler")
    paths.add(build.library_path("selftest.cpp", {}))
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    paths.add(build.library_path("selftest.cpp", {}))
    assert len(paths) == 8


def test_the_key_follows_every_included_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cpp").write_text('#include "b.h"\n')
    (tmp_path / "b.h").write_text('#include "c.h"\n')
    (tmp_path / "c.h").write_text("int one = 1;\n")
    (tmp_path / "unrelated.h").write_text("int two = 2;\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    digest = build.source_digest.__wrapped__
    before = digest("a.cpp")
    (tmp_path / "unrelated.h").write_text("int two = 3;\n")
    assert digest("a.cpp") == before
    (tmp_path / "c.h").write_text("int one = 2;\n")
    assert digest("a.cpp") != before


def _build_and_log(log: str) -> None:
    compile_ = build._compile

    def logged(command: list[str], target: Path) -> None:
        with open(log, "a") as lines:
            lines.write("compiled\n")
        compile_(command, target)

    build._compile = logged
    build.build("selftest.cpp", {})


@needs_compiler
def test_many_processes_compile_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_build_and_log, args=(str(log),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert log.read_text() == "compiled\n"
    assert not list(build.cache_dir().glob("*.tmp"))


@needs_compiler
def test_a_refused_source_says_what_the_compiler_said() -> None:
    with pytest.raises(errors.BackendError, match=r"failed with status \d+:\n"):
        build.build("forward.cpp", {"ATTNREG_HEAD_K": "nonsense"})
    assert not list(build.cache_dir().glob("*.so"))
    assert not list(build.cache_dir().glob("*.tmp"))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root writes anywhere, but not below a file
        (tmp_path / "cache").touch()
    else:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(errors.BackendError, match="cache"):
        build.build("selftest.cpp", {})


def test_without_a_compiler_everything_says_so(no_compiler: None) -> None:
    import torch

    from attnreg import AttentionSpec, Problem
    from attnreg.validate import check

    q = torch.zeros(1, 1, 100, 8)
    problem = Problem.of(AttentionSpec(), check(AttentionSpec(), q, q, q, {}), q, q, q, {})
    reasons = NativeBackend().supports(problem, hardware.detect("cpu"))
    assert any("compiler" in reason and "install" in reason for reason in reasons)
    with pytest.raises(errors.BackendError, match="install"):
        build.build("selftest.cpp", {})
    line = next(f for f in findings() if "compiler" in f.subject)
    assert not line.ok
    assert "install" in line.todo


@needs_compiler
def test_params_match_the_header() -> None:
    defines = {
        "ATTNREG_HEAD_K": 8, "ATTNREG_HEAD_V": 8, "ATTNREG_ELEMENT": "float", "ATTNREG_PAIRS": 0, "ATTNREG_VECTORS": 1
    }  # fmt: skip
    library = ctypes.CDLL(str(build.build("forward.cpp", defines)))
    library.attnreg_params_size.restype = ctypes.c_int64
    assert library.attnreg_params_size() == params.SIZE == 8 * len(params.FIELDS)
    assert [code for name, code in params.FIELDS if name in ("scale", "softcap")] == ["d", "d"]
    assert len({name for name, _ in params.FIELDS}) == len(params.FIELDS)


CAUSAL = AttentionSpec(mask=masks.Causal())
PATHS = {
    "decode": attention_problem(CAUSAL, (8, 2), 1, 512, 64),
    "forward": attention_problem(CAUSAL, (8, 2), 512, 512, 64),
    "backward": attention_problem(CAUSAL, (8, 2), 512, 512, 64, grad=True),
}


@pytest.mark.parametrize(("changed", "paths"), [
    ("decode_scores.h", {"decode"}),
    ("forward.h", {"forward", "backward"}),
    ("backward.h", {"backward"}),
    ("vmath.h", {"decode", "forward", "backward"}),
])  # fmt: skip
def test_a_changed_source_makes_records_of_its_own_path_stale(
    changed: str, paths: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, backend = hardware.detect("cpu"), NativeBackend()
    before = {path: backend.version_for(problem, here) for path, problem in PATHS.items()}
    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCE_DIR, copy)
    (copy / changed).write_text((copy / changed).read_text() + "\n// changed\n")
    monkeypatch.setattr(build, "SOURCE_DIR", copy)
    build.source_digest.cache_clear()
    try:
        after = {path: backend.version_for(problem, here) for path, problem in PATHS.items()}
        assert NativeBackend().version != backend.version
    finally:
        build.source_digest.cache_clear()
    assert {path for path in PATHS if before[path] != after[path]} == paths
