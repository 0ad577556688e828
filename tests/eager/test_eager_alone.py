"""Gradients where one operand alone needs one, where nothing attends, and sizes of 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_cases import CASES, lse, make
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, masks, scores
from attnreg_eager import plan
from attnreg_eager.run import attend

BY_NAME = {case.name: case for case in CASES}
NAMED = ("bias", "sinks", "score_weight", "alibi_slopes")


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("tiny", [False, True], ids=["one-tile", "tiles"])
@pytest.mark.parametrize(
    "name", ["causal", "everything", "general", "additive", "paged", "thd-bias-row", "alibi-batch"]
)
def test_one_operand_alone(name: str, tiny: bool, twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is the one that it has beside all others, whichever result depends on it, and again differentiable.

    v reaches the output and not the lse.
    """
    if tiny:
        monkeypatch.setattr(plan, "BUDGET", 4000)
        monkeypatch.setattr(plan, "UPCAST", 700)
    spec = lse(BY_NAME[name].spec)
    q, k, v, t = make(BY_NAME[name])
    values = {"q": q, "k": k, "v": v, **t}

    def gradients(*names: str) -> list[Tensor]:
        given = {n: x.detach().clone() if isinstance(x, Tensor) else x for n, x in values.items()}
        leaves = [given[n].requires_grad_() for n in names]
        out, total = attend(spec, given.pop("q"), given.pop("k"), given.pop("v"), given)
        loss = out.sin().sum() + torch.where(total.isfinite(), total, 0.0).sum()
        return list(torch.autograd.grad(loss, leaves, create_graph=twice))

    every = [n for n in ("q", "k", "v", *NAMED) if n in values]
    for n, want in zip(every, gradients(*every), strict=True):
        (got,) = gradients(n)
        torch.testing.assert_close(got, want)
        assert got.requires_grad == twice


def nothing_packed() -> dict[str, Any]:
    return {"q": torch.randn(0, 2, 8), "k": torch.randn(5, 2, 8), "v": torch.randn(5, 2, 8),
            "cu_seqlens_q": torch.tensor([0, 0]), "cu_seqlens_k": torch.tensor([0, 5])}  # fmt: skip


def nothing_paged(pages: int) -> dict[str, Any]:
    return {"q": torch.randn(2, 2, 3, 8), "k": torch.randn(pages, 2, 4, 8), "v": torch.randn(pages, 2, 4, 8),
            "block_table": torch.zeros(2, 0, dtype=torch.int32)}  # fmt: skip


NOTHING = {
    "packed rows": (AttentionSpec(layout="thd", sinks=True, score=scores.General()), nothing_packed),
    "sequences": (
        AttentionSpec(layout="thd", alibi=True),
        lambda: {**nothing_packed(), "k": torch.randn(0, 2, 8), "v": torch.randn(0, 2, 8),
                 "cu_seqlens_q": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0])},
    ),
    "columns of a table": (AttentionSpec(page_size=4, sinks=True), lambda: nothing_paged(3)),
    "pages": (AttentionSpec(page_size=4, score=scores.General()), lambda: nothing_paged(0)),
}  # fmt: skip


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_to_attend(what: str) -> None:
    """Output and lse still are functions of whatever needs a gradient, which is 0."""
    spec, make_call = NOTHING[what]
    call = make_call()
    call |= {"sinks": torch.randn(2)} if spec.sinks else {}
    call |= {"score_weight": torch.randn(1, 8, 8)} if "score_weight" in spec.tensors() else {}
    call |= {"alibi_slopes": torch.rand(2)} if spec.alibi else {}
    for name in ("q", "k", "v", *(n for n in NAMED if n in call)):
        leaf = call[name].clone().requires_grad_()
        given = {**call, name: leaf}
        out = attend(spec, given.pop("q"), given.pop("k"), given.pop("v"), given)
        assert out.requires_grad
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert not grad.any()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_no_key_to_look_a_position_up_in(backend: str) -> None:
    q, none = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 0, 8)
    for mask, named in (
        (masks.Document(), {"document_ids": torch.zeros(2, 0, dtype=torch.int64)}),
        (~masks.Global(), {"global_mask": torch.zeros(2, 0, dtype=torch.bool)}),
    ):
        with attnreg.use_backend(backend):
            out, total = attnreg.attention(AttentionSpec(mask=mask, return_lse=True), q, none, none, **named)
        assert not out.any()
        assert total.isneginf().all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_dilated_reach_past_int64(backend: str) -> None:
    """Nothing lies further away than positions go: such a mask leaves the diagonal, or its complement takes it."""
    q, k, v = torch.randn(3, 1, 1, 4, 8).unbind(0)
    for n in (2**61, 2**62 - 1):
        with attnreg.use_backend(backend):
            out = attnreg.attention(AttentionSpec(mask=masks.Dilated(n, n)), q, k, v)
        torch.testing.assert_close(out, v)
