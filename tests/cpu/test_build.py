"""The compile-and-load layer: what a key depends on, who compiles, and what is said when that fails."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnreg import AttentionSpec, errors, hardware, masks
from attnreg.suites import attention_problem
from attnreg_cpu import build, library_files, params, product
from attnreg_cpu.doctor import findings
from attnreg_cpu.native import NativeBackend
from attnreg_cpu.variant import Variant, load_kernel, variants_of

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
    assert path.parent == library_files.cache_dir()


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
    monkeypatch.setattr(build, "compiler_version", lambda *_: "another compiler")
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


SOURCE = '#include "b.h"\nconst char* text = "// no comment /* none */";\nint two = 2;\n'
SAME_CODE = {
    "a comment": {"a.cpp": "// said\n" + SOURCE},
    "a comment behind code": {"a.cpp": SOURCE.replace("int two", "int /* small */ two") + "/* two\nlines */\n"},
    "blank lines and indentation": {"a.cpp": SOURCE.replace("int two = 2;", "\n\n\tint  two = 2;  ")},
    "a comment in a header": {"b.h": "#pragma once\n// one\nint one = 1;  // is one\n"},
    "a renamed header": {"a.cpp": SOURCE.replace("b.h", "c.h"), "c.h": "#pragma once\nint one = 1;\n"},
    "a header that was there already": {"a.cpp": SOURCE.replace("int two", '#include "b.h"\nint two')},
    "an include in a comment": {"a.cpp": '// #include "missing.h"\n' + SOURCE},
}
OTHER_CODE = {
    "a number": {"a.cpp": SOURCE.replace("= 2", "= 3")},
    "a number in a header": {"b.h": "#pragma once\nint one = 2;\n"},
    "a string": {"a.cpp": SOURCE.replace("no comment", "a comment")},
    "two words joined": {"a.cpp": SOURCE.replace("int two", "inttwo")},
    "an order": {"a.cpp": 'int two = 2;\n#include "b.h"\nconst char* text = "// no comment /* none */";\n'},
}


@pytest.mark.parametrize(("changes", "same"), [
    *(pytest.param(changes, True, id=name) for name, changes in SAME_CODE.items()),
    *(pytest.param(changes, False, id=name) for name, changes in OTHER_CODE.items()),
])  # fmt: skip
def test_the_digest_is_of_the_code_alone(
    changes: dict[str, str], same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    digest = build.source_digest.__wrapped__
    for name, text in {"a.cpp": SOURCE, "b.h": "#pragma once\nint one = 1;\n"}.items():
        (tmp_path / name).write_text(text)
    before = digest("a.cpp")
    for name, text in changes.items():
        (tmp_path / name).write_text(text)
    assert (digest("a.cpp") == before) is same


@pytest.mark.parametrize("source", ["forward.cpp", "backward.cpp", "decode.cpp", "selftest.cpp"])
def test_a_comment_in_a_kernel_makes_no_record_stale(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = build.source_digest.__wrapped__
    before, copy = digest(source), tmp_path / "csrc"
    shutil.copytree(build.SOURCE_DIR, copy)
    for path in copy.iterdir():
        path.write_text(f"// said\n{path.read_text()}\n/* and\nsaid */\n")
    monkeypatch.setattr(build, "SOURCE_DIR", copy)
    assert digest(source) == before


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
    assert not list(library_files.cache_dir().glob("*.tmp"))


@needs_compiler
def test_a_refused_source_says_what_the_compiler_said() -> None:
    with pytest.raises(errors.BackendError, match=r"failed with status \d+:\n"):
        build.build("forward.cpp", {"ATTNREG_HEAD_K": "nonsense"})
    assert not list(library_files.cache_dir().glob("*.so"))
    assert not list(library_files.cache_dir().glob("*.tmp"))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if os.geteuid() == 0:  # root writes anywhere, but not below a file
        (tmp_path / "cache").touch()
    else:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path}/cache"):
        path = build.build("selftest.cpp", {})
    assert tmp_path / f"attnreg-{os.geteuid()}" in path.parents
    line = next(f for f in findings() if "cache" in f.subject)
    assert (line.ok, f"{tmp_path}/cache" in line.detail, "ATTNREG_CACHE_DIR" in line.todo) == (False, True, True)


@needs_compiler
def test_what_was_built_can_be_read_by_all_whom_the_umask_lets() -> None:
    before = os.umask(0o022)
    try:
        path = build.build("selftest.cpp", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


@needs_compiler
def test_a_damaged_library_is_named_and_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one that was cut short would kill the process."""
    path = build.build("selftest.cpp", {})
    whole = path.read_bytes()
    compiled: list[Path] = []

    def compile_(command: list[str], target: Path) -> None:
        compiled.append(target)
        target.write_bytes(whole)

    monkeypatch.setattr(build, "_compile", compile_)
    for damaged in (b"", whole[:100], whole[:-100], bytes(len(whole)), whole[:100] + b"?" + whole[101:]):
        path.write_bytes(damaged)
        line = next(f for f in findings() if "cache" in f.subject)
        assert (line.ok, path.name in line.detail, "delete" in line.todo) == (False, True, True)
        compiled.clear()
        assert build.build("selftest.cpp", {}) == path
        assert compiled == [path]
        assert next(f for f in findings() if "cache" in f.subject).ok
    build.load(path)


def test_a_child_forked_during_a_compile_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with library_files.locked(lock):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with open(lock, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.fixture
def cxx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets CXX, which is read once a process."""

    def set_to(named: str) -> None:
        monkeypatch.setenv("CXX", named)
        build.find_compiler.cache_clear()

    yield set_to
    monkeypatch.undo()
    build.find_compiler.cache_clear()


@needs_compiler
@pytest.mark.parametrize(("form", "arguments"), [(" {}", []), ("{} -DOWN=1", ["-DOWN=1"]), ("env {}", None)])
def test_cxx_may_hold_arguments(form: str, arguments: list[str] | None, cxx: Any) -> None:
    compiler = build.find_compiler() or ""
    plain, version = build.library_path("selftest.cpp", {}), build.compiler_version(compiler)
    cxx(form.format(compiler))
    words = [compiler, *arguments] if arguments is not None else [shutil.which("env"), compiler]
    path, command = build._plan("selftest.cpp", {}, ())
    assert (build.find_compiler(), command[: len(words)]) == (words[0], words)
    assert build.compiler_version(*words) == version
    assert (path == plain) == (words == [compiler])


@pytest.mark.parametrize("named", ["no-such-compiler -m64", "g++ 'open"])
def test_a_named_compiler_that_is_not_there_is_said(named: str, cxx: Any) -> None:
    cxx(named)
    assert build.find_compiler() is None
    said = [next(f for f in findings() if "compiler" in f.subject).detail, *_reasons(PATHS["decode"])]
    with pytest.raises(errors.BackendError) as caught:
        build.build("selftest.cpp", {})
    assert all(repr(named) in text for text in [*said, str(caught.value)])


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


def test_doctor_says_whether_the_system_grants_tile_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "on_this_cpu", lambda: True)
    for refused in (True, False):
        monkeypatch.setattr(product, "refused", lambda refused=refused: refused)
        line = next(f for f in findings() if "AMX" in f.subject)
        assert line.ok != refused
        assert bool(line.todo) == refused
    monkeypatch.setattr(product, "on_this_cpu", lambda: False)
    assert not any("AMX" in f.subject for f in findings())


def test_a_refused_tile_register_is_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = replace(hardware.detect("cpu"), arch="amx", isa=("avx512f", "avx512_bf16", "amx_tile", "amx_bf16"))
    monkeypatch.setattr(product, "refused", lambda: False)
    assert product.products_of("bfloat16", tiled) == ["amx", "dot", "fma"]
    assert product.products_of("float32", tiled) == ["fma", "amx_bf16x3"]
    monkeypatch.setattr(product, "refused", lambda: True)
    assert product.products_of("bfloat16", tiled) == ["dot", "fma"]
    assert product.products_of("float32", tiled) == ["fma"]
    kernel = Variant("forward.cpp", 64, 64, "bfloat16", 4, "amx")
    with pytest.raises(errors.BackendError, match="AMX"):
        load_kernel.__wrapped__(kernel, "attnreg_forward")


def test_parts_are_ready_where_what_takes_infinity_is() -> None:
    kernels = variants_of(PATHS["forward"], 2, "amx_bf16x3")
    assert [(kernel.source, kernel.product) for kernel in kernels] == [
        ("forward.cpp", "amx_bf16x3"),
        ("forward.cpp", "fma"),
    ]


@needs_compiler
def test_params_match_the_header() -> None:
    defines = {
        "ATTNREG_HEAD_K": 8, "ATTNREG_HEAD_V": 8, "ATTNREG_ELEMENT": "float", "ATTNREG_PRODUCT": 0,
        "ATTNREG_VECTORS": 1, "ATTNREG_ADDITIVE": 0,
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


def _reasons(problem: Any) -> list[str]:
    return NativeBackend().supports(problem, hardware.detect("cpu"))


def _built_elsewhere(source: str, defines: Any, made_by: str = "0" * 8) -> Path:
    """A library as another machine's compiler would have left it; nothing here loads it."""
    path = library_files.path_of(source, build.library_key(source, defines), made_by)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"code")
    library_files.seal(path)
    return path


def _variant(source: str, vectors: int) -> tuple[str, dict[str, int | str]]:
    return source, Variant(source, 64, 64, PATHS["forward"].dtype, vectors).defines()


def test_without_a_compiler_what_lies_ready_is_used(no_compiler: None) -> None:
    here, backend = hardware.detect("cpu"), NativeBackend()
    decode = ("decode.cpp", {"ATTNREG_CACHE": "float"})
    for path, wanted in (("decode", [decode]), ("forward", [_variant("forward.cpp", 3)]),
                         ("backward", [_variant("backward.cpp", 3)])):  # fmt: skip
        (reason,) = _reasons(PATHS[path])
        assert all(word in reason for word in ("compiler", path, "`attnreg build", str(library_files.cache_dir())))
        made = [_built_elsewhere(*one) for one in wanted]
        assert _reasons(PATHS[path]) == []
        assert [build.build(*one) for one in wanted] == made
    # Not of this size, dtype or kind of cache.
    for other in (
        attention_problem(CAUSAL, (8, 2), 512, 512, 32),
        replace(PATHS["forward"], dtype="float16", kv_dtype="float16"),
        replace(PATHS["decode"], kv_dtype="int8"),
    ):
        assert len(_reasons(other)) == 1
    assert backend.space(PATHS["forward"], here).choices["vectors"] == (3,)
    _built_elsewhere(*_variant("forward.cpp", 4))
    space = backend.space(PATHS["forward"], here)
    assert (space.choices["vectors"], space.default["vectors"]) == ((3, 4), 3)
    assert backend.space(PATHS["backward"], here).choices["vectors"] == (3,)
    few = attention_problem(CAUSAL, (1, 1), 2, 512, 64, grad=True)
    assert backend.space(few, here).choices["vectors"] == (3,), "a tile wider than the rows, as none narrower is there"


def test_without_a_compiler_the_newest_whole_library_serves(no_compiler: None) -> None:
    old, new, damaged = (_built_elsewhere("selftest.cpp", {}, digit * 8) for digit in "abc")
    for age, path in enumerate((damaged, new, old)):
        os.utime(path, (1000 - age, 1000 - age))
    damaged.write_bytes(b"co")
    os.utime(damaged, (1000, 1000))
    assert build.build("selftest.cpp", {}) == new
    new.unlink()
    old.unlink()
    with pytest.raises(errors.BackendError, match=f"{damaged.name} is damaged.*delete it"):
        build.build("selftest.cpp", {})


def test_a_damaged_library_that_no_compiler_can_mend_is_named(no_compiler: None) -> None:
    path = _built_elsewhere(*_variant("forward.cpp", 2))
    path.write_bytes(b"")
    (reason,) = _reasons(PATHS["forward"])
    assert path.name in reason
    line = next(f for f in findings() if "cache" in f.subject)
    assert (line.ok, path.name in line.detail, "`attnreg build`" in line.todo) == (False, True, True)


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
    (copy / changed).write_text((copy / changed).read_text() + "\nstruct Changed {};\n")
    monkeypatch.setattr(build, "SOURCE_DIR", copy)
    build.source_digest.cache_clear()
    try:
        after = {path: backend.version_for(problem, here) for path, problem in PATHS.items()}
        assert NativeBackend().version != backend.version
    finally:
        build.source_digest.cache_clear()
    assert {path for path in PATHS if before[path] != after[path]} == paths
