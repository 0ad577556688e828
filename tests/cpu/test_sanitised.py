"""Law: the kernels touch no memory that is not theirs and do nothing that C++ leaves undefined.

Every tensor of the driver is a heap block of exactly its size, so AddressSanitizer sees a single element too many.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from drivers import build_driver, chosen_code, run_driver

from attnreg_cpu import build


def _checks_by_calls() -> tuple[str, ...]:
    """Checks of addresses are calls: written out at every access, they take the compiler half as long again."""
    compiler = build.find_compiler()
    option = "asan-instrumentation-with-call-threshold=0"
    by_clang = compiler is not None and "clang" in build.compiler_version(compiler)
    return ("-mllvm", f"-{option}") if by_clang else ("--param", option)


SANITISERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *_checks_by_calls())


def _sanitisers_link(tmp_path: Path) -> bool:
    import subprocess

    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [build.find_compiler() or "", *SANITISERS, str(probe), "-o", str(tmp_path / "probe")]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
def test_kernels_are_clean_under_sanitisers(tmp_path: Path) -> None:
    """Those of this CPU, and of AVX2 where they are other code and the CPU has it."""
    if not _sanitisers_link(tmp_path):
        pytest.skip("the compiler has no sanitiser libraries")
    compiler = build.find_compiler() or ""
    avx2 = {"avx2", "fma"} <= set(build.cpu_identity().replace("'", " ").split())
    codes = {chosen_code(compiler, *SANITISERS, f"-march={m}"): m for m in ("x86-64-v3", "native")[not avx2 :]}
    assert "native" in codes.values()
    for march in codes.values():
        run_driver(build_driver(compiler, tmp_path / march, *SANITISERS, f"-march={march}"))
