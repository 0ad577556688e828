"""Law: the decode kernels touch no memory that is not theirs, and are right on aarch64 with NEON."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivers import build_driver, run_driver
from test_cross import COMPILER, EMULATOR
from test_sanitised import SANITISERS, _sanitisers_link

from attnreg_cpu import build

DRIVER = Path(__file__).parent / "decode_driver.cpp"


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("march", ["native", "x86-64-v3", "x86-64"])
def test_decode_is_clean_under_sanitisers(march: str, tmp_path: Path) -> None:
    if march == "x86-64-v3" and not {"avx2", "fma"} <= set(build.cpu_identity().replace("'", " ").split()):
        pytest.skip("this CPU has no AVX2")
    if not _sanitisers_link(tmp_path):
        pytest.skip("the compiler has no sanitiser libraries")
    compiler = build.find_compiler() or ""
    run_driver(build_driver(compiler, tmp_path / "driver", *SANITISERS, f"-march={march}", source=DRIVER))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
@pytest.mark.parametrize("flags", [("-O3", "-march=armv8-a"), ("-O2", "-march=armv8.2-a+fp16")], ids=str)
def test_decode_is_right_on_aarch64(flags: tuple[str, ...], tmp_path: Path) -> None:
    program = build_driver(COMPILER or "", tmp_path / "driver", "-static", *flags, source=DRIVER)
    assert "4 lanes" in run_driver(EMULATOR or "", program)
