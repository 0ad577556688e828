"""Suites: every case makes inputs whose problem is the case itself, and some backend supports it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnreg import registry
from attnreg.errors import TuneError
from attnreg.hardware import detect
from attnreg.problem import Problem
from attnreg.suites import MODELS, SUITES, Case, model_shape, suite
from attnreg.testing import make_inputs

CASES = [case for name in SUITES for case in suite(name)]
CASES += [case for name in MODELS for case in model_shape(name)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_call_of_the_case_is_the_problem_that_it_names(case: Case) -> None:
    # Small lengths: dtypes, strides, tensors and classes are what must agree.
    p = case.problem
    small = replace(p, sq=1 if p.sq == 1 else 8, skv=8)
    assert make_inputs(small).problem == small


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_some_backend_runs_it_and_its_json_reads_back(case: Case) -> None:
    assert any(not e.backend.supports(case.problem, detect()) for e in registry.current().entries.values())
    assert Problem.from_json(case.problem.to_json()) == case.problem


def test_names_are_unique_and_unknown_ones_are_errors() -> None:
    for name in SUITES:
        names = [case.name for case in suite(name)]
        assert len(names) == len(set(names))
    with pytest.raises(TuneError, match="no suite is named 'nope'"):
        suite("nope")
    with pytest.raises(TuneError, match="no model shape is named"):
        model_shape("nope")
    assert {case.name for case in suite("all")} == {
        case.name for name in ("prefill", "decode", "sparse", "train") for case in suite(name)
    }
