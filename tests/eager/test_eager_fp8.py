"""The FP8 emulation: the steps of its docstring written out a second time, accuracy, and what must leave no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from eager_reference import dense
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, Precision, masks, scores
from attnreg_eager.fp8 import hadamard, quantise

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = {"block_q": 16, "block_kv": 32}


def run(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **t: Any) -> Any:
    with attnreg.use_backend("eager_fp8", TILE):
        return attnreg.attention(spec, q, k, v, **t)


def spec_of(scaling: str, compute: str = "float8_e4m3fn", rotate: bool = False, **more: Any) -> AttentionSpec:
    return AttentionSpec(dtype=Precision(compute=compute, scaling=scaling, rotate=rotate), **more)


def sign(column: int) -> float:
    """The rotation's sign of a column, in Python's integers."""
    mixed = (column + 1) * 0x9E3779B1 % 2**32
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 % 2**32
    return -1.0 if (mixed ^ mixed >> 13) & 1 else 1.0


def by_hand(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of one head, a row and a key block at a time, in the order of the docstring."""
    dtype = getattr(torch, spec.dtype.compute)
    largest, weight = torch.finfo(dtype).max, 2.0 ** (8 if dtype == E4M3 else 15)
    factor = spec.score.factor(q.shape[-1])
    if spec.dtype.rotate:
        h = torch.ones(1, 1)
        while h.shape[0] < q.shape[-1]:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        h = torch.tensor([sign(column) for column in range(h.shape[0])])[:, None] * h
        wide = [torch.nn.functional.pad(x, (0, h.shape[0] - x.shape[-1])) for x in (q, k)]
        # The same sums in float64: butterflies in float32 differ from them by rounding alone.
        q, k = ((x.double() @ h.double() * h.shape[0] ** -0.5).float() for x in wide)

    def fp8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        rows = []
        for n in range(len(x)):
            part = x if spec.dtype.scaling != "block" else x[n // block * block : (n // block + 1) * block]
            rows.append(part.abs().max())
        amax = torch.stack(rows)
        return (x * (largest / amax)[:, None]).clamp(-largest, largest).to(dtype).float(), amax / largest

    (q8, qs), (k8, ks), (v8, vs) = fp8(q, TILE["block_q"]), fp8(k, TILE["block_kv"]), fp8(v, TILE["block_kv"])
    outs, lses = [], []
    for i in range(len(q)):
        last = i + len(k) - len(q)
        m, total, acc = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(v.shape[-1])
        for start in range(0, len(k), TILE["block_kv"]):
            keys = slice(start, min(start + TILE["block_kv"], last + 1))
            if keys.stop <= start:
                break
            s = (k8[keys] @ q8[i]) * ((qs[i] * ks[keys]) * factor)
            new = torch.maximum(m, s.max())
            p = torch.exp2((s - new) * math.log2(math.e))
            shrink = torch.exp2((m - new) * math.log2(math.e))
            total, m = total * shrink + p.sum(), new
            acc = acc * shrink + ((p * weight).to(dtype).float() @ v8[keys]) * (vs[start] / weight)
        outs.append(acc / total)
        lses.append(m + torch.log(total))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("compute", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scaling", ["tensor", "head", "block"])
def test_the_steps(scaling: str, compute: str, rotate: bool) -> None:
    """Equal to the steps by hand but for the order of float32 sums, which may move a weight to the next fp8."""
    spec = spec_of(scaling, compute, rotate, mask=masks.Causal(), return_lse=True)
    q, k, v = (torch.randn(1, 1, n, d) for n, d in ((45, 24), (70, 24), (70, 16)))
    out, lse = run(spec, q, k, v)
    want, want_lse = by_hand(spec, q[0, 0], k[0, 0], v[0, 0])
    off = (out[0, 0] - want).abs()
    one_step = (2.0**-4 if compute == "float8_e4m3fn" else 2.0**-3) * float(v.abs().max())
    assert off.max() < one_step
    assert off.median() < 1e-5 if not rotate else off.median() < 1e-2
    assert (lse[0, 0] - want_lse).abs().median() < (1e-5 if not rotate else 1e-2)


def rmse(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> float:
    want, _ = dense(AttentionSpec(), q, k, v, {})
    return float((run(spec, q, k, v).double() - want).square().mean().sqrt())


def test_outliers() -> None:
    """N(0, 1) with N(0, 100) at probability 0.001: block scales with rotation beat one scale a tensor by far."""
    g = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        x, odd = torch.randn(1, 4, 1024, 128, generator=g), torch.rand(1, 4, 1024, 128, generator=g) < 0.001
        return x + odd * torch.randn(x.shape, generator=g) * 10

    q, k, v = draw(), draw(), draw()
    plain, best = rmse(spec_of("tensor"), q, k, v), rmse(spec_of("block", rotate=True), q, k, v)
    assert best <= 9.1e-3  # the figure that FlashAttention-3 publishes for this draw
    assert best < 0.6 * plain


def test_masked_keys_move_no_scale() -> None:
    """Keys that no row may attend are in no amax, whatever they hold."""
    q, k, v = (torch.randn(2, h, 40, 32, dtype=torch.bfloat16) for h in (4, 2, 2))
    t = {"kv_lengths": torch.tensor([23, 40])}
    for scaling in ("tensor", "head", "block"):
        spec = spec_of(scaling, mask=masks.Padding(), return_lse=True)
        dirty_k, dirty_v = k.clone(), v.clone()
        dirty_k[0, :, 23:], dirty_v[0, :, 23:] = 3e38, -3e38
        for a, b in zip(run(spec, q, k, v, **t), run(spec, q, dirty_k, dirty_v, **t), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "more", [{"softcap": 5.0}, {"sinks": True}, {"alibi": True}, {"layout": "bshd"}, {"page_size": 8}], ids=str
)
def test_features_stay_close(more: dict[str, Any], seed: int) -> None:
    """Every feature of the spec goes through the same tile as in the exact backend.

    From what that makes of the values that q, k and v round to, out differs by the rounding of weights alone, and lse
    by nothing. From exact attention lse differs by no more than the score that rounding moves most: by all of that
    where ALiBi leaves a row a single key.
    """
    torch.manual_seed(seed)
    spec = spec_of("block", mask=masks.SlidingWindow(20, 3), return_lse=True, **more)
    same = spec_of("block", mask=spec.mask, softcap=spec.softcap, sinks=spec.sinks, alibi=spec.alibi)
    q, k, v = (torch.randn(2, h, 48, 32) for h in (4, 2, 2))
    t: dict[str, Any] = {"sinks": torch.randn(4)} if spec.sinks else {}
    if spec.alibi:
        t["alibi_slopes"] = torch.rand(4)
    if spec.layout == "bshd":
        out, lse = run(spec, *(x.transpose(1, 2) for x in (q, k, v)))
        out = out.transpose(1, 2)
    elif spec.page_size:
        pages = (x.unflatten(2, (6, 8)).transpose(1, 2).flatten(0, 1) for x in (k, v))
        out, lse = run(spec, q, *pages, block_table=torch.arange(12).reshape(2, 6))
    else:
        out, lse = run(spec, q, k, v, **t)
    q8, k8, v8 = stands_for(q, TILE["block_q"]), stands_for(k, TILE["block_kv"]), stands_for(v, TILE["block_kv"])
    want, want_lse = dense(same, q8, k8, v8, t)
    assert (lse - want_lse).abs().max() < 1e-5
    # Half a step of a weight: 2**-4 of it, and 2**-18 of the row's largest, which is at most 1, where it is small.
    by_weight, every = dense(same, q8, k8, v8.abs(), t)[0], v8.abs().sum(2, keepdim=True).repeat_interleave(2, 1)
    assert ((out - want).abs() <= 2**-4 * by_weight + 2**-18 * every + 1e-5).all()
    (wide, wide8) = (x.repeat_interleave(2, 1) for x in (k, k8))
    moved = ((q8 - q).abs() @ wide8.abs().mT + q.abs() @ (wide8 - wide).abs().mT) / math.sqrt(32)
    assert ((lse - dense(same, q, k, v, t)[1]).abs() <= moved.amax(-1) + 1e-5).all()


def stands_for(x: Tensor, block: int) -> Tensor:
    """What x [B, H, N, D] rounds to in blocks of rows, each value by half a step of e4m3 at most."""
    rounded, descale = quantise(x, E4M3, "block", block)
    factor = descale.value.repeat_interleave(block, -1)[..., : x.shape[2], None]
    half_step = torch.maximum(2**-4 * x.abs(), 2**-10 * factor)
    assert ((rounded * factor - x).abs() <= half_step + 2**-22 * x.abs()).all()
    return rounded * factor


@pytest.mark.parametrize("scaling", ["tensor", "head", "block"])
def test_stored_fp8(scaling: str) -> None:
    """q, k and v that come as fp8 are used as they are: only the weights round."""
    spec = AttentionSpec(dtype=Precision(compute="float8_e4m3fn", kv="float8_e4m3fn", scaling=scaling), return_lse=True)
    q, k, v = (torch.randn(2, h, 64, 32).to(E4M3) for h in (4, 2, 2))
    shape = {"tensor": (1,), "head": (2, 2), "block": (2, 2, 4)}[scaling]
    t = {f"{x}_descale": torch.rand(shape if x != "q" else shape[:2]) + 0.5 for x in "qkv"}
    out, lse = run(spec, q, k, v, **t)
    want, want_lse = dense(spec, q, k, v, t)
    assert out.dtype == torch.bfloat16
    assert (lse - want_lse).abs().max() < 1e-4
    assert (out.double() - want).abs().max() < 0.15


def test_gradients_pass_through() -> None:
    """Gradients are those of the rounded computation: close to the exact ones, finite, 0 for empty rows."""
    spec = spec_of("block", mask=masks.Causal() & masks.Padding())
    t = {"kv_lengths": torch.tensor([30, 50])}
    xs = [torch.randn(2, 2, 50, 32).requires_grad_() for _ in range(3)]
    got = torch.autograd.grad(run(spec, *xs, **t).sin().sum(), xs)
    want = torch.autograd.grad(dense(spec, *xs, t)[0].sin().sum(), xs)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() < 0.1 * b.norm()
    assert (got[0][0, :, :20] == 0).all()


@pytest.mark.parametrize("scaling", ["tensor", "head", "block"])
@pytest.mark.parametrize(("batch", "sq", "skv"), [(0, 4, 6), (2, 0, 6), (2, 4, 0), (0, 0, 0)])
def test_sizes_of_zero(scaling: str, batch: int, sq: int, skv: int) -> None:
    """Grouped heads under a mask and without: 0 and -inf of the right shape, and gradients of 0."""
    for mask in (masks.Full(), masks.Causal(), masks.Dense()):
        q, k, v = (torch.randn(batch, h, n, 8).requires_grad_() for h, n in ((4, sq), (2, skv), (2, skv)))
        t = {"attn_mask": torch.ones(1, skv, dtype=torch.bool)} if mask == masks.Dense() else {}
        out, lse = run(spec_of(scaling, mask=mask, return_lse=True), q, k, v, **t)
        assert out.shape == q.shape
        assert not out.any()
        assert lse.isneginf().all()
        assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1), (8,), (8, 8), (2, 1, 1)])
def test_dense_masks_of_few_dimensions(shape: tuple[int, ...]) -> None:
    spec = spec_of("tensor", mask=masks.Dense())
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    assert torch.equal(run(spec, q, k, v, attn_mask=torch.ones(shape).bool()), run(spec_of("tensor"), q, k, v))
    assert not run(spec, q, k, v, attn_mask=torch.zeros(shape).bool()).any()


def test_slopes_have_the_gradient_of_a_bias_made_of_them() -> None:
    q, k, v = (torch.randn(1, 2, 40, 16).requires_grad_() for _ in range(3))
    slopes = torch.rand(2, requires_grad=True)
    bias = -slopes.view(1, 2, 1, 1) * (torch.arange(40)[:, None] - torch.arange(40)).abs()
    grads = []
    for kind, named in (("alibi", {"alibi_slopes": slopes}), ("bias", {"bias": bias})):
        out = run(spec_of("block", mask=masks.Causal(), **{kind: True}), q, k, v, **named)
        grads.append(torch.autograd.grad(out.sin().sum(), slopes)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_refusals_name_the_cause() -> None:
    """Never chosen by itself, and by force only for what it emulates."""
    q = torch.randn(1, 1, 8, 16)
    for spec, word in ((AttentionSpec(), "compute"), (spec_of("tensor", score=scores.Additive()), "score"),
                       (spec_of("tensor", "int8"), "int8")):  # fmt: skip
        named = {"score_weight": torch.randn(1, 16)} if "score_weight" in spec.tensors() else {}
        with pytest.raises(attnreg.errors.UnsupportedError, match=word):
            run(spec, q, q, q, **named)


def test_equal_entries_do_not_become_an_outlier() -> None:
    """A row of equal entries is the worst of a Hadamard matrix without signs: it all lands in one entry."""
    turned = hadamard(torch.ones(1, 128))
    assert turned.square().sum().isclose(torch.tensor(128.0))
    assert turned.abs().max() < 4.0  # 128 ** 0.5 = 11.3 without signs
