"""Law: where padding and a cache's used keys are both said, the keys that both leave count, for masks and positions."""

from __future__ import annotations

import pytest
import torch

import attnreg
from attnreg import AttentionSpec, masks
from attnreg.testing import oracle

MASKS = (
    masks.Padding(),
    masks.Causal() & masks.Padding(),
    masks.Causal() & masks.SlidingWindow(3) & masks.Padding(),
    ~masks.Causal() & masks.Padding(),
)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "thd"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_padding_and_used_keys_meet(backend: str, layout: str, mask: masks.Mask) -> None:
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(9, 2, 4, 16, generator=generator) for _ in "kv")
    shape = {"bhsd": (2, 4, 5, 16), "bshd": (2, 5, 4, 16), "thd": (8, 4, 16)}[layout]
    q = torch.randn(shape, generator=generator)
    named = {
        "block_table": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int32),
        "seqused_k": torch.tensor([10, 16]),
        "kv_lengths": torch.tensor([12, 9]),
    }
    if layout == "thd":
        named["cu_seqlens_q"] = torch.tensor([0, 3, 8], dtype=torch.int32)
    spec = AttentionSpec(mask=mask, page_size=4, layout=layout)  # type: ignore[arg-type]  # one of the three
    with attnreg.use_backend(backend):
        out = attnreg.attention(spec, q, k, v, **named)
    torch.testing.assert_close(out.double(), oracle(spec, q, k, v, **named)[0], rtol=1e-4, atol=1e-5)
