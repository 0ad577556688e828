"""decide: a record chooses only where it passed the gate, and what a plugin says wrongly refuses by that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from records_for_tests import problem, record

from attnreg import registry, store
from attnreg.decide import Decision, decide
from attnreg.hardware import detect
from attnreg.records import Gate, Policy, Record, hardware_facts
from attnreg.store import Store

HERE = detect()


@pytest.fixture
def here(tmp_path: Any) -> Any:
    with store.using(Store(tmp_path, None)) as own:
        yield own


def mine(**changes: Any) -> Record:
    """A fresh record of this machine that chooses eager, which nothing but a record puts first."""
    version = registry.current().get("eager").backend.version
    base = record(backend="eager", version=version, config={}, hardware=hardware_facts(HERE), runner_up=None)
    return replace(base, problem=problem(sq=128, skv=128), policy=Policy(threads=torch.get_num_threads()), **changes)


def note_of(made: Decision, name: str) -> str:
    return next(c.note for c in made.candidates if c.name == name)


def test_a_record_that_passed_decides(here: Store) -> None:
    here.add(mine())
    made = decide(problem(sq=128, skv=128), HERE)
    assert (made.backend, made.source) == ("eager", "user record")


@pytest.mark.parametrize("gate", [None, Gate(5.0, 1e-6), Gate(1e-7, 1e-6, 5.0, 1e-5)])
def test_a_record_that_did_not_pass_the_gate_does_not(here: Store, gate: Gate | None) -> None:
    here.add(mine(gate=gate))
    for size in (128, 256):  # exact, and as a neighbour
        made = decide(problem(sq=size, skv=size), HERE)
        assert not made.source.endswith("record")
        assert made.backend != "eager"
        assert "record did not pass the gate" in note_of(made, "eager")
    forced = decide(problem(sq=128, skv=128), HERE, forced="eager")
    assert "default configuration" in forced.why
