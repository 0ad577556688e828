"""Law: a call is decided once a bucket, never changes its meaning by being remembered, and never falls back unasked."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import Unsupported

import attnreg
from attnreg import AttentionSpec, SearchSpace, errors, hot, masks, registry, scores
from attnreg.registry import Entry, Registry


class _UnsaidError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Fake:
    """A backend for tests: computes by torch, counts what is asked of it, and breaks when told to."""

    version = "1"

    def __init__(self, name: str = "cpu", *, refuse: str = "", break_at: str = "", slow: float = 0.0) -> None:
        self.name = name
        self.refuse, self.break_at, self.slow = refuse, break_at, slow
        self.prepared: list[Any] = []

    def supports(self, problem: Any, hardware: Any) -> list[str]:
        return [self.refuse, "and a second reason"] if self.refuse else []

    def space(self, problem: Any, hardware: Any) -> SearchSpace:
        return SearchSpace({"tile": (16, 32)}, {"tile": 32}, [("tile fits", lambda c: True)])

    def prepare(self, problem: Any, config: Any) -> Callable[..., Tensor]:
        time.sleep(self.slow)
        self.prepared.append((problem, dict(config)))
        if self.break_at == "prepare":
            raise RuntimeError("cannot compile")
        if self.break_at == "exit":
            raise SystemExit(3)
        if self.break_at == "unsaid":
            raise _UnsaidError

        def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
            if self.break_at == "run":
                raise RuntimeError("illegal instruction")
            return F.scaled_dot_product_attention(q, k, v)

        return run


@pytest.fixture
def put(request: pytest.FixtureRequest) -> Any:
    """Put these backends, and only these, in force."""

    def put(*backends: Fake) -> None:
        entries = {b.name: Entry(b, "test", "test 1") for b in backends}
        manager = registry.using(Registry(entries))
        manager.__enter__()
        request.addfinalizer(lambda: manager.__exit__(None, None, None))

    return put


def qkv(sq: int = 4, skv: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 2, sq, 8), torch.randn(1, 2, skv, 8), torch.randn(1, 2, skv, 8)


FULL = AttentionSpec()


def test_two_thousand_decode_steps_miss_at_most_fifteen_times(fresh: hot.HotTable) -> None:
    spec = AttentionSpec(mask=masks.Causal())
    q, k, v = qkv(1, 2000)
    for n in range(1, 2001):
        attnreg.attention(spec, q, k[:, :, :n], v[:, :, :n])
    assert fresh.misses <= 15


def test_concatenated_caches_miss_no_more_than_sliced_ones(fresh: hot.HotTable) -> None:
    q, k, v = qkv(1, 300)
    for n in range(1, 301):
        attnreg.attention(FULL, q, k[:, :, :n].contiguous(), v[:, :, :n].contiguous())
    assert fresh.misses <= 10


@pytest.mark.parametrize("change", ["dtype", "grad", "stride", "spec", "no_grad", "heads", "mixed"])
def test_what_matters_to_the_choice_is_part_of_the_key(change: str, put: Any, fresh: hot.HotTable) -> None:
    put(backend := Fake())
    q, k, v = qkv()
    attnreg.attention(FULL, q, k, v)
    assert len(backend.prepared) == 1
    if change == "dtype":
        attnreg.attention(FULL, q.double(), k.double(), v.double())
    elif change == "grad":
        attnreg.attention(FULL, q.requires_grad_(), k, v)
    elif change == "stride":
        attnreg.attention(FULL, q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    elif change == "spec":
        attnreg.attention(AttentionSpec(mask=masks.Causal()), q, k, v)
    elif change == "no_grad":
        attnreg.attention(FULL, q.requires_grad_(), k, v)
        with torch.no_grad():
            attnreg.attention(FULL, q, k, v)
        assert [p.grads for p, _ in backend.prepared] == [frozenset(), frozenset("q")]
    elif change == "heads":
        attnreg.attention(FULL, q.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    else:
        attnreg.attention(FULL, q, k.requires_grad_(), v)
    assert len(backend.prepared) == 2


def test_a_hit_still_checks_what_shapes_cannot_tell(fresh: hot.HotTable) -> None:
    spec = AttentionSpec(mask=masks.Padding(), align="top_left")
    q, k, v = qkv()
    attnreg.attention(spec, q, k, v, kv_lengths=torch.tensor([3]))
    attnreg.attention(spec, q, k, v, kv_lengths=torch.tensor([2]))
    with pytest.raises(errors.InputError, match=r"kv_lengths.*Skv = 4.*got 9"):
        attnreg.attention(spec, q, k, v, kv_lengths=torch.tensor([9]))


def test_packed_lengths_of_the_same_shapes_are_read_anew(fresh: hot.HotTable) -> None:
    spec = AttentionSpec(layout="thd", mask=masks.Causal())
    x = torch.randn(10, 2, 8)
    for cut in (5, 1, 9):
        cu = torch.tensor([0, cut, 10], dtype=torch.int32)
        out = attnreg.attention(spec, x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu)
        parts = [p.transpose(0, 1)[None] for p in (x[:cut], x[cut:])]
        want = torch.cat([F.scaled_dot_product_attention(p, p, p, is_causal=True)[0].transpose(0, 1) for p in parts])
        torch.testing.assert_close(out, want)


def test_concurrent_first_calls_decide_once(put: Any, fresh: hot.HotTable) -> None:
    put(backend := Fake(slow=0.05))
    q, k, v = qkv()
    start, outs = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        outs.append(attnreg.attention(FULL, q, k, v))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 8
    assert len(backend.prepared) == 1


def test_force_runs_that_backend_or_raises_with_every_reason(put: Any, fresh: hot.HotTable) -> None:
    put(Fake("cpu"), mine := Fake("mine"), Fake("other", refuse="head_dim 8 is too odd"))
    q, k, v = qkv()
    with attnreg.use_backend("mine"):
        attnreg.attention(FULL, q, k, v)
    assert mine.prepared[0][1] == {"tile": 32}
    with (
        attnreg.use_backend("other"),
        pytest.raises(errors.UnsupportedError, match=r"head_dim 8 is too odd\n.*and a second reason") as raised,
    ):
        attnreg.attention(FULL, q, k, v)
    assert raised.value.reasons == {"other": ["head_dim 8 is too odd", "and a second reason"]}
    with pytest.raises(errors.UnknownBackendError, match="loaded: cpu, mine, other"), attnreg.use_backend("nope"):
        pass


def test_force_takes_a_configuration_and_refuses_one_outside_the_space(put: Any, fresh: hot.HotTable) -> None:
    put(backend := Fake())
    q, k, v = qkv()
    with attnreg.use_backend("cpu", {"tile": 16}):
        attnreg.attention(FULL, q, k, v)
    assert backend.prepared[0][1] == {"tile": 16}
    with pytest.raises(errors.ConfigError, match="tile=17"), attnreg.use_backend("cpu", {"tile": 17}):
        attnreg.attention(FULL, q, k, v)


@pytest.mark.parametrize("step", ["prepare", "run"])
def test_a_backend_that_breaks_is_set_aside_aloud_unless_forced(step: str, put: Any, fresh: hot.HotTable) -> None:
    put(Fake("cpu", break_at=step), Fake("sdpa"))
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="backend 'cpu' broke"):
        out = attnreg.attention(FULL, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    said = attnreg.explain(FULL, q, k, v)
    assert said.backend == "sdpa"
    assert "failed" in said.reasons["cpu"][0]
    with warnings.catch_warnings(), attnreg.use_backend("cpu"):
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=r"cannot compile|illegal instruction"):
            attnreg.attention(FULL, q, k, v)


@pytest.mark.parametrize(("step", "said"), [("exit", "SystemExit: 3"), ("unsaid", "_UnsaidError")])
def test_whatever_a_backend_raises_sets_it_aside(step: str, said: str, put: Any, fresh: hot.HotTable) -> None:
    put(Fake("cpu", break_at=step), Fake("sdpa"))
    with pytest.warns(RuntimeWarning, match=said):
        attnreg.attention(FULL, *qkv())
    assert attnreg.explain(FULL, *qkv()).backend == "sdpa"


def test_where_every_backend_refuses_all_reasons_are_told(put: Any, fresh: hot.HotTable) -> None:
    put(Fake("cpu", refuse="no AVX2"), Fake("sdpa", refuse="no softcap"))
    with pytest.raises(errors.UnsupportedError, match=r"(?s)cpu: no AVX2.*sdpa: no softcap"):
        attnreg.attention(FULL, *qkv())


def test_supports_that_raises_or_returns_junk_is_a_refusal(put: Any, fresh: hot.HotTable) -> None:
    raising, junk = Fake("cpu"), Fake("flex")
    raising.supports = lambda p, h: 1 / 0  # type: ignore[method-assign,assignment,return-value]  # on purpose
    junk.supports = lambda p, h: "no"  # type: ignore[method-assign,assignment,return-value]  # on purpose
    put(raising, junk, Fake("sdpa"))
    said = attnreg.explain(FULL, *qkv())
    assert said.backend == "sdpa"
    assert "ZeroDivisionError" in said.reasons["cpu"][0]
    assert "list of str" in said.reasons["flex"][0]


def test_prepare_gives_the_callable_of_the_bucket(put: Any, fresh: hot.HotTable) -> None:
    put(backend := Fake())
    q, k, v = qkv(1, 40)
    run = attnreg.prepare(FULL, q, k, v)
    out = attnreg.attention(FULL, q, k, v)
    assert len(backend.prepared) == 1
    assert torch.equal(run(q, k, v), out)
    longer = torch.randn(1, 2, 60, 8)
    torch.testing.assert_close(run(q, longer, longer), F.scaled_dot_product_attention(q, longer, longer))
    with pytest.raises(errors.ShapeError):
        attnreg.prepare(FULL, q, k[:, :1], v)


@pytest.mark.parametrize("entry", [attnreg.attention, attnreg.prepare])
def test_autocast_casts_as_it_does_for_torchs_own(entry: Any, fresh: hot.HotTable) -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = F.scaled_dot_product_attention(q, k, v)
        got = entry(FULL, q, k, v)
        got = got(q, k, v) if callable(got) else got
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", [attnreg.attention, attnreg.prepare, attnreg.explain])
def test_autocast_casts_bias_and_weight_with_q(entry: Any, dtype: torch.dtype, fresh: hot.HotTable) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    named = {"bias": torch.randn(4, 4, dtype=dtype), "score_weight": torch.randn(1, 8, 8, dtype=dtype)}
    spec = AttentionSpec(bias=True, score=scores.General())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = entry(spec, q, k, v, **named)
        if entry is attnreg.prepare:
            got = got(q, k, v, **named)
        if entry is not attnreg.explain:
            assert got.dtype == torch.bfloat16
            want = F.scaled_dot_product_attention(q @ named["score_weight"], k, v, named["bias"], scale=1.0)
            torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


def test_what_a_trace_refuses_is_told() -> None:
    """Dynamo replaces the error by one on output types; the warning says the cause."""
    spec = AttentionSpec(mask=masks.Padding())
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attnreg.attention(spec, q, k, v), fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match="attnreg: kv_lengths: the spec asks"), pytest.raises(Unsupported):
        compiled(*qkv())


def test_autocast_keeps_gradients_in_the_dtype_of_the_leaves(fresh: hot.HotTable) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attnreg.attention(FULL, q, k, v).float().sum().backward()
    assert {x.grad.dtype for x in (q, k, v)} == {torch.float32}  # type: ignore[union-attr]  # they have one


def test_inference_mode_and_grad_mode_do_not_disturb_each_other(fresh: hot.HotTable) -> None:
    q, k, v = qkv()
    with torch.inference_mode():
        first = attnreg.attention(FULL, q, k, v)
    second = attnreg.attention(FULL, q.requires_grad_(), k, v)
    second.sum().backward()
    assert q.grad is not None
    torch.testing.assert_close(first.clone(), second.detach())


def test_a_registry_that_changes_voids_what_was_decided(put: Any) -> None:
    q, k, v = qkv()
    put(first := Fake())
    attnreg.attention(FULL, q, k, v)
    put(second := Fake())
    attnreg.attention(FULL, q, k, v)
    assert (len(first.prepared), len(second.prepared)) == (1, 1)


def test_the_table_of_exact_signatures_stays_bounded(
    put: Any, fresh: hot.HotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot.HotTable, "EXACT_LIMIT", 16)
    put(Fake())
    q, k, v = qkv(1, 100)
    for n in range(1, 100):
        attnreg.attention(FULL, q, k[:, :, :n], v[:, :, :n])
    assert len(fresh.exact) <= 16
