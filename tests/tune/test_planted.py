"""Planted bad backends, loaded as a third-party plugin: none is chosen, none ends the run, each is named."""

from __future__ import annotations

import re

import pytest

from attnreg import AttentionSpec, masks, registry
from attnreg.store import Store
from attnreg.suites import attention_problem
from attnreg.tuning import Options, tune_problem

pytestmark = pytest.mark.alone

# Backend -> (kind, what its reason must say).
WANTED = {
    "planted_wrong": ("gate", r"error .* is above the bound"),
    "planted_no_gradient": ("gate", r"grad of [qkv]: error"),
    "planted_dense_gradient": ("gate", r"grad of [qkv]: error"),
    "planted_remembers": ("gate", r"error .* is above the bound"),
    "planted_low_nan": ("gate", r"NaN"),
    "planted_wrong_at_64": ("gate", r"error .* is above the bound"),
    "planted_crash": ("crash", r"SIGSEGV"),
    "planted_late_crash": ("crash", r"SIGSEGV"),
    "planted_leave": ("crash", r"status 3"),
    "planted_hang": ("hang", r"no answer within 20 s"),
    "planted_hog": ("memory", r"GiB; the limit is"),
    "planted_leak": ("leak", r"leaves \d+ bytes behind at each call"),
    "planted_mutate": ("gate", r"input k was changed"),
    "planted_unwritten": ("gate", r"unwritten memory or NaN|error .* is above the bound"),
    "planted_raising": ("gate", r"raised RuntimeError: no luck today"),
}


# The same of a problem without gradients.
WANTED_FORWARD = {
    "planted_one_buffer": r"out shares its memory with out of the run before",
    "planted_one_batch": r"the problem itself: out: error .* is above the bound",
    "planted_remembers": r"error .* is above the bound",
}


def test_every_planted_backend_is_found_out(planted: registry.Registry, own_store: Store) -> None:
    names = ("sdpa", "planted_right_but_slow", "planted_unsure", *WANTED)
    problem = attention_problem(AttentionSpec(mask=masks.Causal()), (2, 2), 192, 192, 16, grad=True)
    report = tune_problem(problem, Options(backends=names, time_limit=20.0, memory_limit=2 << 30))
    assert report.winner is not None
    assert report.winner.backend in ("sdpa", "planted_right_but_slow")
    found = {r.candidate.backend: (r.kind, r.reason) for r in report.refused}
    assert set(found) == set(WANTED)
    for name, (kind, reason) in WANTED.items():
        assert found[name][0] == kind, (name, found[name])
        assert re.search(reason, found[name][1]), (name, found[name])
    assert report.unsupported["planted_unsure"] == ("its supports() raised ValueError: cannot make up its mind",)
    [(_, kept)] = own_store.records("user")
    assert {name for name, _, _ in kept.refused} == {*WANTED, "planted_unsure"}
    assert kept.backend == report.winner.backend


def test_what_a_call_would_meet_is_what_the_gate_sees(planted: registry.Registry, own_store: Store) -> None:
    problem = attention_problem(AttentionSpec(mask=masks.Causal()), (2, 2), 192, 192, 16, batch=3)
    report = tune_problem(problem, Options(backends=("sdpa", *WANTED_FORWARD)))
    assert report.winner is not None
    assert report.winner.backend == "sdpa"
    found = {r.candidate.backend: (r.kind, r.reason) for r in report.refused}
    assert set(found) == set(WANTED_FORWARD)
    for name, reason in WANTED_FORWARD.items():
        assert found[name][0] == "gate"
        assert re.search(reason, found[name][1]), (name, found[name])


def test_wrong_at_64_fails_where_the_problem_itself_is_not_at_64(planted: registry.Registry) -> None:
    problem = attention_problem(AttentionSpec(mask=masks.Causal()), (2, 2), 128, 128, 16)
    report = tune_problem(problem, Options(backends=("sdpa", "planted_wrong_at_64", "planted_low_nan")))
    assert {r.candidate.backend for r in report.refused} == {"planted_wrong_at_64", "planted_low_nan"}


def test_the_plugin_came_through_its_entry_point(planted: registry.Registry) -> None:
    entry = planted.get("planted_wrong")
    assert (entry.plugin, entry.origin) == ("planted_plugin", "planted_plugin 1.0")
