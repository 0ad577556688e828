"""Law: the shipped static records decide on the cards they are for, and name no configuration that spills."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from attnreg import Hardware, db, registry, store
from attnreg.decide import decide
from attnreg.hardware import detect
from attnreg.measure import Candidate
from attnreg.records import Record
from attnreg.store import Store
from attnreg.suites import suite
from attnreg.targets import target
from attnreg.tuning.compilers import Compilers, Job

SHIPPED = Path(__file__).parents[2] / "tuning_db"
CARDS = {
    "sm_80": "NVIDIA A100-SXM4-80GB",
    "sm_90": "NVIDIA H100 80GB HBM3",
    "sm_100": "NVIDIA B200",
    "gfx942": "AMD Instinct MI300X",
}
MATRIX = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA"), "gfx942": ("v_mfma",)}


def card(name: str) -> Hardware:
    """The target as torch would describe the card itself: a model's name, and no rates."""
    return replace(target(name), model=CARDS[name], rates=(), bandwidth=0.0)


def records(name: str) -> list[Record]:
    found, broken = db.load(SHIPPED / name.replace("_", "-"))
    assert broken == []
    return found


@pytest.mark.parametrize("name", CARDS)
def test_every_shape_of_the_suite_has_a_record_that_decides(name: str) -> None:
    with store.using(Store(None, SHIPPED)):
        for case in suite("models", "cuda"):
            made = decide(case.problem, card(name))
            assert made.source == "static record", (case.name, made.source, made.why)
            assert made.match is not None
            assert made.match.distance == 0
            assert "nothing was measured" in made.why
            space = registry.current().get(made.backend).backend.space(case.problem, card(name))
            assert space.reasons(dict(made.config)) == []


@pytest.mark.parametrize("name", CARDS)
def test_records_say_what_their_binaries_hold(name: str) -> None:
    for record in records(name):
        assert record.origin == "static"
        assert record.times is None
        assert record.static.get("spills", 0) == 0
        assert record.static["registers"] > 0
        assert record.static.get("shared", 0) <= target(name).shared_memory
        assert record.static["seconds"] > 0
        assert any(word in record.static["instructions"] for word in MATRIX[name]), record.static
        assert record.version == registry.current().versions(record.problem, target(name))[record.backend]


def test_the_shipped_database_is_well() -> None:
    assert [b for b in db.check(SHIPPED, detect()) if any(n.replace("_", "-") in b.where for n in CARDS)] == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", CARDS)
def test_no_configuration_of_a_record_spills(name: str) -> None:
    """Compiles every record's choice anew; the worker refuses what spills."""
    waiting = [Job(r.problem, Candidate(r.backend, dict(r.config)), name) for r in records(name)]
    refused: list[tuple[str, str]] = []
    with Compilers(os.cpu_count() or 1) as compilers:
        compilers.run(
            lambda: waiting.pop() if waiting else None,
            lambda job, report: refused.append((str(job.candidate), report.refused)) if report.refused else None,
        )
    assert refused == []
