"""Eager under torch.compile, export and torch.func: one graph, symbolic sizes, the same values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_cases import CASES, Case, lse, make
from torch import Tensor

from attnreg import AttentionSpec, masks
from attnreg_eager.run import attend

BY_NAME = {case.name: case for case in CASES}
FEW = ("everything", "kv-int8-paged", "thd-bias")
MORE = ("causal", "dv", "prefix-tensor", "document", "bigbird", "blocks", "additive", "general", "paged", "thd",
        "thd-bigbird", "paged-thd", "bshd")  # fmt: skip
TRACED = [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@torch._dynamo.nonstrict_trace
def in_graph(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, t: dict[str, Any]) -> Any:
    """The backend, put into the graph unseen as the dispatcher does."""
    return attend(spec, q, k, v, t)


def runner(spec: AttentionSpec) -> Any:
    return lambda q, k, v, t: in_graph(spec, q, k, v, t)


def results(function: Any, case: Case) -> list[Tensor]:
    q, k, v, t = make(case, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, t.get("bias"), t.get("sinks"), t.get("score_weight"),
                                           t.get("alibi_slopes"))
              if x is not None and x.dtype == torch.float32]  # fmt: skip
    out, l = function(q, k, v, t)  # noqa: E741  # lse is the helper's name
    grads = torch.autograd.grad((out * out.detach().cos()).sum() + l[l.isfinite()].sum(), leaves, allow_unused=True)
    return [out, l, *(torch.zeros(()) if x is None else x for x in grads)]


@pytest.mark.parametrize("name", TRACED)
def test_compiled_equals_eager(name: str) -> None:
    case = BY_NAME[name]
    torch._dynamo.reset()
    compiled = torch.compile(runner(lse(case.spec)), fullgraph=True, dynamic=True, backend="aot_eager")
    for got, want in zip(results(compiled, case), results(runner(lse(case.spec)), case), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["causal", "bigbird", "thd", "additive"])
def test_one_graph_for_all_lengths(name: str) -> None:
    """Symbolic sizes stay symbols: a longer call neither recompiles nor specialises."""
    case = BY_NAME[name]
    run = runner(case.spec)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 47, 64, 70):
        sq = [n, 3, n + 9] if name == "thd" else n
        q, k, v, t = make(Case(f"{name}-{n}", case.spec, sq=sq, skv=sq if name == "thd" else n + 5, b=3), torch.float32)
        got, want = compiled(q, k, v, t), run(q, k, v, t)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dropout_in_a_graph() -> None:
    """Output is linear in v, so <dL/dv, v> = L for L = sum(out): the backward keeps what the forward kept."""
    spec = AttentionSpec(dropout_p=0.4, mask=masks.Causal())
    run = runner(spec)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 2, 32, 8).unbind(0)
    v.requires_grad_()
    out = compiled(q, k, v, {})
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum(), rtol=1e-4, atol=1e-4)


def test_functional_transforms() -> None:
    """vmap over heads' worth of calls, and torch.func.grad, run without checkpoints."""
    spec = AttentionSpec(mask=masks.SlidingWindow(3))
    q, k, v = torch.randn(3, 5, 2, 2, 20, 8, dtype=torch.float64).unbind(0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(spec, q, k, v, {})
        return out

    torch.testing.assert_close(torch.vmap(run)(q, k, v), torch.stack([run(*x) for x in zip(q, k, v, strict=True)]))
    per_sample = torch.vmap(torch.func.grad(lambda q, k, v: run(q, k, v).sin().sum()))(q, k, v)
    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(sum(run(*x).sin().sum() for x in zip(leaf, k, v, strict=True)), leaf)
    torch.testing.assert_close(per_sample, want)


def test_export() -> None:
    """torch.export keeps a symbolic length."""

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return attend(AttentionSpec(mask=masks.Causal()), q, k, v, {})

    s = torch.export.Dim("s", min=4, max=4096)
    q = torch.randn(2, 2, 32, 8)
    program = torch.export.export(Layer(), (q, q, q), dynamic_shapes=({2: s}, {2: s}, {2: s}))
    x = torch.randn(2, 2, 77, 8)
    torch.testing.assert_close(program.module()(x, x, x), Layer()(x, x, x))


@pytest.mark.slow
def test_inductor() -> None:
    """The default compiler takes the graph too, with its backward."""
    case = BY_NAME["everything"]
    torch._dynamo.reset()
    compiled = torch.compile(runner(lse(case.spec)), fullgraph=True, dynamic=True)
    for got, want in zip(results(compiled, case), results(runner(lse(case.spec)), case), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
