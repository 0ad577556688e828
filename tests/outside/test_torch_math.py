"""torch's float64 math path and gradcheck decide what attention and its gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from everyone import agree, answers, near, qkv
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnreg
from attnreg import AttentionSpec, masks, scores, sparsity
from attnreg.testing import oracle

S, M = AttentionSpec, masks


def math(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


def windowed(sq: int, skv: int, left: int, right: int) -> Tensor:
    gap = torch.arange(skv)[None] - (torch.arange(sq)[:, None] + skv - sq)
    return (gap >= -left) & (gap <= right)


MASKED = {
    "full": (S(), {}, {}),
    "causal": (S(mask=M.Causal()), {"is_causal": True}, {}),
    "scale": (S(score=scores.ScaledDot(0.7)), {"scale": 0.7}, {}),
    "dot": (S(score=scores.Dot()), {"scale": 1.0}, {}),
    "window": (S(mask=M.SlidingWindow(5, 2)), {"attn_mask": windowed(19, 19, 5, 2)}, {}),
    "causal window": (S(mask=M.Causal() & M.SlidingWindow(4)), {"attn_mask": windowed(19, 19, 4, 0)}, {}),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks(name: str) -> None:
    spec, options, tensors = MASKED[name]
    q, k, v = qkv(1)
    agree(math(q, k, v, **options), spec, q, k, v, **tensors)


@pytest.mark.parametrize(("sq", "skv"), [(7, 19), (1, 30), (19, 7)])
def test_unequal_lengths_are_aligned_bottom_right(sq: int, skv: int) -> None:
    q, k, v = qkv(2, sq=sq, skv=skv)
    mask = torch.ones(sq, skv, dtype=torch.bool).tril(skv - sq)
    live = mask.any(-1)
    wanted = torch.zeros_like(q)
    wanted[:, :, live] = math(q[:, :, live], k, v, attn_mask=mask[live])
    agree(wanted, S(mask=M.Causal()), q, k, v)


def test_top_left_is_torchs_own_alignment() -> None:
    q, k, v = qkv(3, sq=7, skv=19)
    agree(math(q, k, v, is_causal=True), S(mask=M.Causal(), align="top_left"), q, k, v)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads: int) -> None:
    q, k, v = qkv(4, q_heads=4, kv_heads=kv_heads)
    agree(math(q, k, v, is_causal=True, enable_gqa=True), S(mask=M.Causal()), q, k, v)


@pytest.mark.parametrize("shape", [(1, 1, 19, 19), (2, 1, 1, 19), (1, 4, 19, 19), (2, 4, 19, 19), (19, 19)])
def test_bias_of_every_broadcast_shape(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(5)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    bias.view(-1)[::7] = -torch.inf
    bias.view(-1)[3::11] = -1e4
    agree(math(q, k, v, attn_mask=bias), S(bias=True), q, k, v, bias=bias)


def test_a_bool_mask_and_rows_that_attend_nothing() -> None:
    q, k, v = qkv(7)
    mask = torch.rand(2, 4, 19, 19, generator=torch.Generator().manual_seed(8)) < 0.4
    mask[:, :, 5] = False
    wanted = math(q, k, v, attn_mask=mask)
    assert not wanted[:, :, 5].any()
    agree(wanted, S(mask=M.Dense()), q, k, v, attn_mask=mask)


def test_values_of_another_width_and_layouts() -> None:
    q, k, _ = qkv(9)
    v = qkv(10, dim=24)[2]
    wanted = math(q, k, v, is_causal=True)
    agree(wanted, S(mask=M.Causal()), q, k, v)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    agree(wanted.transpose(1, 2), S(mask=M.Causal(), layout="bshd"), *turned)
    cu = torch.tensor([0, 19, 38], dtype=torch.int32)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    spec = S(mask=M.Causal(), layout="thd")
    agree(wanted.transpose(1, 2).flatten(0, 1), spec, *packed, cu_seqlens_q=cu, cu_seqlens_k=cu)


@pytest.mark.parametrize("shared", [False, True])
def test_general_is_dot_of_the_projected_query(shared: bool) -> None:
    """Luong's general, with Dq = 16 and Dk = 24."""
    q = qkv(16)[0]
    k, v = qkv(17, dim=24)[1], qkv(18)[2]
    weight = torch.randn(1 if shared else 4, 16, 24, generator=torch.Generator().manual_seed(19), dtype=torch.float64)
    wanted = math(q @ weight, k, v, scale=1.0, is_causal=True)
    agree(wanted, S(score=scores.General(), mask=M.Causal()), q, k, v, score_weight=weight)


def test_lse_is_the_logsumexp_of_the_scores() -> None:
    q, k, v = qkv(11)
    logits = (q @ k.mT) * 16**-0.5
    logits = logits.masked_fill(~torch.ones(19, 19, dtype=torch.bool).tril(), -torch.inf)
    wanted = math(q, k, v, is_causal=True)
    agree(wanted, S(mask=M.Causal(), return_lse=True), q, k, v, lse=logits.logsumexp(-1))


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_gradients(mask: str) -> None:
    """The gradients of torch's math path, for a random weight on the output."""
    spec, options, _ = MASKED[mask]
    leaves = [x.requires_grad_() for x in qkv(12, kv_heads=2)]
    weight = torch.randn(2, 4, 19, 16, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    wanted = torch.autograd.grad(math(*leaves, enable_gqa=True, **options), leaves, weight)
    for backend, dtype, bound in (
        ("eager", torch.float64, 1e-9),
        ("sdpa", torch.float32, 2e-5),
        ("cpu", torch.float32, 2e-5),
    ):
        mine = [x.detach().to(dtype).requires_grad_() for x in leaves]
        try:
            with attnreg.use_backend(backend):
                out = attnreg.attention(spec, *mine)
        except attnreg.errors.UnsupportedError:
            assert backend == "cpu"
            continue
        for name, got, want in zip("qkv", torch.autograd.grad(out, mine, weight.to(dtype)), wanted, strict=True):
            near(got, want, bound, f"{backend}: grad of {name}")
    out, _ = oracle(spec, *leaves)
    for name, got, want in zip("qkv", torch.autograd.grad(out, leaves, weight), wanted, strict=True):
        near(got, want, 1e-10, f"oracle: grad of {name}")


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


CHECKED: dict[str, tuple[AttentionSpec, Callable[[], dict[str, Any]]]] = {
    "causal": (S(mask=M.Causal()), dict),
    "empty rows": (S(mask=M.Padding() & M.Causal()), lambda: {"kv_lengths": lengths(3, 0)}),
    "window or global": (S(mask=M.SlidingWindow(1, 1) | M.Global((0,))), dict),
    "softcap": (S(softcap=2.0, mask=M.Causal()), dict),
    "bias": (S(bias=True), lambda: {"bias": draw(1, 2, 4, 5)}),
    "alibi": (S(alibi=True), lambda: {"alibi_slopes": lengths(1, 2).double() / 3}),
    "sinks": (S(sinks=True, mask=M.Causal()), lambda: {"sinks": draw(2)}),
    "general": (S(score=scores.General()), lambda: {"score_weight": draw(2, 3, 3)}),
    "additive": (S(score=scores.Additive()), lambda: {"score_weight": draw(2, 3)}),
    "additive causal": (S(score=scores.Additive(), mask=M.Causal()), lambda: {"score_weight": draw(1, 3)}),
    "blocks": (
        S(sparsity=sparsity.Blocks(2, 2)),
        lambda: {"block_mask": torch.tensor([[True, False, True], [False, True, False]]).view(1, 1, 2, 3)},
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name: str) -> None:
    """Finite differences of the output, in every differentiable tensor, on eager and the oracle."""
    spec, make = CHECKED[name]
    q, k, v = (x.requires_grad_() for x in qkv(14, q_heads=2, kv_heads=1, sq=4, skv=5, dim=3))
    tensors = make()
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if n in ("bias", "sinks", "score_weight")}

    def eager(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        with attnreg.use_backend("eager"):
            return attnreg.attention(spec, q, k, v, **{**tensors, **dict(zip(leaves, rest, strict=True))})

    def exact(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = oracle(spec, q, k, v, **{**tensors, **dict(zip(leaves, rest, strict=True))})
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(eager, (q, k, v, *leaves.values()))
    assert torch.autograd.gradcheck(exact, (q, k, v, *leaves.values()))


def test_every_named_answer_was_asked() -> None:
    """The comparison above is with all of them: oracle, eager, sdpa, cpu and whatever is chosen."""
    asked = [who for who, _, _ in answers(S(mask=M.Causal()), *qkv(15))]
    assert asked[:3] == ["oracle", "eager", "sdpa"]
    assert asked[-1] == "chosen"
