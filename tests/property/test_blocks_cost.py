"""live_pairs counts what the dense mask allows: exactly where it says so, and never less where it says bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_expressions import LEAVES, STATIC, dense, expressions, whole_case

from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks import LivePairs, block_layout, live_pairs

few = settings(max_examples=200, deadline=None)

BANDS = st.one_of(
    st.just(m.Causal()),
    st.just(m.Full()),
    st.builds(m.SlidingWindow, st.integers(0, 60), st.integers(0, 30)),
    st.builds(m.PrefixLM, st.integers(0, 80)),
    st.builds(m.Chunked, st.integers(1, 50)),
)
STATIC_PATTERNS = st.one_of(
    st.just(s.Dense()),
    st.builds(s.BigBird, st.integers(1, 20), st.integers(1, 5), st.integers(0, 2), st.integers(0, 3)),
    st.builds(s.Strided, st.integers(1, 20), st.integers(1, 4), st.integers(1, 5)),
)
SIZES = st.integers(1, 70)
OFFSETS = st.one_of(st.none(), st.integers(-40, 60))


@few
@given(st.lists(BANDS, min_size=1, max_size=4), SIZES, SIZES, OFFSETS)
def test_closed_form_of_conjunctions(parts: list[m.Mask], sq: int, skv: int, offset: int | None) -> None:
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    want = dense(whole_case(mask, s.Dense(), sq, skv, offset))
    found = live_pairs(mask, None, sq, skv, offset=offset)
    assert (found.count, found.kind) == (int(want.sum()), "exact")
    assert found.keys >= int(want.any(-2).sum())


@few
@given(expressions(STATIC), STATIC_PATTERNS, SIZES, SIZES, OFFSETS)
def test_rows_of_any_static_expression(
    mask: m.Mask, pattern: s.Sparsity, sq: int, skv: int, offset: int | None
) -> None:
    want = dense(whole_case(mask, pattern, sq, skv, offset))
    found = live_pairs(mask, pattern, sq, skv, offset=offset)
    assert (found.count, found.kind) == (int(want.sum()), "exact")
    assert found.keys >= int(want.any(-2).sum())


@few
@given(expressions(LEAVES), SIZES, SIZES, st.integers(0, 1000))
def test_what_tensors_decide_is_bounded(mask: m.Mask, sq: int, skv: int, seed: int) -> None:
    case = whole_case(mask, s.Dense(), sq, skv, None, seed)
    found = live_pairs(mask, None, sq, skv)
    count = int(dense(case).sum())
    assert found.count >= count
    assert found.kind != "exact" or found.count == count


M = 1 << 20


@pytest.mark.parametrize(
    ("mask", "sparsity"),
    [
        (m.Causal() & m.SlidingWindow(4095), None),
        (m.Causal() & m.Chunked(8191) & m.SlidingWindow(1000), None),
        (m.longformer(512, (0, 5)), None),
        (m.Causal() & m.Dilated(64, 3), None),
        (m.Causal(), s.BigBird(64)),
    ],
)
def test_estimates_of_a_million_tokens_are_close(mask: m.Mask, sparsity: s.Sparsity | None) -> None:
    exact = block_layout(mask, sparsity, M, M, 64, 64).pairs
    found = live_pairs(mask, sparsity, M, M)
    assert found.count == exact if found.kind == "exact" else abs(found.count / exact - 1) < 0.01


def test_sizes_beyond_any_memory() -> None:
    n = 2**40
    assert live_pairs(m.Causal(), None, n, n) == LivePairs(n * (n + 1) // 2, n, "exact")
    assert live_pairs(m.Causal() & m.SlidingWindow(9), None, n, n).count == 10 * n - 45
    assert live_pairs(m.Causal(), None, 1, n).count == n
    assert live_pairs(m.Causal() & m.SlidingWindow(4095), None, 1, n) == LivePairs(4096, 4096, "exact")
    assert live_pairs(m.Causal(), None, 0, 5).count == 0
