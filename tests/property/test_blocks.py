"""BlockLayout says exactly what the mask says, for any expression, pattern, size and alignment."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_expressions import STATIC, Case, cases, dense, expressions, whole_case

from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks import BlockLayout, block_layout

few = settings(max_examples=150, deadline=None)


def build(case: Case) -> BlockLayout:
    return block_layout(
        case.mask, case.sparsity, case.sq, case.skv, case.block_q, case.block_kv, heads=case.heads, batch=case.batch,
        offset=case.offset, q_len=case.q_len, kv_len=case.kv_len,
        pattern_keys=case.pattern_keys, tensors=case.tensors,
    )  # fmt: skip


def tile_counts(case: Case, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Live pairs and existing pairs [batch, heads, n_q, n_kv] of each tile."""
    n_q, n_kv = -(-case.sq // case.block_q), -(-case.skv // case.block_kv)
    pad = (0, n_kv * case.block_kv - case.skv, 0, n_q * case.block_q - case.sq)
    shape = (case.batch, case.heads, n_q, case.block_q, n_kv, case.block_kv)
    i, j = torch.arange(case.sq)[:, None], torch.arange(case.skv)
    q_len = torch.tensor(case.q_len or [case.sq] * case.batch)[:, None, None, None]
    kv_len = torch.tensor(case.kv_len or [case.skv] * case.batch)[:, None, None, None]
    exists = ((i < q_len) & (j < kv_len)).expand_as(want)
    return tuple(torch.nn.functional.pad(x.long(), pad).reshape(shape).sum((3, 5)) for x in (want, exists))


@few
@given(cases())
def test_layout_equals_the_dense_mask_and_is_minimal(case: Case) -> None:
    layout, want = build(case), dense(case)
    torch.testing.assert_close(layout.to_dense().expand_as(want), want, rtol=0, atol=0)
    assert layout.pairs == int(want.sum())

    live, exists = tile_counts(case, want)
    lead = (case.batch // layout.n_batch) * (case.heads // layout.n_heads)
    assert layout.live_blocks * lead == int((live > 0).sum())
    assert layout.full_blocks * lead == int(((live > 0) & (live == exists)).sum())
    assert len({tile.numpy().tobytes() for tile in layout.bits}) == layout.n_tiles
    used = set(layout.tile_idx[layout.tile_idx >= 0].tolist())
    assert used == set(range(layout.n_tiles))


@pytest.mark.parametrize(
    "mask",
    [
        m.Causal() | m.Global((0, 23)),
        m.SlidingWindow(9, 4) | m.Global(tuple(range(0, 40, 5))),
        ~m.SlidingWindow(7, 3) | m.PrefixLM(20),
        m.Chunked(11) | m.Global((5,)),
        ~m.Dilated(7, 3) & m.PrefixLM(31),
        m.Dilated(9, 2) | (m.Chunked(5) & m.Causal()),
    ],
    ids=repr,
)
def test_every_small_block_size(mask: m.Mask) -> None:
    """Tiles that are numbered alike are alike, wherever diagonals, chunks and lines cut them."""
    for block_q, block_kv, pattern in product(range(1, 8), range(1, 8), (s.Dense(), s.Strided(6, 2, 3))):
        case = replace(whole_case(mask, pattern, 45, 52, None), block_q=block_q, block_kv=block_kv)
        assert torch.equal(build(case).to_dense()[0], dense(case)[0]), (block_q, block_kv, pattern)


@few
@given(cases())
def test_column_lists_hold_the_same_blocks(case: Case) -> None:
    layout = build(case)
    rows, columns = set(), set()
    for line in range(layout.row_ptr.numel() - 1):
        lead, r = divmod(line, layout.n_q)
        start, split, end = int(layout.row_ptr[line]), int(layout.row_split[line]), int(layout.row_ptr[line + 1])
        for at in range(start, end):
            assert (int(layout.tile_idx[at]) < 0) == (at < split)
            rows.add((lead, r, int(layout.col_idx[at]), int(layout.tile_idx[at])))
        for part in (layout.col_idx[start:split], layout.col_idx[split:end]):
            assert part.tolist() == sorted(set(part.tolist()))
    for line in range(layout.col_ptr.numel() - 1):
        lead, c = divmod(line, layout.n_kv)
        start, split, end = int(layout.col_ptr[line]), int(layout.col_split[line]), int(layout.col_ptr[line + 1])
        for at in range(start, end):
            assert (int(layout.col_tile[at]) < 0) == (at < split)
            columns.add((lead, int(layout.row_idx[at]), c, int(layout.col_tile[at])))
        for part in (layout.row_idx[start:split], layout.row_idx[split:end]):
            assert part.tolist() == sorted(set(part.tolist()))
    assert rows == columns
    assert len(rows) == layout.live_blocks


@few
@given(cases(STATIC), expressions(STATIC))
def test_de_morgan(case: Case, other: m.Mask) -> None:
    for left, right in (
        (~(case.mask & other), ~case.mask | ~other),
        (~(case.mask | other), ~case.mask & ~other),
        (case.mask, m.Not(m.Not(case.mask))),
    ):
        one, two = build(replace(case, mask=left)), build(replace(case, mask=right))
        for name in ("row_ptr", "row_split", "col_idx"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert torch.equal(one.to_dense(), two.to_dense())


@few
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 90), st.integers(1, 90))
def test_causal_and_window_is_the_windowed_causal(left: int, right: int, sq: int, skv: int) -> None:
    both = block_layout(m.Causal() & m.SlidingWindow(left, right), None, sq, skv, 16, 16)
    one = block_layout(m.SlidingWindow(left), None, sq, skv, 16, 16)
    for name in ("row_ptr", "row_split", "col_idx", "tile_idx", "bits"):
        assert torch.equal(getattr(both, name), getattr(one, name)), name
