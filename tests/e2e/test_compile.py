"""Law: under torch.compile, torch.export and torch.func a call means what it means in eager mode, in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnreg
from attnreg import AttentionSpec, masks, scores

B, H, HKV, D = 2, 4, 2, 16


def spec_cases() -> dict[str, tuple[AttentionSpec, Any]]:
    causal = masks.Causal()
    return {
        "full": (AttentionSpec(), lambda sq, skv: {}),
        "causal": (AttentionSpec(mask=causal), lambda sq, skv: {}),
        "window_softcap": (AttentionSpec(mask=causal & masks.SlidingWindow(3), softcap=5.0), lambda sq, skv: {}),
        "padding": (
            AttentionSpec(mask=masks.Padding(), align="top_left"),
            lambda sq, skv: {"kv_lengths": torch.tensor([skv, skv - 2])},
        ),
        "bias_lse": (AttentionSpec(bias=True, return_lse=True), lambda sq, skv: {"bias": torch.ones(1, H, sq, skv)}),
        "alibi_sinks": (
            AttentionSpec(mask=causal, alibi=True, sinks=True),
            lambda sq, skv: {"alibi_slopes": torch.linspace(0.1, 1, H), "sinks": torch.ones(H)},
        ),
        "bshd": (AttentionSpec(mask=causal, layout="bshd"), lambda sq, skv: {}),
        "luong_dot": (AttentionSpec(score=scores.Dot()), lambda sq, skv: {}),
        "additive": (AttentionSpec(score=scores.Additive()), lambda sq, skv: {"score_weight": torch.ones(1, D)}),
    }


CASES = spec_cases()


def qkv(spec: AttentionSpec, sq: int, skv: int, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sq * 1000 + skv)
    shapes = ((B, H, sq, D), (B, HKV, skv, D), (B, HKV, skv, D))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    if spec.layout == "bshd":
        made = [x.transpose(1, 2).contiguous() for x in made]
    q, k, v = (x.requires_grad_(grad) for x in made)
    return q, k, v


@pytest.mark.parametrize("name", CASES)
def test_one_graph_forward_and_backward(name: str) -> None:
    spec, tensors = CASES[name]

    def step(q: Tensor, k: Tensor, v: Tensor, **named: Tensor) -> Any:
        out = attnreg.attention(spec, q * 2, k, v, **named)
        return tuple(x * 3 for x in out) if isinstance(out, tuple) else out * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaves = qkv(spec, 6, 9, grad=True)
        out = run(*leaves, **tensors(6, 9))
        total = sum(x.sum() for x in out) if isinstance(out, tuple) else out.sum()
        total.backward()
        results.append((out, [x.grad for x in leaves]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "causal", "window_softcap", "padding", "bias_lse", "alibi_sinks", "bshd"])
def test_growing_keys_do_not_recompile(name: str) -> None:
    spec, tensors = CASES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, k: Tensor, v: Tensor, **named: Tensor) -> Any:
        return attnreg.attention(spec, q, k, v, **named)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in range(4, 40):
            q, k, v = qkv(spec, 1, n)
            got, want = (run(q, k, v, **tensors(1, n)) for run in (compiled, step))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2, "one graph for the first length, one for every other"


def test_the_default_compiler_takes_it_too() -> None:
    spec = AttentionSpec(mask=masks.Causal())
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnreg.attention(spec, q, k, v)
        return out.relu()

    q, k, v = qkv(spec, 5, 5)
    torch.testing.assert_close(step(q, k, v), attnreg.attention(spec, q, k, v).relu(), rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    """A layer as a model author writes it: the spec is made once, in the constructor."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.project = nn.Linear(D, D)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnreg.attention(self.spec, self.project(q), k, v)


@pytest.mark.parametrize("name", ["full", "causal", "window_softcap", "luong_dot"])
def test_export_with_a_dynamic_number_of_keys(name: str) -> None:
    spec, _ = CASES[name]
    layer = Layer(spec).eval()
    keys = torch.export.Dim("keys", min=8, max=512)
    with torch.no_grad():
        program = torch.export.export(
            layer, qkv(spec, 6, 20), dynamic_shapes={"q": None, "k": {2: keys}, "v": {2: keys}}
        )
        for n in (8, 20, 77, 300):
            q, k, v = qkv(spec, 6, n)
            torch.testing.assert_close(program.module()(q, k, v), layer(q, k, v), rtol=1e-4, atol=1e-5)


def test_func_transforms_see_through() -> None:
    spec = AttentionSpec(mask=masks.Causal())
    q, k, v = qkv(spec, 5, 5)
    many = torch.stack([q, q + 1, q - 1])
    want = torch.stack([attnreg.attention(spec, x, k, v) for x in many])
    torch.testing.assert_close(torch.func.vmap(lambda x: attnreg.attention(spec, x, k, v))(many), want)
    leaf = q.clone().requires_grad_()
    attnreg.attention(spec, leaf, k, v).sin().sum().backward()
    slope = torch.func.grad(lambda x: attnreg.attention(spec, x, k, v).sin().sum())(q)
    torch.testing.assert_close(slope, leaf.grad)


def test_autocast_inside_a_compiled_region() -> None:
    spec = AttentionSpec(mask=masks.Causal())
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = attnreg.attention(spec, q, k, v)
        return out

    q, k, v = qkv(spec, 6, 6)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, step(q, k, v), rtol=2e-2, atol=2e-2)


def test_a_forced_backend_is_taken_at_trace_time() -> None:
    spec = AttentionSpec()
    torch._dynamo.reset()
    q, k, v = qkv(spec, 4, 4)
    step = torch.compile(lambda q, k, v: attnreg.attention(spec, q, k, v), fullgraph=True, backend="aot_eager")
    with attnreg.use_backend("eager"):
        torch.testing.assert_close(step(q, k, v), attnreg.attention(spec, q, k, v), rtol=1e-4, atol=1e-5)
