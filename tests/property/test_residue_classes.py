"""Law: any size is computed right: those drawn by hypothesis, and (slow, nightly) the product of residues."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg import Backend
from attnreg.hardware import detect
from attnreg.testing import check_inputs, make_inputs
from attnreg.testing.residues import CLASSES, Row, residue_problem, residue_rows
from attnreg_cpu import attnreg_backends as cpu_backends
from attnreg_eager import attnreg_backends as eager_backends
from attnreg_sdpa import attnreg_backends as sdpa_backends

BACKENDS = {b.name: b for b in (*eager_backends(), *sdpa_backends(), *cpu_backends()) if b.name != "eager_fp8"}

ROWS = st.fixed_dictionaries(
    {
        "skv": st.integers(1, 130), "head_dim": st.integers(1, 80), "sq": st.integers(1, 70),
        "group": st.integers(1, 9), "page_size": st.none() | st.integers(1, 70), "batch": st.integers(1, 4),
        "dtype": st.sampled_from(CLASSES["dtype"]), "mask": st.sampled_from(CLASSES["mask"]),
    }
)  # fmt: skip


def _check(backend: Backend, row: Row, grads: bool) -> None:
    inputs = make_inputs(residue_problem(row, frozenset({"q", "k", "v"} if grads else ())))
    bucket = inputs.problem.bucket()
    if backend.supports(bucket, detect()):
        return
    config = backend.space(bucket, detect()).default
    result = check_inputs(backend.prepare(bucket, config), inputs, poison=False)
    assert result.ok, f"{result.reason}; {inputs}"


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(row=ROWS, grads=st.booleans())
def test_sizes_that_nobody_chose(name: str, row: Row, grads: bool) -> None:
    _check(BACKENDS[name], row, grads)


@pytest.mark.slow
@pytest.mark.parametrize("dim", CLASSES["head_dim"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_product_of_residues(name: str, dim: int) -> None:
    """Every number of keys modulo 64, by head dimension and dtype, forward and backward."""
    for row in residue_rows(slow=True):
        if row["head_dim"] == dim:
            _check(BACKENDS[name], row, grads=True)
