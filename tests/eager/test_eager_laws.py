"""Laws of the eager backend: what leaves no trace, what equals what, gradients of gradients, bounded memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from eager_cases import CASES, HUGE, Case, lse, make
from torch import Tensor

from attnreg import AttentionSpec, masks, scores, sparsity
from attnreg_eager import plan
from attnreg_eager.run import attend, exact

BY_NAME = {case.name: case for case in CASES}
CAUSAL = [
    AttentionSpec(mask=masks.Causal()),
    AttentionSpec(mask=masks.SlidingWindow(5)),
    AttentionSpec(mask=masks.Chunked(8) & masks.Causal()),
    AttentionSpec(mask=masks.Causal() & (masks.Dilated(5, 3) | masks.Global((0, 1)))),
    AttentionSpec(mask=masks.Causal(), alibi=True, softcap=3.0, sinks=True),
    AttentionSpec(mask=masks.Causal(), sparsity=sparsity.Strided(4, 2, 3)),
    AttentionSpec(mask=masks.Causal(), score=scores.Additive()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["padding-causal", "paged", "window", "dense", "blocks", "softcap", "additive", "bias",
                                  "thd", "everything", "paged-thd", "general"])  # fmt: skip
def test_masked_keys_leave_no_trace(name: str, dtype: torch.dtype) -> None:
    """Keys that no row may attend: the largest finite values there change not one bit, gradients included."""
    case = BY_NAME[name]
    spec = lse(case.spec)
    q, k, v, t = make(case, dtype)
    g = torch.Generator().manual_seed(3)
    if spec.bias:
        t["bias"] = torch.where(t["bias"].abs() > 100, 0.0, t["bias"])  # 1e4 hides keys that a row does attend
        t["bias"][..., ::3] = -torch.inf
    unseen = _unseen(spec, q, k, v, t)
    assert name in ("window", "dense", "blocks", "softcap", "additive", "general") or unseen.any()
    results = []
    for fill in (0.0, HUGE[dtype]):
        signs = [torch.where(torch.rand(x.shape, generator=g) < 0.5, -fill, fill).to(dtype) for x in (k, v)]
        xs = [q.clone(), torch.where(unseen, signs[0], k), torch.where(unseen, signs[1], v)]
        for x in xs:
            x.requires_grad_()
        out, total = attend(spec, xs[0], xs[1], xs[2], t)
        loss = out.float().sin().sum() + torch.where(total.isfinite(), total, 0).sum()
        results.append([out, total, *torch.autograd.grad(loss, xs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


def _unseen(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, t: dict[str, Any]) -> Tensor:
    """True at the rows of v (and so of k) that no output depends on, found by the gradient of a linear function."""
    ones = torch.ones_like(v.float()).requires_grad_()
    out, _ = attend(
        spec, q.float(), k.float(), ones, {n: x.float() if x.is_floating_point() else x for n, x in t.items()}
    )
    if not out.requires_grad:
        return torch.ones_like(v[..., :1], dtype=torch.bool)
    (grad,) = torch.autograd.grad(out.sum(), ones)
    return (grad == 0).all(-1, keepdim=True)


@pytest.mark.parametrize("fill", ["zero", "bias"])
def test_empty_rows(fill: str) -> None:
    """Rows without a key: out 0, lse -inf, every gradient 0, in every dtype; the rest is untouched."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q, k, v = (torch.randn(1, 2, 9, 8, dtype=dtype).requires_grad_() for _ in range(3))
        dead = torch.tensor([0, 3, 8])
        if fill == "bias":
            bias = torch.zeros(1, 1, 9, 9, dtype=dtype)
            bias[:, :, dead] = -torch.inf
            spec, t = AttentionSpec(bias=True, softcap=2.0, return_lse=True), {"bias": bias.requires_grad_()}
        else:
            mask = torch.ones(9, 9, dtype=torch.bool)
            mask[dead] = False
            spec, t = AttentionSpec(mask=masks.Dense(), return_lse=True), {"attn_mask": mask}
        out, total = attend(spec, q, k, v, t)
        assert (out[:, :, dead] == 0).all()
        assert total[:, :, dead].isneginf().all()
        grads = torch.autograd.grad(out.sum() + total.sum(), [q, k, v, *(x for x in t.values() if x.requires_grad)])
        assert (grads[0][:, :, dead] == 0).all()
        assert all(x.isfinite().all() for x in grads)


def test_large_logits_and_low_lse() -> None:
    """Logits of +-1e4 and lse far below -88 stay exact to float32."""
    q, k, v = (torch.randn(1, 1, 33, 16) for _ in range(3))
    for scale, shift in ((1e4, 0.0), (1.0, -500.0)):
        spec = AttentionSpec(score=scores.ScaledDot(scale=scale), bias=True, return_lse=True)
        bias = torch.full((1, 1, 1, 33), shift)
        got, want = attend(spec, q, k, v, {"bias": bias}), attend(
            spec, q.double(), k.double(), v.double(), {"bias": bias.double()})  # fmt: skip
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-3 if scale > 1 else 1e-4)
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3, atol=2e-2 if scale > 1 else 1e-5)


@pytest.mark.parametrize("spec", CAUSAL, ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_decoding_equals_teacher_forcing(spec: AttentionSpec, paged: bool) -> None:
    """A prefill and then one token at a time equals the full causal pass."""
    n, prefill, page = 27, 9, 4
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h in (4, 2, 2))
    t: dict[str, Any] = {}
    if spec.alibi:
        t["alibi_slopes"] = torch.rand(4, dtype=torch.float64)
    if spec.sinks:
        t["sinks"] = torch.randn(4, dtype=torch.float64)
    if "score_weight" in spec.tensors():
        t["score_weight"] = torch.randn(1, 8, dtype=torch.float64)
    want = attend(spec, q, k, v, t)
    parts, edges = [], [prefill, *range(prefill + 1, n + 1)]
    for start, stop in zip([0, *edges], edges, strict=False):
        if not paged:
            parts.append(attend(spec, q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], t))
            continue
        # One page of each sequence after another, in an order of its own; what lies beyond is stale.
        width = -(-n // page)
        pool = torch.full((2, 2 * width, 2, page, 8), 3e38, dtype=torch.float64)
        table = torch.randperm(2 * width).reshape(2, width)
        for x, pages in zip((k, v), pool, strict=True):
            for j in range(stop):
                pages[table[:, j // page], :, j % page] = x[:, :, j]
        used = {"block_table": table.int(), "seqused_k": torch.tensor([stop, stop])}
        on = spec.model_copy(update={"page_size": page})
        parts.append(attend(on, q[:, :, start:stop], pool[0], pool[1], {**t, **used}))
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=1e-10, atol=1e-12)


def test_layouts_agree() -> None:
    """thd equals a loop over its sequences equals a right-padded batch; bshd equals bhsd."""
    spec = AttentionSpec(mask=masks.SlidingWindow(6, 2), alibi=True, return_lse=True)
    lens_q, lens_k = [5, 0, 13, 8], [9, 4, 13, 0]
    slopes = {"alibi_slopes": torch.rand(4, dtype=torch.float64)}
    qs, ks, vs = ([torch.randn(n, h, 8, dtype=torch.float64) for n in lens]
                  for lens, h in ((lens_q, 4), (lens_k, 2), (lens_k, 2)))  # fmt: skip
    cu = {
        f"cu_seqlens_{x}": torch.tensor([0, *torch.tensor(lens).cumsum(0)])
        for x, lens in (("q", lens_q), ("k", lens_k))
    }
    thd = spec.model_copy(update={"layout": "thd"})
    out, total = attend(thd, torch.cat(qs), torch.cat(ks), torch.cat(vs), {**cu, **slopes})
    bshd = spec.model_copy(update={"layout": "bshd"})
    loop = [attend(bshd, q[None], k[None], v[None], slopes) for q, k, v in zip(qs, ks, vs, strict=True)]
    torch.testing.assert_close(out, torch.cat([x[0][0] for x in loop]))
    torch.testing.assert_close(total, torch.cat([x[1][0] for x in loop], 1))

    pad = torch.nn.utils.rnn.pad_sequence
    batch = [pad(xs, batch_first=True, padding_value=9e9).transpose(1, 2) for xs in (qs, ks, vs)]
    # Rows sit on the time line by their own lengths: position of row i is i + length_k - length_q.
    offset = spec.model_copy(update={"align": "offset", "mask": spec.mask & masks.Padding()})
    named = {"kv_lengths": torch.tensor(lens_k), "query_offset": torch.tensor(lens_k) - torch.tensor(lens_q)}
    padded, padded_lse = attend(offset, *batch, {**named, **slopes})
    for b, n in enumerate(lens_q):
        start = sum(lens_q[:b])
        torch.testing.assert_close(padded[b, :, :n].transpose(0, 1), out[start : start + n])
        torch.testing.assert_close(padded_lse[b, :, :n], total[:, start : start + n])


@pytest.mark.parametrize("tiny", [False, True], ids=["one-tile", "tiles"])
@pytest.mark.parametrize(
    "name", ["causal-more-rows", "additive", "general", "everything", "thd-bias", "paged", "dense"]
)
def test_gradcheck(name: str, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, and gradients of gradients, against finite differences; through recomputed tiles as well."""
    case = BY_NAME[name]
    shrunk = {
        "sq": 5,
        "skv": 6 if case.spec.page_size is None else 8,
        "d": 3,
        "dv": 2,
        "dk": 0,
        "b": 2,
        "hq": 2,
        "hkv": 1,
    }
    if case.spec.layout == "thd":
        shrunk |= {"sq": [3, 2], "skv": [4, 3] if case.spec.page_size is None else 8}
    bias = (1, 1, 3 if case.spec.layout == "thd" else 5, 4 if case.spec.layout == "thd" else 6) if case.bias else ()
    small = Case(name, lse(case.spec), **shrunk, bias=bias, extra={"attn_mask": (5, 6)})
    if tiny:
        monkeypatch.setattr(plan, "BUDGET", 20)
        monkeypatch.setattr(plan, "UPCAST", 40)
    q, k, v, t = make(small)
    names = [n for n in ("bias", "sinks", "score_weight", "alibi_slopes") if n in t]
    if "bias" in t:
        t["bias"] = torch.where(t["bias"].abs() > 100, -torch.inf, t["bias"])  # 1e4 swamps finite differences
        names.remove("bias")

    def function(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        out, total = exact(small.spec, q, k, v, {**t, **dict(zip(names, more, strict=True))})
        return out, torch.where(total.isfinite(), total, 0.0)

    if "sinks" in t:
        t["sinks"] = torch.randn(2, dtype=torch.float64)
    xs = [x.requires_grad_() for x in (q, k, v, *(t[n] for n in names))]
    assert torch.autograd.gradcheck(function, xs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, xs, fast_mode=True)


def test_dropout() -> None:
    """Repeats from a generator; kept in the backward; right mean and variance; differs between calls."""
    p = 0.3
    spec = AttentionSpec(dropout_p=p, return_lse=True)
    q, k = torch.randn(2, 2, 4, 64, 16).unbind(0)
    v = torch.ones(2, 4, 64, 8).requires_grad_()

    def run(seed: int | None, v: Tensor = v) -> tuple[Tensor, Tensor]:
        named = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
        out: tuple[Tensor, Tensor] = attend(spec, q, k, v, named)
        return out

    out, total = run(7)
    assert torch.equal(out, run(7)[0])
    assert not torch.equal(out, run(8)[0])
    torch.manual_seed(5)
    first, second = run(None)[0], run(None)[0]
    torch.manual_seed(5)
    assert torch.equal(first, run(None)[0])
    assert not torch.equal(first, second)
    # lse is that of the undropped softmax; the mean of the output with v = 1 is 1.
    torch.testing.assert_close(total, attend(spec.model_copy(update={"dropout_p": 0.0}), q, k, v, {})[1])
    weights = torch.softmax(q @ k.mT / 4, -1)
    variance = (weights.square().sum(-1) * p / (1 - p)).mean()
    sums = torch.cat([run(seed)[0][..., :1].detach().flatten() for seed in range(50)])
    assert abs(float(sums.mean()) - 1) < 6 * float((variance / sums.numel()).sqrt())
    assert abs(float(sums.var() / variance) - 1) < 0.1
    # Linear in v, so <dL/dv, v> = L where the backward keeps what the forward kept.
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())


@pytest.mark.parametrize("name", ["causal", "thd", "additive"])
def test_dropout_in_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile recomputed in the backward draws the mask that it drew in the forward."""
    monkeypatch.setattr(plan, "BUDGET", 300)
    case = BY_NAME[name]
    q, k, v, t = make(case)
    v.requires_grad_()
    q.requires_grad_()
    spec = case.spec.model_copy(update={"dropout_p": 0.5})
    out = attend(spec, q, k, v, {**t, "generator": torch.Generator().manual_seed(1)})
    again = attend(spec, q.detach(), k, v.detach(), {**t, "generator": torch.Generator().manual_seed(1)})
    torch.testing.assert_close(out, again)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())


def test_inputs_are_not_changed_and_autocast_is_off() -> None:
    """Autocast around the call changes nothing; expanded and transposed inputs are read as they are."""
    q = torch.randn(2, 1, 30, 16).expand(2, 4, 30, 16)
    k, v = torch.randn(2, 2, 40, 2, 16).transpose(2, 3).unbind(0)
    before = [x.clone() for x in (q, k, v)]
    spec = AttentionSpec(mask=masks.Causal())
    want = attend(spec, q.contiguous(), k.contiguous(), v.contiguous(), {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(spec, q, k, v, {})
    torch.testing.assert_close(got, want)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


MEMORY = """
import resource, sys, torch
from attnreg import AttentionSpec, masks, scores
from attnreg_eager.run import attend, exact
s, score = int(sys.argv[1]), getattr(scores, sys.argv[2])()
torch.set_num_threads(1)
def once(n):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    t = {"score_weight": torch.randn(1, 16)} if sys.argv[2] == "Additive" else {}
    attend(AttentionSpec(mask=masks.Causal(), score=score), q, k, v, t).sum().backward()
from attnreg_eager import plan
plan.BUDGET, large = 1 << 12, plan.BUDGET
once(512)  # whatever is loaded on first use
plan.BUDGET = large
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
once(s)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(
    ("score", "s", "part"), [("ScaledDot", 16384, 3), pytest.param("Additive", 4096, 3, marks=pytest.mark.slow)]
)
def test_memory_is_bounded(score: str, s: int, part: int) -> None:
    """Forward and backward take a small part of one S x S float32 matrix (additive: of S x S x D)."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(s), score], capture_output=True, text=True, check=True)
    whole = s * s * 4 * (16 if score == "Additive" else 1)
    assert int(done.stdout) < whole / part, f"{int(done.stdout) / 2**20:.0f} MiB of {whole / 2**20:.0f}"
