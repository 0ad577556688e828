"""Uncompiled FlexAttention decides what mask_mod, score_mod, softcap, ALiBi and lse mean."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from everyone import agree, qkv
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnreg import AttentionSpec, masks, scores

S, M = AttentionSpec, masks
SQ, SKV = 23, 37
SHIFT = SKV - SQ  # FlexAttention counts rows; ours stand at row + SHIFT on the key time line
DOCUMENTS = (torch.arange(SKV)[None] * torch.tensor([[1], [2]])) // 9 - 1
LENGTHS = torch.tensor([37, 20], dtype=torch.int32)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BOUND: dict[str, tuple[masks.Mask, MaskMod, dict[str, Tensor]]] = {
    "causal": (M.Causal(), lambda b, h, i, j: j <= i + SHIFT, {}),
    "window": (M.SlidingWindow(6, 3), lambda b, h, i, j: (i + SHIFT - j <= 6) & (j - i - SHIFT <= 3), {}),
    "prefix": (M.PrefixLM(20), lambda b, h, i, j: (j <= i + SHIFT) | (j < 20), {}),
    "chunked": (M.Chunked(10), lambda b, h, i, j: (i + SHIFT) // 10 == j // 10, {}),
    "dilated": (
        M.Dilated(7, 4),
        lambda b, h, i, j: ((j - i - SHIFT).abs() % 4 == 0) & ((j - i - SHIFT).abs() <= 12),
        {},
    ),
    "global": (
        M.Global((2, 30)) | M.SlidingWindow(2, 2),
        lambda b, h, i, j: (
            ((i + SHIFT) == 2) | ((i + SHIFT) == 30) | (j == 2) | (j == 30) | ((i + SHIFT - j).abs() <= 2)
        ),
        {},
    ),
    "document": (
        M.Document() & M.Causal(),
        lambda b, h, i, j: (DOCUMENTS[b, i + SHIFT] == DOCUMENTS[b, j]) & (j <= i + SHIFT),
        {"document_ids": DOCUMENTS},
    ),
    "padding": (M.Padding(), lambda b, h, i, j: j < LENGTHS[b], {"kv_lengths": LENGTHS}),
    "complement": (~M.SlidingWindow(4, 4), lambda b, h, i, j: (i + SHIFT - j).abs() > 4, {}),
    "custom": (
        M.Custom(lambda b, h, p, j: (p * 3 + j + h) % 4 != b),
        lambda b, h, i, j: ((i + SHIFT) * 3 + j + h) % 4 != b,
        {},
    ),
}


def flex(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is not compiled: that is why it decides
        out, lse = flex_attention(q, k, v, return_lse=True, **options)  # type: ignore[call-overload, misc]
    return out, lse


@pytest.mark.parametrize("name", BOUND)
def test_masks_and_lse(name: str) -> None:
    mask, mask_mod, tensors = BOUND[name]
    q, k, v = qkv(21, kv_heads=2, sq=SQ, skv=SKV)
    blocks = create_block_mask(mask_mod, 2, 4, SQ, SKV, device="cpu", BLOCK_SIZE=128)
    out, lse = flex(q, k, v, block_mask=blocks, enable_gqa=True)
    agree(out, S(mask=mask, return_lse=True), q, k, v, lse=lse, **tensors)


def test_softcap() -> None:
    q, k, v = qkv(22, sq=SQ, skv=SKV)
    out, lse = flex(3 * q, k, v, score_mod=lambda s, b, h, i, j: 5 * torch.tanh(s / 5))
    agree(out, S(softcap=5.0, return_lse=True), 3 * q, k, v, lse=lse)


def test_alibi_is_the_distance_of_positions() -> None:
    q, k, v = qkv(23, sq=SQ, skv=SKV)
    out, lse = flex(q, k, v, score_mod=lambda s, b, h, i, j: s - SLOPES[h] * (i + SHIFT - j).abs())
    agree(out, S(alibi=True, return_lse=True), q, k, v, lse=lse, alibi_slopes=SLOPES)


def test_order_is_scale_softcap_bias_mask() -> None:
    q, k, v = qkv(24, sq=SQ, skv=SKV)
    bias = torch.randn(2, 4, SQ, SKV, generator=torch.Generator().manual_seed(25), dtype=torch.float64)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 3 * torch.tanh(s / 3) + bias[b, h, i, j] - SLOPES[h] * (i + SHIFT - j).abs()

    blocks = create_block_mask(lambda b, h, i, j: j <= i + SHIFT, 2, 4, SQ, SKV, device="cpu", BLOCK_SIZE=128)
    out, lse = flex(q, k, v, score_mod=score_mod, block_mask=blocks, scale=0.6)
    spec = S(score=scores.ScaledDot(0.6), softcap=3.0, bias=True, alibi=True, mask=M.Causal(), return_lse=True)
    agree(out, spec, q, k, v, lse=lse, bias=bias, alibi_slopes=SLOPES)
