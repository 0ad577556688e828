"""What the flex backend computes equals attention by its definition in float64, compiled once for many sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import problem_of, reference, table
from torch import Tensor
from torch._dynamo.utils import counters

from attnreg import AttentionSpec, masks, scores, sparsity
from attnreg.hardware import detect
from attnreg_flex import Flex
from attnreg_flex.backend import compiler_missing

pytestmark = pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "-")
FLEX = Flex()
CPU = detect("cpu")
M = masks
LARGEST = torch.finfo(torch.float32).max
Config = dict[str, Any]


def _t(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _qkv(b: int, hq: int, hkv: int, sq: int, skv: int, d: int, dv: int) -> tuple[Tensor, Tensor, Tensor]:
    return _t(b, hq, sq, d, seed=1), _t(b, hkv, skv, d, seed=2), _t(b, hkv, skv, dv, seed=3)


def _prepare(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, config: Config | None = None, **named: Any
) -> Callable[..., Any]:
    problem = problem_of(spec, q, k, v, **named)
    assert FLEX.supports(problem, CPU) == []
    return FLEX.prepare(problem, FLEX.space(problem, CPU).check(config or {}))


def _close(got: Tensor, want: Tensor, bound: float = 3e-6) -> None:
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)


def test_one_compilation_serves_the_sizes_of_a_bucket() -> None:
    """Window or global tokens, 6 query heads on 2, Dv unlike D, layout bshd, strided inputs; rows before any key."""
    spec = AttentionSpec(mask=M.Causal() & (M.SlidingWindow(20) | M.Global((0, 3))), layout="bshd")
    call = None
    before = 0
    for sq, skv in ((70, 100), (90, 127), (127, 65), (100, 100)):
        q, k, v = _qkv(2, 6, 2, sq, skv, 16, 24)
        given = [x.transpose(1, 2) for x in (q, k, v)]
        kept = [x.clone() for x in given]
        call = call or _prepare(spec, *given)
        out = call(*given)
        live = table(
            lambda b, h, i, p, j: j <= p and (p - 20 <= j or p in (0, 3) or j in (0, 3)), 1, 1, sq, skv, [skv - sq]
        )
        _close(out.transpose(1, 2), reference(q, k, v, live)[0])
        assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), "an input was changed"
        assert before in (0, counters["stats"]["unique_graphs"]), "compiled again within a bucket"
        before = counters["stats"]["unique_graphs"]


def test_score_modifiers_padding_and_what_masked_keys_hold() -> None:
    """Scale, softcap, then bias (-inf rows, +-1e4) and ALiBi, then the mask; an empty sequence; huge masked values."""
    spec = AttentionSpec(mask=M.Padding() & M.Causal(), score=scores.ScaledDot(0.4), softcap=5.0, bias=True, alibi=True)
    lengths, slopes = torch.tensor([50, 0]), torch.tensor([0.5, 0.1, 0.3, 1.0])
    call = None
    for sq, skv in ((66, 90), (100, 70)):
        q, k, v = _qkv(2, 4, 2, sq, skv, 16, 16)
        bias = _t(1, 4, sq, skv).masked_fill(_t(1, 4, sq, skv, seed=9) > 1.5, -math.inf)
        bias[:, :, sq - 2] = -math.inf
        bias[:, :, sq - 3, 1] = 1e4
        bias[:, :, sq - 4, ::2] = -1e4
        named = {"kv_lengths": lengths, "bias": bias, "alibi_slopes": slopes}
        call = call or _prepare(spec, q, k, v, **named)
        shift = (lengths - sq).tolist()
        live = table(lambda b, h, i, p, j: j <= p and j < (50, 0)[b], 2, 1, sq, skv, shift)
        place = torch.arange(sq).view(1, 1, -1, 1) + torch.tensor(shift).view(-1, 1, 1, 1)
        added = bias.double() - slopes.double().view(1, -1, 1, 1) * (place - torch.arange(skv)).abs()
        want, _ = reference(q, k, v, live, scale=0.4, softcap=5.0, added=added)
        _close(call(q, k, v, **named), want, 2e-5)
        for x in (k, v):
            x[0, :, 50:] = LARGEST
            x[1] = -LARGEST
        _close(call(q, k, v, **named), want, 2e-5)


def test_random_blocks_are_the_specs_own() -> None:
    """BigBird's table of random blocks, with flex blocks that do not divide its own."""
    spec = AttentionSpec(sparsity=sparsity.BigBird(24, random_blocks=2), mask=M.Causal())
    q, k, v = _qkv(1, 3, 3, 150, 170, 16, 16)
    axes = [torch.arange(n) for n in (3, 150, 170)]
    h, i, j = axes[0].view(1, -1, 1, 1), axes[1].view(1, 1, -1, 1), axes[2].view(1, 1, 1, -1)
    at = M.Coords(b=torch.zeros(1, 1, 1, 1, dtype=torch.int64), h=h, i=i, p=i + 20, j=j)
    live = spec.sparsity.allows(at, 170) & (at.j <= at.p)
    _close(_prepare(spec, q, k, v, {"block_q": 32})(q, k, v), reference(q, k, v, live)[0])


def test_dense_mask_by_batch_and_head_in_half_precision() -> None:
    """Rows without any key give 0, in float16 itself; the mask may lack heads."""
    q, k, v = (x.to(torch.float16) for x in _qkv(2, 4, 2, 65, 70, 16, 16))
    holes = _t(2, 1, 65, 70) > 0.3
    holes[0, :, 7] = False
    holes[1, :, :64] = False  # a whole block of rows
    want, _ = reference(q, k, v, holes)
    out = _prepare(AttentionSpec(mask=M.Dense()), q, k, v, {"upcast": False}, attn_mask=holes)(q, k, v, attn_mask=holes)
    assert out.dtype == torch.float16
    assert not out[0, :, 7].any()
    assert not out[1, :, :64].any()
    _close(out, want, 3e-3)


def test_general_score_documents_and_offset_over_pages() -> None:
    """Luong's general score over a paged cache; a query may stand past the last key, where it has no document."""
    spec = AttentionSpec(score=scores.General(), mask=M.Document() | M.PrefixLM(), align="offset", page_size=16)
    pages = torch.randperm(10, generator=torch.Generator().manual_seed(1)).view(2, 5)
    q, k, v = _qkv(2, 2, 1, 9, 80, 16, 16)
    caches = []
    for x in (k, v):
        cache = torch.empty(10, 1, 16, 16)
        for b in range(2):
            for n in range(5):
                cache[pages[b, n]] = x[b, :, n * 16 : (n + 1) * 16]
        caches.append(cache)
    ids = (torch.arange(80) // 30).repeat(2, 1) * 7
    named = {
        "block_table": pages, "document_ids": ids, "prefix_lengths": torch.tensor([3, 0]),
        "query_offset": torch.tensor([75, 20]), "score_weight": _t(1, 16, 16) / 4, "seqused_k": torch.tensor([80, 41]),
    }  # fmt: skip

    def allowed(b: int, h: int, i: int, p: int, j: int) -> bool:
        same = p < 80 and ids[b, p] == ids[b, j]
        return bool(same or j < (3, 0)[b] or j <= p) and j < (80, 41)[b]

    live = table(allowed, 2, 1, 9, 80, [75, 20])
    out = _prepare(spec, q, *caches, **named)(q, *caches, **named)
    _close(out, reference(q, k, v, live, weight=named["score_weight"])[0], 2e-5)


def test_sizes_of_zero_need_no_kernel() -> None:
    for sizes in ((0, 2, 1, 5, 5, 8, 8), (2, 2, 1, 0, 5, 8, 8), (2, 2, 1, 5, 0, 8, 8)):
        q, k, v = _qkv(*sizes)
        out = _prepare(AttentionSpec(mask=M.Causal()), q, k, v)(q, k, v)
        assert out.shape == q.shape
        assert not out.any()
