"""Records: the JSON line holds everything, refuses everything else, and staleness names its fields."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records_for_tests import HARDWARE, VERSIONS, padded, problem, record, rival

from attnreg import AttentionSpec, masks
from attnreg.errors import RecordError
from attnreg.records import Gate, Policy, Quantiles, problem_class
from attnreg.records_json import SCHEMA, as_evidence, from_evidence, from_json, line, parse_line, to_json

RECORDS = [
    record(),
    record(ties=(rival("eager", ()), rival(block=3)), peak_memory=0, runner_up=None),
    record(origin="static", times=None, gate=None, static={"registers": 128, "instructions": {"HGMMA": 4}}),
    record(problem=padded(4), policy=Policy(cache="cold", threads=1, noisy=True)),
    record(problem=problem(grads=frozenset({"q", "k", "v"})), config={}),
    record(evidence=(as_evidence(record(backend="sdpa", version="2.13", config={})),)),
]


@pytest.mark.parametrize("made", RECORDS)
def test_a_line_reads_back_as_the_same_record(made: Any) -> None:
    text = line(made)
    assert "\n" not in text
    assert line(parse_line(text)) == text
    again = parse_line(text)
    assert replace(again, evidence=()) == replace(made, evidence=())
    assert [dict(e) for e in again.evidence] == [dict(e) for e in made.evidence]


def test_evidence_holds_what_its_record_held() -> None:
    other = record(backend="sdpa", version="2.13", config={"kernel": "flash"}, date="2026-11-25T00:00:00Z")
    assert from_evidence(record(), as_evidence(other)) == other


BAD = [
    ("schema", None, "schema"),
    ("schema", SCHEMA + 1, "update attnreg"),
    ("schema", True, "schema"),
    ("surprise", 1, "unknown fields ['surprise']"),
    ("backend", "../evil", "backend"),
    ("backend", "os.system", "backend"),
    ("config", {"path": "/etc/passwd"}, "config.path"),
    ("config", {"x": [1]}, "config.x"),
    ("config", {"a/b": 1}, "config.a/b"),
    ("origin", "guessed", "origin"),
    ("hardware", {"slug": "../../etc"}, "hardware.slug"),
    ("hardware", {}, "hardware.slug"),
    ("software", {"backends": 5}, "software.backends"),
    ("software", {"backends": {"../x": "1"}}, "software.backends"),
    ("times", {"n": 3, "values": [1, 2]}, "times.values"),
    ("times", {"n": 3, "values": [7, 6, 5, 4, 3, 2, 1]}, "rising"),
    ("times", {"n": 3, "values": [0, 1, 1, 1, 1, 1, 1]}, "times.values"),
    ("times", {"n": 0, "values": [1, 2, 3, 4, 5, 6, 7]}, "times.n"),
    ("date", "yesterday", "date"),
    ("date", "2026-11-24\x1b[31m", "date"),
    ("version", "\x1b[31m2", "version"),
    ("runner_up", {"backend": "x", "version": "1", "config": {}, "seconds": -1}, "runner_up.seconds"),
    ("policy", {"cache": "tepid"}, "policy.cache"),
    ("policy", {"confidence": 1.5}, "policy.confidence"),
    ("problem", {"spec": {"mask": {"kind": "exec"}}}, "exec"),
    ("problem", {"spec": {}, "batch": -1}, "problem"),
    ("refused", [["x", 1]], "refused"),
    ("evidence", [{"backend": "a b"}], "missing"),
    ("evidence", "all of it", "evidence"),
    ("peak_memory", 1.5, "peak_memory"),
]


@pytest.mark.parametrize(("field", "value", "named"), BAD)
def test_a_bad_field_is_named(field: str, value: Any, named: str) -> None:
    data = to_json(record())
    data[field] = value
    if value is None:
        del data[field]
    with pytest.raises(RecordError, match=named.replace("[", r"\[").replace("]", r"\]")):
        from_json(data)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "NaN", '{"schema": NaN}', "[" * 100_000, "x" * (2 << 20)])
def test_text_that_is_no_record_is_a_record_error(text: str) -> None:
    with pytest.raises(RecordError):
        parse_line(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=6))
def test_any_value_in_any_field_is_refused_or_read(value: Any) -> None:
    for field in to_json(record()):
        data = {**to_json(record()), field: value}
        try:
            made = from_json(data)
        except RecordError:
            continue
        assert json.loads(line(made))["backend"] == data["backend"]


def test_infinite_times_never_reach_a_line() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        line(record(times=Quantiles(3, (math.inf,) * 7)))


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(1e-7, 1e-6), True),
        (Gate(1e-6, 1e-6, 1e-5, 1e-5), True),
        (Gate(5.0, 1e-6), False),
        (Gate(1e-7, 1e-6, 5.0, 1e-5), False),
        (Gate(math.nan, 1e-6), False),
        (Gate(1e-7, math.nan), False),
        (Gate(1e-7, 1e-6, math.nan, 1e-5), False),
        (None, False),
    ],
)
def test_a_record_passed_if_its_winner_passed_the_gate(gate: Gate | None, passed: bool) -> None:
    assert record(gate=gate).passed == passed
    assert record(gate=gate, origin="static", times=None).passed


def test_a_record_is_fresh_where_it_was_made() -> None:
    assert record().stale(HARDWARE, VERSIONS, 2) == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hardware": {**record().hardware, "isa": ["avx2", "sse4_2"]}}, "isa (-sse4_2, +fma)"),
        ({"hardware": {**record().hardware, "cores": 4}}, "cores (4 then, 2 now)"),
        ({"hardware": {**record().hardware, "caches": [1, 2, 3]}}, "caches"),
        ({"software": {**record().software, "torch": "2.0"}}, "torch (2.0 then"),
        ({"software": {**record().software, "python": "3.1"}}, "python (3.1 then"),
        ({"software": {**record().software, "attnreg": "0.0.1"}}, "attnreg (0.0.1 then"),
        ({"version": "0"}, "version of cpu (0 then, 1 now)"),
        ({"runner_up": replace(rival(), version="2.9")}, "version of sdpa (2.9 then, 2.13 now)"),
        ({"policy": Policy(threads=8)}, "threads (8 then, 2 now)"),
    ],
)
def test_staleness_names_the_field(change: dict[str, Any], named: str) -> None:
    stale = record(**change).stale(HARDWARE, VERSIONS, 2)
    assert len(stale) == 1
    assert named in stale[0]


def test_a_class_of_problems_is_all_but_the_sizes() -> None:
    base = problem_class(problem())
    assert problem_class(problem(sq=100, skv=100, batch=7)) == base
    assert problem_class(problem(sq=1, square=False)) != base
    assert problem_class(problem(skv=1024, square=False)) != base
    for change in (
        {"head_dim": 128},
        {"dtype": "bfloat16"},
        {"grads": frozenset({"q"})},
        {"strides": ("rows", "rows", "rows")},
        {"spec": AttentionSpec(mask=masks.Full())},
    ):
        assert problem_class(problem(**change)) != base


@given(st.lists(st.floats(1e-7, 1e3), min_size=1, max_size=50))
def test_quantiles_rise_and_stay_within_the_sample(samples: list[float]) -> None:
    q = Quantiles.of(samples)
    assert list(q.values) == sorted(q.values)
    assert q.n == len(samples)
    assert q.values[0] == pytest.approx(min(samples), rel=1e-5)
    assert q.values[-1] == pytest.approx(max(samples), rel=1e-5)
