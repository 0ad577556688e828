"""Tuning from calls: autotune on a miss only, record() without tuning, and never inside compile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attnreg
from attnreg import AttentionSpec, dispatch, masks, modes, registry, store
from attnreg.errors import InputError, RecordError, TuneError
from attnreg.problem import Problem
from attnreg.store import Store
from attnreg.tuning import Options, known, read_problems, tune, tune_missing

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
