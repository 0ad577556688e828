"""The flash kernels compile for GPUs that are not here, in every form, with matrix instructions and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRODUCTS = {
    "forward_kernel": ("HMMA", "HGMMA", "v_mfma"),
    "backward_q_kernel": ("HMMA", "HGMMA", "v_mfma"),
    "backward_kv_kernel": ("HMMA", "HGMMA", "v_mfma"),
}


@pytest.mark.parametrize(
    "arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow), pytest.param("gfx942", marks=pytest.mark.slow)]
)
def test_every_form_compiles(arch: str) -> None:
    """Types and sizes of 1 that the interpreter does not mind are errors to the compiler: every form must pass it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_forms.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), arch],
        capture_output=True,
        text=True,
        env=environment,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"train", "window", "tail", "everything", "packed", "ones", "decode", "paged"} == {
        k["form"] for k in kernels
    }
    for kernel in kernels:
        if kernel["kernel"] in PRODUCTS:
            assert set(kernel["instructions"]) & set(PRODUCTS[kernel["kernel"]]), kernel
        assert kernel["spills"] == 0, kernel
