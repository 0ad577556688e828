"""Tuning from calls: autotune on a miss only, record() without tuning, and never inside compile."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnreg
from attnreg import AttentionSpec, dispatch, masks, modes, registry, store
from attnreg.errors import InputError, RecordError, TuneError
from attnreg.problem import Problem
from attnreg.space import SearchSpace
from attnreg.store import Store
from attnreg.suites import attention_problem
from attnreg.tuning import (
    Options,
    known,
    read_problems,
    tune,
    tune_all,
    tune_missing,
    tune_problem,
    write_problems,
)

pytestmark = pytest.mark.alone

CAUSAL = AttentionSpec(mask=masks.Causal())


def qkv(s: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(1, 2, s, 16) for _ in range(3))  # type: ignore[return-value]  # three of them


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that calls asked to tune."""
    out: list[Problem] = []
    monkeypatch.setattr(modes, "_tuner", out.append)
    return out


def test_a_call_never_tunes_unless_asked(tuned: list[Problem], fresh: Any) -> None:
    attnreg.attention(CAUSAL, *qkv())
    assert tuned == []


def test_autotune_tunes_each_bucket_once(tuned: list[Problem], fresh: Any) -> None:
    attnreg.attention(CAUSAL, *qkv())
    with attnreg.autotune():
        for size in (30, 31, 32, 40, 50):
            attnreg.attention(CAUSAL, *qkv(size))
    assert [p.bucket().sq for p in tuned] == [32, 64]


def test_the_environment_asks_too(tuned: list[Problem], fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREG_AUTOTUNE", "1")
    attnreg.attention(CAUSAL, *qkv())
    assert len(tuned) == 1


def test_never_inside_compile(tuned: list[Problem], fresh: Any) -> None:
    q, k, v = qkv()
    with attnreg.autotune():
        compiled = torch.compile(lambda q, k, v: attnreg.attention(CAUSAL, q, k, v), backend="aot_eager")
        compiled(q, k, v)
    assert tuned == []


def test_never_while_a_graph_is_captured(tuned: list[Problem], fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with attnreg.autotune():
        attnreg.attention(CAUSAL, *qkv())
    assert tuned == []


def test_record_collects_one_problem_a_bucket_and_tunes_nothing(
    tmp_path: Path, tuned: list[Problem], fresh: Any
) -> None:
    path = tmp_path / "problems.jsonl"
    q, k, v = qkv()
    attnreg.attention(CAUSAL, q, k, v)  # hot before the block: it must be seen all the same
    with attnreg.record(path) as recorder:
        for size in (32, 31, 64, 63, 32):
            attnreg.attention(CAUSAL, *qkv(size))
        attnreg.attention(AttentionSpec(mask=masks.Custom(lambda b, h, p, j: p >= j)), q, k, v)
    assert [p.sq for p in recorder.problems] == [32, 64]
    assert len(recorder.skipped) == 1
    assert read_problems(path) == recorder.problems
    assert tuned == []
    with attnreg.record(path):  # adds what is new
        attnreg.attention(CAUSAL, *qkv(32))
        attnreg.attention(CAUSAL, *qkv(128))
    assert [p.sq for p in read_problems(path)] == [32, 64, 128]


def test_a_file_that_is_no_problem_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": {"spec": {}}}\n{"a": 1}\n')
    with pytest.raises(RecordError, match=r"x\.jsonl:1"):
        read_problems(path)
    with pytest.raises(RecordError, match="cannot be read"):
        read_problems(tmp_path / "missing")


def test_a_last_line_that_was_left_open_is_ended_first(tmp_path: Path, tuned: list[Problem], fresh: Any) -> None:
    path = tmp_path / "problems.jsonl"
    with attnreg.record(path):
        attnreg.attention(CAUSAL, *qkv(32))
    path.write_text(path.read_text().rstrip("\n"))
    with attnreg.record(path):
        attnreg.attention(CAUSAL, *qkv(64))
    assert [p.sq for p in read_problems(path)] == [32, 64]


def test_a_file_that_cannot_be_written_is_a_record_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "problems.jsonl", tmp_path):
        with pytest.raises(RecordError, match="cannot be"), attnreg.record(path):
            pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grads": ["zzz"]}, r"grads: expected names of k, q, v, got \['zzz'\]"),
        ({"grads": ["bias"]}, "grads: expected names of k, q, v"),
        ({"q_heads": 3}, "kv_heads: expected a divisor of q_heads=3, got 2"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"dtype": "int32"}, "dtype: expected one of float64.*, got 'int32'"),
        ({"kv_dtype": "bool"}, "kv_dtype: expected one of float64.*int8, got 'bool'"),
        ({"square": False}, "square: expected True for sq=32, skv=32, got False"),
        ({"skv": 64}, "square: expected False for sq=32, skv=64, got True"),
        ({"strides": ["odd", "rows", "rows"]}, "strides: expected three of contiguous"),
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
    ],
)
def test_a_problem_that_no_call_makes_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "x.jsonl"
    write_problems(path, [attention_problem(CAUSAL, (2, 2), 32, 32, 16)])
    data = json.loads(path.read_text())
    data["problem"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(RecordError, match=rf"x\.jsonl:1: problem: {said}"):
        read_problems(path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cache", "hot"), ("backends", "eager"), ("backends", ()), ("backends", (1,)), ("budget", -1), ("budget", 0),
        ("budget", "x"), ("budget", 1.5), ("seconds", "5"), ("seconds", 0), ("seconds", float("nan")), ("seed", "1"),
        ("storage", 3), ("isolate", "no"), ("keep", None),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_meant_is_named(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{option}: expected .*, got ") as error:
        tune(CAUSAL, *qkv(), **{option: value})
    assert error.value.argument == option


@pytest.mark.parametrize(
    ("option", "value"),
    [("time_limit", 0), ("memory_limit", -1), ("confidence", 1.0), ("enumerate_up_to", -1), ("patience", 0)],
)
def test_options_of_the_command_are_checked_too(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{option}: expected .*, got {value}"):
        Options(**{option: value})
    assert Options(backends=["eager", "sdpa"]).backends == ("eager", "sdpa")  # type: ignore[arg-type]  # a list is well


def test_an_error_of_the_tuner_does_not_end_the_call(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnreg.tuning.api.tune_problem", broken)
    q, k, v = qkv()
    with (
        attnreg.autotune(),
        pytest.warns(RuntimeWarning, match=r"could not be tuned .*No space left.*goes on"),
    ):
        out = attnreg.attention(CAUSAL, q, k, v)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RecordError("locked"), TuneError("no")])
def test_an_error_of_one_problem_leaves_the_others(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def some(problem: Problem, *_: Any) -> str:
        if problem.sq == 32:
            raise error
        return "tuned"

    monkeypatch.setattr("attnreg.tuning.api.tune_problem", some)
    problems = [attention_problem(CAUSAL, (2, 2), size, size, 16) for size in (16, 32, 64)]
    first, failed, last = (result for _, result in tune_all(problems))
    assert (first, last) == ("tuned", "tuned")
    assert isinstance(failed, TuneError)
    assert str(error) in str(failed)


class Odd:
    """A right backend, but for one method."""

    version = "1"

    def __init__(self, name: str, **methods: Any) -> None:
        self.name = name
        for method, said in methods.items():
            setattr(self, method, lambda *_, said=said: said)

    def supports(self, problem: Problem, hardware: Any) -> Any:
        return []

    def space(self, problem: Problem, hardware: Any) -> Any:
        return SearchSpace()

    def prepare(self, problem: Problem, config: Any) -> Any:
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_backend_that_breaks_its_contract_is_refused_by_that(own_store: Store) -> None:
    late = SearchSpace({"a": (1, 2)}, constraints=[("never asked of 1", lambda c: c["a"] == 1 or c["no"] > 0)])
    odd = [
        (Odd("no_space", space=None), r"its space\(\) must return a SearchSpace, got None"),
        (Odd("late_error", space=late), r"its space\(\) raised KeyError: 'no'"),
        (Odd("text", supports="no"), r"its supports\(\) must return a list of str, got 'no'"),
        (Odd("silent", supports=None), r"its supports\(\) must return a list of str, got None"),
    ]
    entries = {backend.name: registry.Entry(backend, "odd", "here") for backend, _ in (*odd, (Odd("right"), ""))}
    with registry.using(registry.Registry(entries)):
        problem = attention_problem(CAUSAL, (2, 2), 32, 32, 16)
        report = tune_problem(problem, Options(isolate=False))
        assert report.winner is not None
        assert report.winner.backend == "right"
        assert set(report.unsupported) == {backend.name for backend, _ in odd}
        for backend, said in odd:
            assert re.fullmatch(said, report.unsupported[backend.name][0])
        with pytest.raises(TuneError, match=r"no backend can run .*no_space: its space"):
            tune_problem(problem, Options(isolate=False, backends=("no_space",)))


def test_a_record_that_did_not_pass_the_gate_is_tuned_anew(own_store: Store, fresh: Any) -> None:
    report = tune(CAUSAL, *qkv(), backends=("eager",), isolate=False, budget=1)
    assert report.record is not None
    with store.using(Store(own_store.user and own_store.user.parent / "other", None)) as other:
        other.add(replace(report.record, gate=None))
        assert known(report.problem) is None


def test_tuning_in_a_call_end_to_end(own_store: Store, fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    report = tune(CAUSAL, q, k, v, backends=("sdpa", "eager"), isolate=False)
    assert report.winner is not None
    assert report.record is not None
    explained = attnreg.explain(CAUSAL, q, k, v)
    assert (explained.backend, explained.source) == (report.winner.backend, "user record")
    assert dict(explained.decision.config) == dict(report.winner.config)
    text = str(explained)
    for said in ("runner-up", "holds for", report.record.date[:10]):
        assert said in text
    problem = report.problem
    assert known(problem) is not None
    assert tune_missing(problem, Options(isolate=False)) is None  # a fresh record: nothing to do


def test_what_cannot_be_tuned_says_so() -> None:
    q, k, v = qkv()
    with pytest.raises(TuneError, match="cannot be tuned"):
        tune(AttentionSpec(mask=masks.Custom(lambda b, h, p, j: p >= j)), q, k, v)
    with pytest.raises(InputError, match="no_such_name"):
        tune(CAUSAL, q, k, v, no_such_name=1)


def test_plugin_records_reach_decide(own_store: Store, fresh: Any) -> None:
    q, k, v = qkv()
    report = tune(CAUSAL, q, k, v, backends=("eager",), isolate=False, keep=False)
    assert report.record is not None
    from attnreg.records_json import to_json

    data = json.loads(json.dumps(to_json(report.record)))
    now = registry.current()
    with_records = registry.Registry(now.entries, now.plugins, now.failures, now.blocked, (("mine", data),))
    with registry.using(with_records), store.using(Store(None, None, lambda: registry.current().records)):
        explained = attnreg.explain(CAUSAL, q, k, v)
        assert (explained.backend, explained.source) == ("eager", "plugin record")
    assert dispatch.decision(CAUSAL, q, k, v)[1].source != "plugin record"


def test_a_recorded_problem_whose_slopes_are_trained_is_read_back(tmp_path: Path) -> None:
    from attnreg.tuning import read_problems

    q = torch.randn(1, 2, 8, 16)
    with attnreg.record(tmp_path / "p.jsonl"):
        attnreg.attention(AttentionSpec(alibi=True), q, q, q, alibi_slopes=torch.rand(2, requires_grad=True))
    assert [p.grads for p in read_problems(tmp_path / "p.jsonl")] == [frozenset({"alibi_slopes"})]
