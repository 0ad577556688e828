"""Law: prefill and then one token at a time, from a contiguous or a paged cache, equals the full causal pass."""

from __future__ import annotations

import pytest
import torch

import attnreg
from attnreg import AttentionSpec, masks

CAUSAL = masks.Causal()
CASES = {
    "causal": AttentionSpec(mask=CAUSAL),
    "window": AttentionSpec(mask=CAUSAL & masks.SlidingWindow(5)),
    "chunked": AttentionSpec(mask=CAUSAL & masks.Chunked(8)),
    "dilated": AttentionSpec(mask=CAUSAL & masks.Dilated(8, 2)),
    "longformer": AttentionSpec(mask=CAUSAL & masks.longformer(6, (0, 9))),
    "not_window": AttentionSpec(mask=CAUSAL & ~masks.SlidingWindow(3)),
    "custom": AttentionSpec(mask=CAUSAL & masks.Custom(lambda b, h, p, j: (p + j) % 3 != h % 2)),
    "alibi": AttentionSpec(mask=CAUSAL, alibi=True, softcap=4.0),
}
B, H, HKV, S, D, PAGE, PREFILL = 2, 4, 2, 29, 16, 4, 11


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu", None])
@pytest.mark.parametrize("name", CASES)
def test_decoding_equals_the_full_pass(name: str, backend: str | None) -> None:
    spec = CASES[name]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(B, H, S, D, generator=generator)
    k, v = (torch.randn(B, HKV, S, D, generator=generator) for _ in "kv")
    named = {"alibi_slopes": torch.linspace(0.1, 0.6, H)} if spec.alibi else {}
    with attnreg.use_backend("eager"):
        want = attnreg.attention(spec, q, k, v, **named)
    if name == "alibi" and backend == "sdpa":
        with attnreg.use_backend("sdpa"), pytest.raises(attnreg.errors.UnsupportedError, match="softcap"):
            attnreg.attention(spec, q, k, v, **named)
        return
    paged = spec.model_copy(update={"page_size": PAGE})
    pages = -(-S // PAGE)
    table = torch.arange(B * pages).view(B, pages).flip(1)
    cache_k, cache_v = (_pages(x, table) for x in (k, v))
    steps = [(0, PREFILL), *((n, n + 1) for n in range(PREFILL, S))]
    with attnreg.use_backend(backend) if backend else torch.no_grad():
        for start, end in steps:
            rows = q[:, :, start:end]
            out = attnreg.attention(spec, rows, k[:, :, :end], v[:, :, :end], **named)
            torch.testing.assert_close(out, want[:, :, start:end], rtol=1e-4, atol=1e-5)
            used = {"block_table": table, "seqused_k": torch.full((B,), end)}
            out = attnreg.attention(paged, rows, cache_k, cache_v, **used, **named)
            torch.testing.assert_close(out, want[:, :, start:end], rtol=1e-4, atol=1e-5)


def _pages(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [B, Hkv, S, D] laid into pages where the table says; what lies behind the last row is stale."""
    batch, heads, rows, dim = x.shape
    cache = torch.full((table.numel(), heads, PAGE, dim), 1e4)
    for b in range(batch):
        for row in range(rows):
            cache[table[b, row // PAGE], :, row % PAGE] = x[b, :, row]
    return cache
