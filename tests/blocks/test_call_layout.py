"""call_layout against the eager backend: with q = 0 and v one-hot, the output of a row is its mask row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnreg
from attnreg import AttentionSpec
from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks import call_layout

B, H, SQ, SKV = 3, 2, 37, 50
MASKS = [
    m.Causal(),
    m.Causal() & m.SlidingWindow(9),
    m.longformer(8, (0, 20)),
    m.Chunked(11) | m.Global((3,)),
    ~m.Dilated(6, 3),
    m.Causal() & m.Padding(),
    m.PrefixLM() & m.Padding(),
]
SPARSITY = [s.Dense(), s.BigBird(8, random_blocks=1), s.Strided(8, 1, 3)]
ALIGN = ["bottom_right", "top_left", "offset"]


def tensors_of(spec: AttentionSpec, longest: int) -> dict[str, Tensor]:
    made = {
        "kv_lengths": torch.tensor([longest, 7, 0], dtype=torch.int32),
        "prefix_lengths": torch.tensor([5, 0, longest]),
        "query_offset": torch.tensor([0, 9, -5]),
    }
    return {name: x for name, x in made.items() if name in spec.tensors()}


def attended(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    with attnreg.use_backend("eager"):
        return attnreg.attention(spec, q, k, v, **tensors) > 0


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("sparsity", SPARSITY, ids=repr)
@pytest.mark.parametrize("align", ALIGN)
def test_padded(mask: m.Mask, sparsity: s.Sparsity, align: str) -> None:
    spec = AttentionSpec(mask=mask, sparsity=sparsity, align=align)
    tensors = tensors_of(spec, SKV)
    got = attended(
        spec, torch.zeros(B, H, SQ, 4), torch.zeros(B, H, SKV, 4), torch.eye(SKV).expand(B, H, SKV, SKV), tensors
    )
    layout = call_layout(spec, SQ, SKV, 16, 16, batch=B, heads=H, tensors=tensors)
    assert torch.equal(layout.to_dense().expand(B, H, SQ, SKV), got)


@pytest.mark.parametrize("mask", [x for x in MASKS if not x.tensors()], ids=repr)
@pytest.mark.parametrize("sparsity", SPARSITY, ids=repr)
@pytest.mark.parametrize("align", ALIGN)
def test_packed(mask: m.Mask, sparsity: s.Sparsity, align: str) -> None:
    spec = AttentionSpec(mask=mask & m.Document(), sparsity=sparsity, align=align, layout="thd")
    rows, keys = [SQ, 0, 20], [SKV, 9, 16]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (rows, keys))
    tensors = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **tensors_of(spec, SKV)}
    v = torch.cat([torch.eye(n, SKV) for n in keys])[:, None].expand(-1, H, -1)
    got = attended(spec, torch.zeros(sum(rows), H, 4), torch.zeros(sum(keys), H, 4), v, tensors)
    layout = call_layout(spec, SQ, SKV, 16, 16, batch=B, heads=H, tensors=tensors)
    assert (layout.q_len, layout.kv_len) == (tuple(rows), tuple(keys))
    dense = layout.to_dense().expand(B, H, SQ, SKV)
    for b in range(B):
        assert torch.equal(dense[b, :, : rows[b]].transpose(0, 1), got[int(cu_q[b]) : int(cu_q[b + 1])])


@pytest.mark.parametrize("used", [None, [48, 5, 0]])
@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("sparsity", SPARSITY, ids=repr)
@pytest.mark.parametrize("layout", ["bhsd", "thd"])
def test_paged(used: list[int] | None, align: str, sparsity: s.Sparsity, layout: str) -> None:
    page, wide = 16, 48
    spec = AttentionSpec(
        mask=m.Causal() & m.SlidingWindow(20), sparsity=sparsity, align=align, page_size=page, layout=layout
    )
    tensors = {"block_table": torch.arange(9).view(B, 3).int(), **tensors_of(spec, wide)}
    if used is not None:
        tensors["seqused_k"] = torch.tensor(used).int()
    pages = torch.eye(wide).view(3, 1, page, wide).repeat(B, H, 1, 1)
    q = torch.zeros(B, H, SQ, 4)
    if layout == "thd":
        q = q.transpose(1, 2).reshape(B * SQ, H, 4)
        tensors["cu_seqlens_q"] = torch.arange(B + 1).int() * SQ
    got = attended(spec, q, torch.zeros(9, H, page, 4), pages, tensors)
    if layout == "thd":
        got = got.view(B, SQ, H, wide).transpose(1, 2)
    blocks = call_layout(spec, SQ, wide, 16, 16, batch=B, heads=H, tensors=tensors)
    assert torch.equal(blocks.to_dense().expand(B, H, SQ, wide), got)


def test_bottom_right_counts_from_the_shorter_of_padding_and_used_pages() -> None:
    page, wide = 16, 48
    spec = AttentionSpec(mask=m.Causal() & m.Padding(), page_size=page)
    tensors = {
        "block_table": torch.arange(9).view(B, 3).int(),
        "seqused_k": torch.tensor([20, 40, 9]).int(),
        "kv_lengths": torch.tensor([48, 30, 9]),
    }
    pages = torch.eye(wide).view(3, 1, page, wide).repeat(B, H, 1, 1)
    got = attended(spec, torch.zeros(B, H, SQ, 4), torch.zeros(9, H, page, 4), pages, tensors)
    blocks = call_layout(spec, SQ, wide, 16, 16, batch=B, heads=H, tensors=tensors)
    assert torch.equal(blocks.to_dense().expand(B, H, SQ, wide), got)
