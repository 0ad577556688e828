"""Law: keys that a query may not attend leave no trace, in values or gradients, whatever finite numbers they hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_cases import Case
from test_forward import prepare
from torch import Tensor

from attnreg import AttentionSpec, masks
from attnreg_cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

LARGEST = {torch.float32: 3.0e38, torch.float16: 65504.0, torch.bfloat16: 3.0e38}
Dead = Callable[[Tensor], Tensor]


def _case(mask: masks.Mask, **named: Tensor) -> Case:
    return Case(
        str(mask), AttentionSpec(mask=mask, return_lse=True), batch=2, sq=70, skv=150, make=lambda g: dict(named)
    )


FROM_90 = torch.arange(150) >= 90
KEPT = torch.rand(150, generator=torch.Generator().manual_seed(0)) < 0.5
# Each case with the keys that no row of it attends.
CASES = [
    (_case(masks.Padding(), kv_lengths=torch.tensor([90, 90])), FROM_90),
    (_case(masks.Causal() & masks.Padding(), kv_lengths=torch.tensor([90, 90])), FROM_90),
    (_case(masks.Dense(), attn_mask=KEPT[None, :]), ~KEPT),
    (_case(masks.SlidingWindow(10, 10)), torch.arange(150) < 69),
    (_case(masks.Document(), document_ids=torch.arange(150)[None].expand(2, -1) // 75 * KEPT), torch.zeros(150).bool()),
    (_case(masks.Padding() & (masks.Causal() | masks.Dilated(9, 2)), kv_lengths=torch.tensor([90, 90])), FROM_90),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "dead"), CASES, ids=[str(case) for case, _ in CASES])
def test_dead_keys_leave_no_trace(case: Case, dead: Tensor, dtype: torch.dtype) -> None:
    results = []
    for value in (0.0, LARGEST[dtype], -LARGEST[dtype]):
        q, k, v, named = case.draw(dtype)
        k[:, :, dead] = value
        v[:, :, dead] = -value
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = prepare(case, q, k, v, named)(q, k, v, **named)
        total = out.float().sum() + torch.where(lse.isinf(), 0.0, lse).sum()
        results.append([out, lse, *torch.autograd.grad(total, leaves)])
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)
    assert all(not x.isnan().any() for x in results[0])
    assert (results[0][3][:, :, dead] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_row_sees_what_another_may_not(dtype: torch.dtype) -> None:
    """The last row attends a huge key, which must not reach the rows above it within the same tile."""
    case = _case(masks.Causal())
    q, k, v, named = case.draw(dtype)
    call = prepare(case, q, k, v, named)
    before = call(q, k, v)[0][:, :, :-1]
    k[:, :, -1] = LARGEST[dtype]
    v[:, :, -1] = LARGEST[dtype]
    assert torch.equal(call(q, k, v)[0][:, :, :-1], before)
