"""Law: the native kernels run inside compiled and exported graphs, as one operator each way, with equal results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, masks, scores, sparsity

B, H, HKV, SQ, SKV, D = 2, 4, 2, 70, 90, 24
CAUSAL = masks.Causal()
CASES: dict[str, tuple[AttentionSpec, dict[str, Tensor]]] = {
    "window": (AttentionSpec(mask=CAUSAL & masks.SlidingWindow(9), softcap=5.0), {}),
    "bias_sinks_lse": (
        AttentionSpec(bias=True, sinks=True, return_lse=True),
        {"bias": torch.linspace(-1, 1, SKV).expand(1, H, 1, SKV).clone(), "sinks": torch.ones(H)},
    ),
    "bshd_padding": (
        AttentionSpec(mask=CAUSAL & masks.Padding(), layout="bshd", align="top_left"),
        {"kv_lengths": torch.tensor([SKV, 60])},
    ),
    "additive": (
        AttentionSpec(mask=CAUSAL, score=scores.Additive(), return_lse=True),
        {"score_weight": torch.linspace(-1, 1, H * D).view(H, D)},
    ),
    "general": (
        AttentionSpec(mask=CAUSAL, score=scores.General(), layout="bshd"),
        {"score_weight": torch.linspace(-0.3, 0.3, D * D).view(1, D, D)},
    ),
    "bigbird": (AttentionSpec(sparsity=sparsity.BigBird(16)), {}),
    "not_causal_dense": (
        AttentionSpec(mask=~CAUSAL | masks.Dense()),
        {"attn_mask": torch.arange(SQ * SKV).view(1, 1, SQ, SKV) % 3 == 0},
    ),
}


def inputs(spec: AttentionSpec, sq: int = SQ, skv: int = SKV) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(B, h, s, D, generator=generator) for h, s in ((H, sq), (HKV, skv), (HKV, skv))]
    return [x.transpose(1, 2).contiguous() if spec.layout == "bshd" else x for x in made]


def total(out: Any) -> Tensor:
    parts = out if isinstance(out, tuple) else (out,)
    return sum((x.float().sin().sum() for x in parts), torch.zeros(()))


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_graph_holds_one_operator_each_way(name: str) -> None:
    spec, named = CASES[name]
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    def step(q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Tensor]) -> Any:
        return attnreg.attention(spec, q, k, v, **tensors)

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    results = []
    with attnreg.use_backend("cpu"):
        for run in (step, compiled):
            leaves = [x.requires_grad_() for x in inputs(spec)]
            tensors = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in named.items()}
            q, k, v = leaves
            out = run(q, k, v, tensors)
            torch.autograd.backward(total(out))
            results.append((out, [x.grad for x in (*leaves, *tensors.values())]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert graphs[0].count("attnreg_cpu.forward") == 1
    assert graphs[1].count("attnreg_cpu.backward") == 1


def test_a_decode_step_in_a_compiled_graph() -> None:
    spec = AttentionSpec(mask=CAUSAL)
    torch._dynamo.reset()
    step = torch.compile(lambda q, k, v: attnreg.attention(spec, q, k, v), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), attnreg.use_backend("cpu"):
        for keys in (40, 41, 300, 1000):
            q, k, v = inputs(spec, 1, keys)
            torch.testing.assert_close(step(q, k, v), attnreg.attention(spec, q, k, v), rtol=1e-5, atol=1e-6)


def traced_call(spec: AttentionSpec) -> tuple[list[Tensor], tuple[Any, ...]]:
    """q, k and v that need gradients, and what else a compiled call of them gives the operator."""
    from attnreg_cpu import traced

    seen: list[tuple[Any, ...]] = []
    whole = traced._attend_for_gradients

    def note(*arguments: Any) -> Any:
        seen.append(arguments)
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch, attnreg.use_backend("cpu"):
        patch.setattr(traced, "_attend_for_gradients", note)
        torch._dynamo.reset()
        leaves = [x.requires_grad_() for x in inputs(spec)]
        torch.compile(lambda q, k, v: attnreg.attention(spec, q, k, v), fullgraph=True, backend="eager")(*leaves)
    return leaves, seen[-1][3:]


def test_operators_keep_their_promises_to_torch() -> None:
    """Schema, shapes under tracing, and autograd, as torch's own checker sees them."""
    leaves, rest = traced_call(AttentionSpec(mask=CAUSAL, return_lse=True))
    arguments = (*leaves, *rest)
    torch.library.opcheck(torch.ops.attnreg_cpu.forward_for_gradients.default, arguments)
    torch.library.opcheck(torch.ops.attnreg_cpu.forward.default, arguments)


def test_a_graph_saved_when_lse_had_no_second_word_still_runs() -> None:
    """Both operators as such a graph calls them: two results of the first, and no second word for the other."""
    leaves, rest = traced_call(AttentionSpec())
    new, lse, low = torch.ops.attnreg_cpu.forward_for_gradients(*leaves, *rest)
    out, same = torch.ops.attnreg_cpu.forward(*leaves, *rest)
    torch.testing.assert_close((out, same), (new, lse), rtol=0, atol=0)
    want = torch.autograd.grad(new.sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), want, rtol=1e-5, atol=1e-6)
    *named, problem, config = rest
    upstream = (out.detach(), lse.detach(), torch.ones_like(out), None, problem, config, [True] * 3 + [False] * 3)
    plain = [x.detach() for x in leaves]
    old = torch.ops.attnreg_cpu.backward(*plain, *named, *upstream)
    torch.testing.assert_close(old[:3], want, rtol=1e-5, atol=1e-6)
    exact = torch.ops.attnreg_cpu.backward(*plain, *named, *upstream, low)
    torch.testing.assert_close(exact[:3], want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["window", "bias_sinks_lse", "bigbird"])
def test_func_transforms(name: str) -> None:
    spec, named = CASES[name]
    q, k, v = inputs(spec)
    with attnreg.use_backend("cpu"):
        leaf = q.clone().requires_grad_()
        torch.autograd.backward(total(attnreg.attention(spec, leaf, k, v, **named)))
        slope = torch.func.grad(lambda x: total(attnreg.attention(spec, x, k, v, **named)))(q)
        torch.testing.assert_close(slope, leaf.grad)
        many = torch.stack([q, q + 1])
        got = torch.func.vmap(lambda x: total(attnreg.attention(spec, x, k, v, **named)))(many)
        want = torch.stack([total(attnreg.attention(spec, x, k, v, **named)) for x in many])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_custom_mask_is_refused_where_it_is_traced() -> None:
    spec = AttentionSpec(mask=masks.Custom(lambda b, h, p, j: p >= j))
    torch._dynamo.reset()
    step = torch.compile(lambda q, k, v: attnreg.attention(spec, q, k, v), fullgraph=True, backend="aot_eager")
    with attnreg.use_backend("cpu"), pytest.raises(Exception) as caught:  # noqa: PT011 - torch's own; ours is its cause
        step(*inputs(spec))
    chain: list[BaseException] = [caught.value]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(below)
    assert any(isinstance(e, attnreg.errors.UnsupportedError) and "Custom mask" in str(e) for e in chain)
