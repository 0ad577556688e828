"""Packed sequences, paged caches and dropout through the sdpa backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense import problem_of, reference
from torch import Tensor

from attnreg import AttentionSpec, Precision, masks
from attnreg.hardware import detect
from attnreg_sdpa import Sdpa

SDPA = Sdpa()
CPU = detect("cpu")
LENGTHS_Q, LENGTHS_K = (3, 0, 7, 1), (5, 4, 7, 0)


def _t(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def prepared(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, config: dict[str, Any] | None = None, **named: Any):  # type: ignore[no-untyped-def]
    problem = problem_of(spec, q, k, v, **named)
    assert SDPA.supports(problem, CPU) == []
    return SDPA.prepare(problem, SDPA.space(problem, CPU).check(config or {}))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("sinks", [False, True])
def test_packed_sequences_equal_each_alone(window: int | None, sinks: bool) -> None:
    """thd: each sequence on its own, empty ones too, with a bias over the longest and lse [Hq, T]."""
    mask = masks.Causal() & masks.Document()
    if window is not None:
        mask = mask & masks.SlidingWindow(window)
    spec = AttentionSpec(layout="thd", mask=mask, bias=True, sinks=sinks, return_lse=True)
    q, k, v = _t(11, 4, 16), _t(16, 2, 16, seed=2), _t(16, 2, 16, seed=3)
    named = {"cu_seqlens_q": _starts(LENGTHS_Q), "cu_seqlens_k": _starts(LENGTHS_K), "bias": _t(4, 1, 7, 7)}
    if sinks:
        named["sinks"] = _t(4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = prepared(spec, q, k, v, **named)(q, k, v, **named)
    assert out.shape == q.shape
    assert lse.shape == (4, 11)
    wants, lses = [], []
    for b, (nq, nk) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        at_q, at_k = int(named["cu_seqlens_q"][b]), int(named["cu_seqlens_k"][b])
        part = [x[s : s + n].transpose(0, 1)[None] for x, s, n in ((q, at_q, nq), (k, at_k, nk), (v, at_k, nk))]
        live = torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq)
        if window is not None:
            live = live.triu(nk - nq - window)
        want, want_lse = reference(*part, live, added=named["bias"][b : b + 1, :, :nq, :nk], sinks=named.get("sinks"))
        wants.append(want[0].transpose(0, 1))
        lses.append(want_lse[0])
    want, want_lse = torch.cat(wants), torch.cat(lses, 1)
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-6, rtol=3e-6)
    grad = _t(*out.shape, seed=5)
    got = torch.autograd.grad((out * grad).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((want * grad).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def _pages(x: Tensor, table: Tensor, used: list[int], size: int, stale: float) -> Tensor:
    """A cache [pages, H, size, D] that holds x [B, H, S, D] where the table says, and `stale` elsewhere."""
    cache = torch.full((int(table.max()) + 3, x.shape[1], size, x.shape[3]), stale)
    for b, row in enumerate(table.tolist()):
        for n, page in enumerate(row):
            if n * size < used[b]:
                cache[page] = x[b, :, n * size : (n + 1) * size]
    return cache


@pytest.mark.parametrize("stale", [0.0, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "thd"])
def test_paged_cache_equals_the_contiguous_one(layout: str, stale: float) -> None:
    """Whatever unused pages and the tail of the last one hold."""
    used = [6, 9, 0]
    table = torch.tensor([[4, 1, -1], [0, 5, 3], [-1, 0, -1]], dtype=torch.int32)
    k, v = _t(3, 2, 12, 16, seed=2), _t(3, 2, 12, 16, seed=3)
    for b, n in enumerate(used):
        k[b, :, n:] = stale
        v[b, :, n:] = stale
    q = _t(3, 4, 2, 16)
    named: dict[str, Any] = {"block_table": table, "seqused_k": torch.tensor(used)}
    spec = AttentionSpec(layout=layout, page_size=4, mask=masks.Causal())  # type: ignore[arg-type]  # parametrised
    given = {"bhsd": q, "bshd": q.transpose(1, 2), "thd": q.transpose(1, 2).reshape(6, 4, 16)}[layout]
    if layout == "thd":
        named["cu_seqlens_q"] = torch.tensor([0, 2, 4, 6])
    caches = [_pages(x, table, used, 4, stale) for x in (k, v)]
    problem = problem_of(spec, given, *caches, **named)
    for config in SDPA.space(problem, CPU).points():
        out = prepared(spec, given, *caches, config, **named)(given, *caches, **named)
        out = {"bhsd": out, "bshd": out.transpose(1, 2), "thd": out.reshape(3, 2, 4, 16).transpose(1, 2)}[layout]
        for b, n in enumerate(used):
            live = torch.ones(2, n, dtype=torch.bool).tril(n - 2)
            want, _ = reference(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], live)
            torch.testing.assert_close(out[b : b + 1].double(), want, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("seed", range(0, 80, 10))
def test_block_scales_of_a_paged_cache_are_by_page(seed: int) -> None:
    """q and scales of few bits make scores exact in float32; what is left is the softmax of 8 keys.

    Its weights and their sum with v take 2 * 8 roundings of sums and 4 others, and an exponential of s - m < 0, which
    moves by |s - m| roundings, a weight by exp(-1) of one at most: 23 roundings, of 2**-24 of weights @ |v| each.
    """
    q, k, v = (_t(*shape, seed=seed + n) for n, shape in enumerate(((2, 2, 1, 16), (4, 1, 4, 16), (4, 1, 4, 16))))
    q = (q * 4).round() / 4
    stored = [(x * 20).round().to(torch.int8) for x in (k, v)]
    table = torch.tensor([[0, 2], [3, 1]])
    scale = torch.randint(4, 13, (2, 1, 2), generator=torch.Generator().manual_seed(seed)) / 8
    spec = AttentionSpec(page_size=4, dtype=Precision(kv="int8", scaling="block"))
    named = {"block_table": table, "k_descale": scale, "v_descale": scale}
    out = prepared(spec, q, *stored, **named)(q, *stored, **named)
    full = [
        (x[table].double() * scale.reshape(2, 2, 1, 1, 1).double()).transpose(1, 2).reshape(2, 1, 8, 16) for x in stored
    ]
    want, size = (reference(q, full[0], x)[0] for x in (full[1], full[1].abs()))
    assert ((out.double() - want).abs() <= 23 * 2**-24 * size).all()


def test_dropout_repeats_from_a_generator_and_keeps_the_mean() -> None:
    """Dropout drops probabilities at the rate asked, scales the rest, and leaves the default generator alone."""
    spec = AttentionSpec(dropout_p=0.25, mask=masks.Causal())
    q = torch.zeros(1, 2, 64, 8)
    v = torch.ones(1, 2, 64, 8)
    call = prepared(spec, q, q, v)
    before = torch.get_rng_state()
    a, b = (call(q, q, v, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
    one = torch.Generator().manual_seed(5)
    first, second = call(q, q, v, generator=one), call(q, q, v, generator=one)
    assert torch.equal(first, a)
    assert not torch.equal(first, second), "a generator moves on between calls"
    # The last row spreads 1/64 over 64 keys: mean 1, variance p / (1 - p) / 64.
    rows = torch.stack([call(q, q, v)[0, :, -1, 0] for _ in range(2000)]).double().flatten()
    assert abs(float(rows.mean()) - 1) < 5 * math.sqrt(0.25 / 0.75 / 64 / len(rows))
    assert abs(float(rows.var()) / (0.25 / 0.75 / 64) - 1) < 0.15
    torch.manual_seed(3)
    x = call(q, q, v)
    torch.manual_seed(3)
    assert torch.equal(x, call(q, q, v))


def test_dropout_has_a_gradient_that_fits_its_own_draw() -> None:
    spec = AttentionSpec(dropout_p=0.5, mask=masks.SlidingWindow(3, 1))
    q, k, v = (_t(1, 2, 9, 8, seed=n).requires_grad_() for n in range(3))
    call = prepared(spec, q, k, v)
    out = call(q, k, v, generator=torch.Generator().manual_seed(1))
    (dv,) = torch.autograd.grad(out.sum(), v)
    # out is linear in v: with the draw fixed, <dv, v> is the output's sum.
    torch.testing.assert_close((dv * v).sum(), out.sum(), atol=1e-4, rtol=1e-4)
