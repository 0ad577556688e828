"""Law: the kernels touch no memory that is not theirs and do nothing that C++ leaves undefined.

Every tensor of the driver is a heap block of exactly its size, so AddressSanitizer sees a single element too many.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from drivers import build_driver, run_driver

from attnreg_cpu import build

SANITISERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def _sanitisers_link(tmp_path: Path) -> bool:
    import subprocess

    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [build.find_compiler() or "", *SANITISERS, str(probe), "-o", str(tmp_path / "probe")]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("march", ["native", "x86-64-v3"])
def test_kernels_are_clean_under_sanitisers(march: str, tmp_path: Path) -> None:
    if march != "native" and not {"avx2", "fma"} <= set(build.cpu_identity().replace("'", " ").split()):
        pytest.skip("this CPU has no AVX2")
    if not _sanitisers_link(tmp_path):
        pytest.skip("the compiler has no sanitiser libraries")
    program = build_driver(build.find_compiler() or "", tmp_path / "driver", *SANITISERS, f"-march={march}")
    run_driver(program)
