"""Law: what a recorder keeps of packed sequences reads their lengths anew at each run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults.reference import attend, close
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import attnreg
from attnreg import AttentionSpec, masks

SPEC = AttentionSpec(mask=masks.Causal(), layout="thd")
Function = Callable[..., Any]


class Passing(TorchDispatchMode):
    """A mode that sees every operator and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Packed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return packed(q, k, v, cu)


def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    out: Tensor = attnreg.attention(SPEC, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    return out


def _in_mode(*example: Tensor) -> Function:
    def run(*inputs: Tensor) -> Any:
        with Passing():
            return packed(*inputs)

    return run


RECORDERS: dict[str, Callable[..., Function]] = {
    "make_fx_real": lambda *x: make_fx(packed, tracing_mode="real")(*x),
    "make_fx_fake": lambda *x: make_fx(packed, tracing_mode="fake")(*x),
    "make_fx_symbolic": lambda *x: make_fx(packed, tracing_mode="symbolic")(*x),
    "jit_trace": lambda *x: torch.jit.trace(packed, x, check_trace=False),
    "export": lambda *x: torch.export.export(Packed(), x).module(),
    "dispatch_mode": _in_mode,
}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_other_lengths_of_the_same_total(recorder: str, backend: str) -> None:
    draw = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(30, heads, 8, generator=draw) for heads in (4, 2, 2))
    first = torch.tensor([0, 10, 30], dtype=torch.int32)
    with attnreg.use_backend(backend), torch.no_grad():
        packed(q, k, v, first)
        program = RECORDERS[recorder](q, k, v, first)
        for cut in (20, 3, 29):
            got = program(q, k, v, torch.tensor([0, cut, 30], dtype=torch.int32))
            for rows in (slice(0, cut), slice(cut, 30)):
                one = [x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
                n = one[0].shape[2]
                want, _ = attend(*one, torch.ones(n, n).tril().bool())
                close(got[rows].transpose(0, 1).unsqueeze(0), want)
