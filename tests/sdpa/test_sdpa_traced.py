"""The sdpa backend inside torch.compile and torch.export: one graph, no recompilation as sizes grow, same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import reference
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnreg
from attnreg import AttentionSpec, masks, scores

M = masks
SPECS: list[tuple[AttentionSpec, dict[str, Any]]] = [
    (AttentionSpec(), {}),
    (AttentionSpec(mask=M.Causal()), {}),
    (AttentionSpec(mask=M.SlidingWindow(3)), {}),
    (AttentionSpec(mask=M.Padding() & M.Causal()), {"kv_lengths": torch.tensor([7, 0])}),
    (AttentionSpec(mask=M.Causal(), sinks=True, return_lse=True), {"sinks": torch.randn(4)}),
    (AttentionSpec(mask=M.Causal(), alibi=True), {"alibi_slopes": torch.rand(4)}),
    (AttentionSpec(score=scores.General()), {"score_weight": torch.randn(1, 16, 16) / 4}),
]


def _qkv(sq: int, skv: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(sq + skv)
    shapes = ((2, 4, sq, 16), (2, 2, skv, 16), (2, 2, skv, 16))
    return [torch.randn(*shape, generator=made).requires_grad_() for shape in shapes]


def _flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize(("spec", "named"), SPECS, ids=lambda x: str(x) if isinstance(x, AttentionSpec) else "")
def test_compiled_equals_eager_in_one_graph_for_all_sizes(spec: AttentionSpec, named: dict[str, Any]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, named: dict[str, Tensor]) -> Any:
        return attnreg.attention(spec, q, k, v, **named)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with attnreg.use_backend("sdpa"):
        compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
        for sq, skv in ((9, 13), (6, 17), (4, 30), (5, 70)):
            a, b = _qkv(sq, skv), _qkv(sq, skv)
            got, want = _flat(compiled(*a, named)), _flat(call(*b, named))
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, atol=2e-6, rtol=2e-6)
            torch.autograd.backward(got[0].square().sum())
            torch.autograd.backward(want[0].square().sum())
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_masked_keys_leave_no_trace_in_a_trace(value: float) -> None:
    """Where no value can be read, keys that only some rows attend are made harmless too."""
    spec = AttentionSpec(mask=M.SlidingWindow(2))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnreg.attention(spec, q, k, v)

    torch._dynamo.reset()
    q, k, v = (x.detach() for x in _qkv(9, 9))
    k[:, :, 4] = value
    with attnreg.use_backend("sdpa"):
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    live = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)
    want, _ = reference(q, k, v, live)
    blind = [0, 1, 2, 3, 7, 8]
    torch.testing.assert_close(got[:, :, blind].double(), want[:, :, blind], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(("spec", "name"), [
    (AttentionSpec(mask=M.Causal(), align="offset"), "query_offset"),
    (AttentionSpec(mask=M.Padding(), align="top_left"), "kv_lengths"),
    (AttentionSpec(mask=M.PrefixLM(), return_lse=True), "prefix_lengths"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_vmap_over_what_masks(spec: AttentionSpec, name: str) -> None:
    """Integers that differ in the mapped dimension, beside q, k and v that may not."""
    q, k, v = (x.detach() for x in _qkv(6, 9))
    values = torch.tensor([[3, 9], [0, 4], [1, 2]])

    def call(x: Tensor, values: Tensor) -> Any:
        return attnreg.attention(spec, x, k, v, **{name: values})

    with attnreg.use_backend("sdpa"):
        for rows, dims in ((torch.stack([q, -q, 2 * q]), (0, 0)), (q, (None, 0))):
            got = torch.vmap(call, in_dims=dims)(rows, values)
            want = [call(x, n) for x, n in zip(rows if dims[0] == 0 else [q] * 3, values, strict=True)]
            parts = zip(*(_flat(x) for x in want), strict=True)
            for a, b in zip(_flat(got), parts, strict=True):
                torch.testing.assert_close(a, torch.stack(b), atol=3e-6, rtol=3e-6)


def test_exported_with_dynamic_sizes() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return attnreg.attention(AttentionSpec(mask=M.Causal() & M.SlidingWindow(5)), q, k, v)

    with attnreg.use_backend("sdpa"), torch.no_grad():
        length = torch.export.Dim("length", min=2, max=64)
        program = torch.export.export(Layer(), tuple(_qkv(9, 9)), dynamic_shapes=({2: length},) * 3)
        for n in (9, 20):
            q, k, v = _qkv(n, n)
            torch.testing.assert_close(program.module()(q, k, v), Layer()(q, k, v), atol=2e-6, rtol=2e-6)
