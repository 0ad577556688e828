"""Law: for every target the kernels' defaults and seeds compile, fit, and hold its matrix instructions.

Compiling runs in processes of its own, so the interpreter of these tests does not matter. docs/targets.md holds the
whole table; the slow test makes it anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from attnreg.targets import TARGETS
from attnreg.tuning.compilers import Compilers
from attnreg.tuning.published import PUBLISHED, standing
from attnreg.tuning.survey import FORMS, Form, Row, survey

DOCUMENT = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
MATRIX = {
    "sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA",
    "gfx90a": "v_mfma", "gfx942": "v_mfma", "gfx950": "v_mfma", "gfx1100": "v_wmma",
}  # fmt: skip
EIGHT = {"sm_90": "QGMMA", "sm_100": "UTCQMMA"}


def forms(*names: str) -> list[Form]:
    found = [form for form in FORMS if form.name in names]
    assert len(found) == len(names)
    return found


def compiled(targets: list[str], names: list[str], seeds: bool = False) -> list[Row]:
    with Compilers(os.cpu_count() or 1) as compilers:
        return survey(targets, compilers, forms=forms(*names), seeds=seeds)


def well(row: Row, mnemonic: str) -> None:
    assert row.report is not None, row.status
    assert row.status == "ok", (row.target, row.form.name, row.status)
    assert row.report.spills == 0
    assert row.report.shared <= TARGETS[row.target].shared_memory
    assert row.report.registers > 0
    assert row.report.seconds is not None
    assert row.report.seconds > 0
    assert row.report.instructions.get(mnemonic, 0) > 0, (row.target, row.form.name, row.report.instructions)


def test_every_target_compiles_the_forward_kernel_with_its_matrix_instructions() -> None:
    """The default for heads of 128 in bfloat16, on all ten targets."""
    rows = compiled(list(TARGETS), ["flash forward D128 bf16"])
    assert {row.target for row in rows} == set(TARGETS) == set(MATRIX)
    for row in rows:
        well(row, MATRIX[row.target])


def test_backward_and_decoding_compile_without_spills() -> None:
    for row in compiled(["sm_80", "sm_90", "gfx942"], ["flash training D64 bf16", "decode D128 bf16"]):
        # A tile of 16 rows is too small for a warp group: decoding multiplies by the older instruction on Hopper.
        well(row, "HMMA" if row.form.name.startswith("decode") and row.target == "sm_90" else MATRIX[row.target])


def test_eight_bit_products_use_eight_bit_instructions() -> None:
    for row in compiled(list(EIGHT), ["fp8 forward D64 e4m3"]):
        well(row, EIGHT[row.target])
    [old] = compiled(["sm_80"], ["fp8 forward D64 e4m3"])
    assert old.report is None
    assert "needs sm_89" in old.status


def table() -> list[list[str]]:
    """Rows of the document's compiled table: [target, kernels, configuration, ..., status]."""
    out, target = [], ""
    for line in DOCUMENT.splitlines():
        if line.startswith("### "):
            target = line.removeprefix("### ").strip()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and target in TARGETS and len(cells) == 8 and cells[0] not in ("kernels", "---"):
            out.append([target, *cells])
    return out


def test_the_document_holds_every_target_and_form_and_its_rows_are_well() -> None:
    rows = table()
    assert {(row[0], re.sub(r", (default|seed \d+)$", "", row[1])) for row in rows} == {
        (target, form.name) for target in TARGETS for form in FORMS
    }
    for target, name, _, _, spills, _, _, matrix, status in rows:
        if status.startswith("not supported"):
            continue
        if target != "gfx1100":  # the document says what spills there
            assert (spills, status) == ("0", "ok"), (target, name, status)
        if status == "ok" and "fp32" not in name and not name.startswith("fp8"):
            assert matrix, (target, name)


def test_published_choices_stand_high_in_the_modelled_space() -> None:
    """The model is not fitted to them; the document prints the same numbers."""
    for choice in PUBLISHED:
        found = standing(choice)
        assert found.points > 200
        assert found.percentile >= 85, (choice, found)
        line = f"| {choice.target} | {choice.dtype} | {choice.tile} | {found.place} of {found.points} |"
        assert line in DOCUMENT, "run: attnreg targets --published --markdown"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_table_is_what_the_document_says(target: str) -> None:
    with Compilers(os.cpu_count() or 1) as compilers:
        rows = survey([target], compilers)
    wanted = {row[1]: (row[3], row[4], row[5], row[8]) for row in table() if row[0] == target}
    for row in rows:
        key = row.form.name if row.report is None else f"{row.form.name}, {row.which}"
        said = wanted[key]
        if row.report is not None:
            report = row.report
            assert said[:3] == (str(report.registers), str(report.spills), str(report.shared)), (target, key)
        assert said[3] == row.status
