"""decide: a record chooses only where it passed the gate, and what a plugin says wrongly refuses by that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from records_for_tests import problem, record

from attnreg import SearchSpace, registry, store
from attnreg.decide import Decision, decide
from attnreg.errors import ConfigError, UnsupportedError
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


class Odd:
    """A backend that takes every problem, and whose space is what it is told."""

    version = "1"

    def __init__(self, name: str, space: Any) -> None:
        self.name = name
        self._space = space

    def supports(self, problem: Any, hardware: Any) -> list[str]:
        return []

    def space(self, problem: Any, hardware: Any) -> Any:
        return self._space()

    def prepare(self, problem: Any, config: Any) -> Any:
        raise AssertionError("nobody should get this far")


def end() -> None:
    raise SystemExit(3)


def fail(config: Any = None) -> bool:
    raise KeyError("tile")


def unprintable() -> Any:
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    return Unprintable()


class Late(SearchSpace):
    """One whose constraint breaks only when it is asked."""

    def reasons(self, config: Any) -> list[str]:
        return [] if not config else [str(fail())]


JUNK = {
    "none": (lambda: None, "its space() must return a SearchSpace, got None"),
    "a list": (lambda: [1], "its space() must return a SearchSpace, got [1]"),
    "unprintable": (unprintable, "its space() must return a SearchSpace, got <Unprintable>"),
    "raises": (fail, "its space() raised KeyError: 'tile'"),
    "exits": (end, "its space() raised SystemExit: 3"),
    "no default": (
        lambda: SearchSpace({"tile": (1, 2)}, {"tile": 3}),
        "its space() raised ConfigError: SearchSpace: the",
    ),
    "constraint": (lambda: Late({}, {}), "its space() holds a constraint that raised KeyError: 'tile'"),
}


def odd(*backends: Odd) -> registry.Registry:
    loaded = registry.current().entries["eager"]
    made = {b.name: registry.Entry(b, "odd_plugin", "here") for b in backends}
    return registry.Registry({"eager": loaded, **made})


@pytest.mark.parametrize("junk", JUNK)
def test_a_forced_backend_without_a_usable_space_is_named_with_what_it_gave(here: Store, junk: str) -> None:
    space, said = JUNK[junk]
    with registry.using(odd(Odd("odd", space))):
        with pytest.raises(UnsupportedError) as caught:
            decide(problem(), HERE, forced="odd", config={"x": 1} if junk == "constraint" else None)
        assert "backend 'odd' was asked for" in str(caught.value)
        [why] = caught.value.reasons["odd"]
        assert why.startswith(said)


def test_a_configuration_outside_of_a_usable_space_stays_the_callers_error(here: Store) -> None:
    with registry.using(odd(Odd("odd", SearchSpace))), pytest.raises(ConfigError, match="expected the names"):
        decide(problem(), HERE, forced="odd", config={"x": 1})


def test_a_backend_without_a_usable_space_is_passed_over(here: Store) -> None:
    class Guessing(Odd):
        def estimate(self, problem: Any, hardware: Any) -> float:
            return 1e-6

    with registry.using(odd(Guessing("cpu", fail), Odd("sdpa", lambda: None))):
        made = decide(problem(), HERE)
        assert made.backend == "eager"
        refused = {c.name: c.reasons for c in made.candidates if c.reasons}
        assert refused == {
            "cpu": ("its space() raised KeyError: 'tile'",),
            "sdpa": ("its space() must return a SearchSpace, got None",),
        }
