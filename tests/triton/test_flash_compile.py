"""The kernels compile for GPUs that are not here, in every form, with matrix instructions and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PRODUCTS = {
    "forward_kernel": ("HMMA", "HGMMA", "v_mfma"),
    "backward_q_kernel": ("HMMA", "HGMMA", "v_mfma"),
    "backward_kv_kernel": ("HMMA", "HGMMA", "v_mfma"),
}


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What compile_forms prints, a kernel each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_forms.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow), pytest.param("gfx942", marks=pytest.mark.slow)]
)
def test_every_form_compiles(arch: str) -> None:
    """Types and sizes of 1 that the interpreter does not mind are errors to the compiler: every form must pass it."""
    kernels = compiled(arch)
    names = {"train", "window", "tail", "everything", "one bias of all keys", "packed", "ones", "decode", "paged"}
    assert {kernel["form"] for kernel in kernels} == names
    for kernel in kernels:
        if kernel["kernel"] in PRODUCTS:
            assert set(kernel["instructions"]) & set(PRODUCTS[kernel["kernel"]]), kernel
        assert kernel["spills"] == 0, kernel


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_defaults_of_odd_heads_do_not_spill(arch: str) -> None:
    """What would take registers beside large tiles gets small ones."""
    kernels = compiled(arch, "odd")
    flash, blocks = {f"flash D{n}" for n in (72, 96, 160, 200)}, {f"blocks D{n}" for n in ("72", "80", "16/80")}
    assert {kernel["form"] for kernel in kernels} == {*flash, *blocks, "decode D100"}
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel


def test_stored_float8_of_every_head_compiles() -> None:
    """Where a head, its tail or a tile of keys is too narrow for an 8-bit product, values are widened instead."""
    kernels = compiled("sm_90", "fp8")
    names = ("D64", "D16", "D80", "D144", "8 keys")
    assert {kernel["form"] for kernel in kernels} == {f"stored {name}" for name in names}
    for kernel in kernels:
        words = {"QGMMA"} if kernel["form"] == "stored D64" else {"HGMMA", "HMMA"}
        assert kernel["instructions"], kernel
        assert kernel["instructions"].keys() <= words, kernel
        assert kernel["spills"] == 0, kernel
