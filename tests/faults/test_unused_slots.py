"""Law: slots that are not used leave no trace, whatever they hold, NaN and infinities included, on every CPU backend.

The reference is written here: a softmax in float64 over the keys that are used, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, errors, masks, scores
from attnreg.spec import Precision

B, HQ, HKV, SQ, SKV, D, PAGE = 2, 4, 2, 9, 48, 16, 16
LENGTHS = torch.tensor([30, 17])
TABLE = torch.tensor([[3, 5, -1], [7, 0, -1]], dtype=torch.int32)
HOLDS = (torch.nan, torch.inf, -torch.inf, 3e38)
CAUSAL = masks.Padding() & masks.Causal()
BACKENDS = ("eager", "sdpa", "cpu")


@dataclass(frozen=True)
class Call:
    """A call's arguments; dense: its keys, values and bias as plain [B, H, Skv, ..] tensors of the same graph."""

    spec: AttentionSpec
    leaves: list[Tensor]
    named: dict[str, Tensor]
    dense: Callable[[list[Tensor]], list[Tensor]]


def _numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _padded(holds: float, dtype: torch.dtype, sq: int = SQ, bias: bool = False, **fields: object) -> Call:
    q, k, v = (_numbers(n, B, h, s, D, dtype=dtype) for n, (h, s) in enumerate(((HQ, sq), (HKV, SKV), (HKV, SKV))))
    leaves, named = [q, k, v], {"kv_lengths": LENGTHS}
    for b, n in enumerate(LENGTHS):
        k[b, :, n:] = holds
        v[b, :, n:] = holds
    if bias:
        leaves.append(_numbers(3, B, HQ, sq, SKV, dtype=dtype))
        for b, n in enumerate(LENGTHS):
            leaves[3][b, ..., n:] = holds
        named["bias"] = leaves[3]
    spec = AttentionSpec(**{"mask": CAUSAL, "bias": bias, **fields})  # type: ignore[arg-type]  # fields of a table
    return Call(spec, leaves, named, lambda xs: xs)


def _by_heads_last(holds: float, dtype: torch.dtype) -> Call:
    call = _padded(holds, dtype)
    leaves = [x.transpose(1, 2).contiguous() for x in call.leaves]
    spec = call.spec.model_copy(update={"layout": "bshd"})
    return Call(spec, leaves, call.named, lambda xs: [x.transpose(1, 2) for x in xs])


def _in_pages(holds: float, dtype: torch.dtype, sq: int = SQ) -> Call:
    q = _numbers(0, B, HQ, sq, D, dtype=dtype)
    caches = [torch.full((9, HKV, PAGE, D), holds).to(dtype) for _ in range(2)]
    for seed, cache in enumerate(caches):
        for b, n in enumerate(LENGTHS.tolist()):
            x = _numbers(5 + seed, B, HKV, SKV, D, dtype=dtype)[b]
            for page in range(-(-n // PAGE)):
                count = min(PAGE, n - page * PAGE)
                cache[TABLE[b, page], :, :count] = x[:, page * PAGE : page * PAGE + count]

    def dense(xs: list[Tensor]) -> list[Tensor]:
        return [xs[0], *(x[TABLE.long().clamp(min=0)].transpose(1, 2).flatten(2, 3) for x in xs[1:3])]

    spec = AttentionSpec(mask=masks.Causal(), page_size=PAGE)
    return Call(spec, [q, *caches], {"block_table": TABLE, "seqused_k": LENGTHS.int()}, dense)


def _union(holds: float, dtype: torch.dtype) -> Call:
    """Masks that no interval says, each side of which keeps to the lengths; flags of keys that nobody uses are set."""
    either = masks.Padding() & (masks.Causal() | masks.Global())
    call = _padded(holds, dtype, mask=either)
    flags = torch.zeros(B, SKV, dtype=torch.bool)
    for b, n in enumerate(LENGTHS):
        flags[b, n:] = True
    return Call(call.spec, call.leaves, {**call.named, "global_mask": flags}, call.dense)


CASES: dict[str, Callable[[float, torch.dtype], Call]] = {
    "padding": _padded,
    "bias": lambda holds, dtype: _padded(holds, dtype, bias=True),
    "decode": lambda holds, dtype: _padded(holds, dtype, sq=1, mask=masks.Padding()),
    "softcap": lambda holds, dtype: _padded(holds, dtype, softcap=5.0),
    "heads_last": _by_heads_last,
    "union": _union,
    "pages": _in_pages,
    "pages_decode": lambda holds, dtype: _in_pages(holds, dtype, sq=1),
}


def _reference(call: Call) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of its sum of squares, in float64, over used keys alone."""
    leaves = [x.double().requires_grad_() for x in call.leaves]
    q, k, v, *bias = call.dense(leaves)
    outs, sq = [], q.shape[2]
    for b, n in enumerate(LENGTHS.tolist()):
        keys, values = (x[b, :, :n].repeat_interleave(HQ // HKV, 0) for x in (k, v))
        s = q[b] @ keys.mT * D**-0.5
        if call.spec.softcap:
            s = call.spec.softcap * torch.tanh(s / call.spec.softcap)
        if bias:
            s = s + bias[0][b, ..., :n]
        late = torch.arange(n) > (torch.arange(sq) + n - sq)[:, None]
        outs.append(torch.softmax(s.masked_fill(late, -torch.inf), -1) @ values)
    out = torch.stack(outs)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    return (out.transpose(1, 2) if call.spec.layout == "bshd" else out).detach(), list(grads)


def _run(name: str, call: Call, grad: bool) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_(grad) for x in call.leaves]
    named = {n: leaves[3] if n == "bias" else x for n, x in call.named.items()}
    with attnreg.use_backend(name):
        out = attnreg.attention(call.spec, *leaves[:3], **named)
    grads = torch.autograd.grad(out.float().square().sum(), leaves) if grad else []
    return out.detach(), list(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_unused_slots_hold_leaves_no_trace(name: str, case: str, grad: bool, dtype: torch.dtype) -> None:
    clean = CASES[case](0.0, dtype)
    try:
        out, grads = _run(name, clean, grad)
    except errors.AttnregError:
        if name == "eager":
            raise
        return  # refused with its reasons, whatever the slots hold
    want, want_grads = _reference(clean)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(out.double(), want, atol=bound, rtol=bound)
    for got, right in zip(grads, want_grads, strict=False):
        torch.testing.assert_close(got.double(), right, atol=4 * bound, rtol=4 * bound)
    for holds in HOLDS:
        dirty = CASES[case](holds, dtype)
        again, grads_again = _run(name, dirty, grad)
        assert torch.equal(again, out), holds
        for leaf, got, before in zip(dirty.leaves if grad else [], grads_again, grads, strict=True):
            assert torch.equal(got, before), holds
            assert not got[~leaf.isfinite()].any(), "an unused slot has a gradient"


@pytest.mark.parametrize("kv", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("sq", [1, SQ])
@pytest.mark.parametrize("name", BACKENDS)
def test_codes_and_factors_of_unused_blocks(name: str, sq: int, kv: str) -> None:
    """8-bit codes of NaN, and factors of blocks in which no key is used."""
    dtype = getattr(torch, kv)
    results = []
    for code, factor in ((0, 1.0), (127, torch.nan), (127, torch.inf)):
        q = _numbers(0, B, HQ, sq, D, dtype=torch.float32)
        k, v = (_numbers(n, B, HKV, SKV, D, dtype=torch.float32).mul(20).to(dtype) for n in (1, 2))
        scales = [torch.full((B, HKV, 6), 0.05) for _ in range(2)]  # blocks of 8 keys
        for b, n in enumerate(LENGTHS.tolist()):
            for x, scale in zip((k, v), scales, strict=True):
                x.view(torch.uint8)[b, :, n:] = code
                scale[b, :, -(-n // 8) :] = factor
        spec = AttentionSpec(mask=CAUSAL, dtype=Precision(kv=kv, scaling="block"))
        with attnreg.use_backend(name):
            named = {"kv_lengths": LENGTHS, "k_descale": scales[0], "v_descale": scales[1]}
            results.append(attnreg.attention(spec, q, k, v, **named))
    assert results[0].isfinite().all()
    assert all(torch.equal(x, results[0]) for x in results[1:])


@pytest.mark.parametrize("name", ["eager", "eager_fp8", "cpu"])
def test_scales_that_are_taken_leave_them_out(name: str) -> None:
    """Quantising takes the largest value of what is used."""
    outs = []
    for holds in (0.0, *HOLDS):
        call = _padded(holds, torch.float32)
        call = replace(call, spec=call.spec.model_copy(update={"dtype": Precision(compute="float8_e4m3fn")}))
        outs.append(_run(name, call, grad=True))
    for out, grads in outs[1:]:
        assert all(torch.equal(x, y) for x, y in zip((out, *grads), (outs[0][0], *outs[0][1]), strict=True))


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_additive_scores(name: str) -> None:
    outs = []
    for holds in (0.0, *HOLDS):
        call = _padded(holds, torch.float32, score=scores.Additive())
        call.named["score_weight"] = _numbers(4, HQ, D, dtype=torch.float32)
        outs.append(_run(name, call, grad=True))
    for out, grads in outs[1:]:
        assert all(torch.equal(x, y) for x, y in zip((out, *grads), (outs[0][0], *outs[0][1]), strict=True))


@pytest.mark.parametrize("case", ["padding", "pages_decode"])
def test_compiled_flex(case: str) -> None:
    clean = CASES[case](0.0, torch.float32)
    out, _ = _run("flex", clean, grad=False)
    torch.testing.assert_close(out.double(), _reference(clean)[0], atol=1e-5, rtol=1e-5)
    for holds in HOLDS:
        assert torch.equal(_run("flex", CASES[case](holds, torch.float32), grad=False)[0], out)


def test_a_mask_that_lets_them_attend_uses_them() -> None:
    """Under `|` a key behind the length may be attended, and then its NaN shows."""
    assert masks.within_lengths(CAUSAL)
    assert masks.within_lengths((masks.Padding() & masks.Chunked(4)) | CAUSAL)
    assert masks.within_lengths(~(~masks.Padding() | masks.Causal()))
    assert not masks.within_lengths(masks.Padding() | masks.Causal())
    assert not masks.within_lengths(~masks.Padding() & masks.Causal())
    call = _padded(torch.nan, torch.float32, mask=masks.Padding() | masks.Global((40,)))
    for name in BACKENDS:
        assert _run(name, call, grad=False)[0].isnan().any()
