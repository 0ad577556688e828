"""A call tensor may be redundant beside the rest of a mask: every backend takes it all the same, and is right."""

from __future__ import annotations

from functools import reduce
from operator import and_

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_expressions import random_tensors

import attnreg
from attnreg import AttentionSpec, sparsity
from attnreg import masks as m
from attnreg.testing import oracle

READ = (m.PrefixLM(), m.Global(), m.Document(), m.Padding(), m.Dense())
STRONGER = (
    m.Causal(), m.SlidingWindow(0), m.SlidingWindow(3), m.PrefixLM(0), m.Global(()), m.Chunked(1), m.Dilated(1, 1),
    ~m.Full(), m.Full(),
)  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu"])
@settings(max_examples=60, deadline=None)
@given(
    parts=st.tuples(st.sampled_from(READ), st.lists(st.sampled_from(STRONGER), min_size=1, max_size=2)).flatmap(
        lambda parts: st.permutations([parts[0], *parts[1]])
    ),
    sq=st.sampled_from([1, 5, 9]),
    align=st.sampled_from(["bottom_right", "top_left"]),
    grad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_tensor_beside_what_makes_it_redundant(
    backend: str, parts: list[m.Mask], sq: int, align: str, grad: bool, seed: int
) -> None:
    """Causal() & PrefixLM() is Causal(), whatever the prefixes; so for each leaf with a tensor, in any order."""
    spec = AttentionSpec(mask=reduce(and_, parts), align=align)  # type: ignore[arg-type]  # one of the two
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, n, 16, generator=g, requires_grad=grad) for n in (sq, 9, 9))
    named = random_tensors(spec.mask.tensors(), sparsity.Dense(), (2, 2, sq, 9), seed)
    want, _ = oracle(spec, *(x.detach().double() for x in (q, k, v)), **named)
    with attnreg.use_backend(backend):
        out = attnreg.attention(spec, q, k, v, **named)
        torch.testing.assert_close(out.detach().double(), want, atol=1e-5, rtol=1e-5)
        run = attnreg.prepare(spec, q, k, v, **named)
        torch.testing.assert_close(run(q, k, v, **named).detach().double(), want, atol=1e-5, rtol=1e-5)
