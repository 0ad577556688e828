"""Hypothesis strategies: random mask expressions, sparsity patterns and the call tensors that they need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnreg import masks as m
from attnreg import sparsity as s


@dataclass(frozen=True)
class Case:
    """One layout to build."""

    mask: m.Mask
    sparsity: s.Sparsity
    sq: int
    skv: int
    block_q: int
    block_kv: int
    batch: int
    heads: int
    offset: list[int] | None
    q_len: list[int] | None
    kv_len: list[int] | None
    pattern_keys: list[int] | None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def mask_mod(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
    return ((p * 3 + j * 5 + b + h) % 7 < 3) | (j == p)


def same_for_all(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
    return (p + j) % 3 == 0


def _leaves() -> st.SearchStrategy[m.Mask]:
    return st.one_of(
        st.just(m.Full()),
        st.just(m.Causal()),
        st.builds(m.SlidingWindow, st.integers(0, 40), st.integers(0, 20)),
        st.builds(m.PrefixLM, st.one_of(st.none(), st.integers(0, 60))),
        st.builds(m.Chunked, st.integers(1, 40)),
        st.builds(m.Dilated, st.integers(1, 24), st.integers(1, 20)),
        st.builds(m.Global, st.one_of(st.none(), st.lists(st.integers(0, 70), max_size=6).map(tuple))),
        st.just(m.Global(tuple(range(0, 60, 2)))),
        st.just(m.Document()),
        st.just(m.Padding()),
        st.just(m.Dense()),
        st.sampled_from([m.Custom(mask_mod), m.Custom(same_for_all)]),
    )


LEAVES = st.deferred(_leaves)  # deferred, so that hypothesis does not spell the whole strategy out
STATIC = LEAVES.filter(lambda x: not x.tensors() and not isinstance(x, m.Custom))


def expressions(leaves: st.SearchStrategy[m.Mask]) -> st.SearchStrategy[m.Mask]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=5,
    )


PATTERNS = st.one_of(
    st.just(s.Dense()),
    st.builds(s.Blocks, st.integers(1, 20), st.integers(1, 20)),
    st.builds(
        s.BigBird, st.integers(1, 20), st.integers(1, 5), st.integers(0, 2), st.integers(0, 3), st.integers(0, 9)
    ),
    st.builds(s.Strided, st.integers(1, 20), st.integers(1, 4), st.integers(1, 5)),
)


def random_tensors(names: frozenset[str], sparsity: s.Sparsity, shape: tuple[int, int, int, int], seed: int) -> Any:
    batch, heads, sq, skv = shape
    g = torch.Generator().manual_seed(seed)

    def ints(high: int, *size: int) -> Tensor:
        return torch.randint(0, max(high, 1), size, generator=g)

    def one_of(n: int) -> int:
        return n if seed % 2 else 1

    made: dict[str, Tensor] = {
        "prefix_lengths": ints(skv + 1, batch),
        "kv_lengths": ints(skv + 1, batch).int(),
        "global_mask": ints(8, batch, skv) == 0,
        "document_ids": ints(4, batch, skv) if seed % 3 else ints(4, batch, skv).sort(-1)[0],
        "attn_mask": ints(3, one_of(batch), one_of(heads), sq, skv) == 0,
    }
    if seed % 5 == 0:
        made["attn_mask"] = made["attn_mask"][0, 0]
    if isinstance(sparsity, s.Blocks):
        size = (one_of(batch), one_of(heads), -(-sq // sparsity.block_q), -(-skv // sparsity.block_kv))
        made["block_mask"] = ints(3, *size) == 0
    return {name: made[name] for name in names}


@st.composite
def cases(draw: st.DrawFn, leaves: st.SearchStrategy[m.Mask] = LEAVES) -> Case:
    mask, sparsity = draw(expressions(leaves)), draw(PATTERNS)
    sq, skv = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))

    def lengths(low: int, high: int) -> list[int] | None:
        return draw(st.one_of(st.none(), st.lists(st.integers(low, high), min_size=batch, max_size=batch)))

    names = mask.tensors() | sparsity.tensors()
    return Case(
        mask, sparsity, sq, skv, draw(st.sampled_from([1, 2, 7, 16, 32])), draw(st.sampled_from([1, 3, 16, 32, 33])),
        batch, heads, lengths(-30, 60), lengths(0, sq), lengths(0, skv), lengths(1, skv),
        random_tensors(names, sparsity, (batch, heads, sq, skv), draw(st.integers(0, 1000))),
    )  # fmt: skip


def whole_case(mask: m.Mask, sparsity: s.Sparsity, sq: int, skv: int, offset: int | None, seed: int = 0) -> Case:
    """One batch and head, in one block."""
    tensors = random_tensors(mask.tensors() | sparsity.tensors(), sparsity, (1, 1, sq, skv), seed)
    return Case(mask, sparsity, sq, skv, sq, skv, 1, 1, None if offset is None else [offset], None, None, None, tensors)


def dense(case: Case) -> Tensor:
    """Bool [batch, heads, sq, skv] straight from `allows`."""
    b = torch.arange(case.batch)[:, None, None, None]
    h = torch.arange(case.heads)[None, :, None, None]
    i = torch.arange(case.sq)[None, None, :, None]
    j = torch.arange(case.skv)[None, None, None, :]
    q_len = torch.tensor(case.q_len or [case.sq] * case.batch)
    kv_len = torch.tensor(case.kv_len or [case.skv] * case.batch)
    offset = kv_len - q_len if case.offset is None else torch.tensor(case.offset)
    c = m.Coords(b, h, i, i + offset[b], j, case.tensors)
    keys = case.pattern_keys or [case.skv] * case.batch
    shape = (case.batch, case.heads, case.sq, case.skv)
    blocks = torch.stack([case.sparsity.allows(c, n).broadcast_to(shape)[at] for at, n in enumerate(keys)])
    out = case.mask.allows(c) & blocks
    return out & (i < q_len[b]) & (j < kv_len[b]) & torch.ones(case.batch, case.heads, 1, 1, dtype=torch.bool)
