"""merge_states: attention over any split of the keys, merged, is attention over all of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, errors, masks, merge_states

few = settings(max_examples=60, deadline=None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) from the definition; empty rows give 0 and -inf."""
    score = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        score = torch.cat([score, sinks.view(1, -1, 1, 1).expand(*score.shape[:3], 1)], -1)
    empty = (score == -torch.inf).all(-1)
    lse = torch.logsumexp(torch.where(empty.unsqueeze(-1), 0.0, score), -1)
    weight = torch.exp(score - lse.unsqueeze(-1))[..., : k.shape[-2]]
    return weight @ v, torch.where(empty, -torch.inf, lse)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, list[int]]:
    batch, heads, sq, skv, d, dv = (draw(st.integers(1, n)) for n in (2, 2, 5, 12, 4, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    size = draw(st.sampled_from([1.0, 30.0]))
    q, k, v = (
        torch.randn(batch, heads, n, w, generator=g, dtype=torch.float64) * size
        for n, w in ((sq, d), (skv, d), (skv, dv))
    )
    mask = torch.rand(batch, heads, sq, skv, generator=g) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    cuts = sorted(draw(st.lists(st.integers(0, skv), max_size=4)))
    return [q, k, v], mask, [0, *cuts, skv]


def parts_of(x: list[Tensor], mask: Tensor, cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
    q, k, v = x
    return [attend(q, k[:, :, a:b], v[:, :, a:b], mask[..., a:b]) for a, b in pairwise(cuts)]


@few
@given(problems())
def test_any_split_equals_the_whole_with_gradients(problem: tuple[list[Tensor], Tensor, list[int]]) -> None:
    inputs, mask, cuts = problem
    g = torch.Generator().manual_seed(0)
    results = []
    for merged in (True, False):
        x = [t.clone().requires_grad_() for t in inputs]
        out, lse = merge_states(parts_of(x, mask, cuts)) if merged else attend(*x, mask)
        live = lse != -torch.inf
        to_out = torch.randn(out.shape, generator=g.manual_seed(1), dtype=torch.float64)
        to_lse = torch.randn(lse.shape, generator=g.manual_seed(2), dtype=torch.float64)
        ((out * to_out).sum() + torch.where(live, lse * to_lse, 0.0).sum()).backward()
        results.append([out, lse, *(t.grad for t in x)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@few
@given(problems(), st.sampled_from(["bhsd", "bshd", "thd"]), st.randoms())
def test_layouts_and_order_do_not_matter(
    problem: tuple[list[Tensor], Tensor, list[int]], layout: str, r: object
) -> None:
    inputs, mask, cuts = problem
    if layout == "thd":
        inputs, mask = [x[:1] for x in inputs], mask[:1]
    states = parts_of(inputs, mask, cuts)
    out, lse = merge_states(states)
    r.shuffle(states)  # type: ignore[attr-defined]  # random.Random

    def there(x: Tensor) -> Tensor:
        return {"bhsd": x, "bshd": x.transpose(1, 2), "thd": x[0].transpose(0, 1)}[layout]

    got, got_lse = merge_states([(there(a), b[0] if layout == "thd" else b) for a, b in states], layout=layout)
    torch.testing.assert_close(got, there(out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_lse, lse[0] if layout == "thd" else lse, rtol=1e-12, atol=1e-12)


@few
@given(problems())
def test_merging_is_associative(problem: tuple[list[Tensor], Tensor, list[int]]) -> None:
    states = parts_of(*problem)
    left = states[0]
    for state in states[1:]:
        left = merge_states([left, state])
    for got, want in zip(left, merge_states(states), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradcheck_with_an_empty_part_and_an_empty_row() -> None:
    g = torch.Generator().manual_seed(0)
    outs = [torch.randn(1, 2, 3, 2, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, generator=g, dtype=torch.float64) * 3 for _ in range(3)]
    for lse in lses:
        lse[..., 0] = -torch.inf  # a row that attends nothing anywhere
    lses[1][0, 0] = -torch.inf  # a head that attends nothing in one part
    finite = [(lse != -torch.inf).double() for lse in lses]
    shifts = [torch.zeros_like(lse, requires_grad=True) for lse in lses]

    def merged(*x: Tensor) -> tuple[Tensor, Tensor]:
        states = [
            (out, torch.where(f > 0, lse + s, lse)) for out, s, lse, f in zip(x[:3], x[3:], lses, finite, strict=True)
        ]
        out, lse = merge_states(states)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    assert torch.autograd.gradcheck(merged, (*outs, *shifts))
    assert torch.autograd.gradgradcheck(merged, (*outs, *shifts))


def test_lse_itself_as_a_leaf_has_finite_gradients() -> None:
    lses = [torch.tensor([[[-torch.inf, 1.0, -torch.inf]]]), torch.tensor([[[-torch.inf, -torch.inf, 300.0]]])]
    outs = [torch.full((1, 1, 3, 2), torch.nan), torch.ones(1, 1, 3, 2)]
    outs[0][0, 0, 1] = 5.0
    for x in (*lses, *outs):
        x.requires_grad_()
    out, lse = merge_states(list(zip(outs, lses, strict=True)))
    assert out.tolist() == [[[[0.0, 0.0], [5.0, 5.0], [1.0, 1.0]]]]
    assert lse.tolist() == [[[-math.inf, 1.0, 300.0]]]
    (out.sum() + lse[..., 1:].sum()).backward()
    for x in (*lses, *outs):
        assert torch.isfinite(x.grad).all()
    assert outs[0].grad[0, 0].tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("far", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_the_size_of_lse_does_not_matter(far: float) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1, 1, 4, 2, generator=g, dtype=torch.float64) for _ in range(2))
    x, y = (torch.randn(1, 1, 4, generator=g, dtype=torch.float64) for _ in range(2))
    near, lse = merge_states([(a, x), (b, y)])
    got, got_lse = merge_states([(a, x + far), (b, y + far)])
    torch.testing.assert_close(got, near, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_lse, lse + far, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    states = [(torch.full((1, 1, 2, 3), 1.0, dtype=dtype), torch.zeros(1, 1, 2)) for _ in range(2)]
    out, lse = merge_states(states)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, states[0][0])
    torch.testing.assert_close(lse, torch.full((1, 1, 2), math.log(2)))


def test_states_of_the_library_with_a_sink_in_one() -> None:
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 2, n, 8, generator=g) for n in (7, 20, 20))
    sinks = torch.randn(2, generator=g)
    spec = AttentionSpec(mask=masks.Dense(), return_lse=True)
    keep = torch.rand(2, 2, 7, 20, generator=g) < 0.5
    keep[:, :, 2, :11] = False

    def part(a: int, b: int, sink: bool) -> tuple[Tensor, Tensor]:
        which = spec.model_copy(update={"sinks": True}) if sink else spec
        more = {"sinks": sinks} if sink else {}
        return attnreg.attention(which, q, k[:, :, a:b], v[:, :, a:b], attn_mask=keep[..., a:b].contiguous(), **more)

    for got, want in zip(merge_states([part(0, 11, True), part(11, 20, False)]), part(0, 20, True), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    doubles = attend(q.double(), k.double(), v.double(), keep, sinks.double())
    for got, want in zip(part(0, 20, True), doubles, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


OUT, LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("states", "layout", "error", "argument", "words"),
    [
        ([], "bhsd", errors.InputError, "states", "one or more"),
        (OUT, "bhsd", errors.InputError, "states", "one or more"),
        ([OUT], "bhsd", errors.InputError, "states[0]", "pair"),
        ([(OUT, LSE)], "bhds", errors.InputError, "layout", "bhsd, bshd, thd"),
        ([(OUT, LSE)], "thd", errors.ShapeError, "states[0]", "3 dimensions"),
        ([(OUT, LSE)], "bshd", errors.ShapeError, "states[0]", "(1, 3, 2)"),
        ([(OUT, LSE), (OUT[..., :2], LSE)], "bhsd", errors.ShapeError, "states[1]", "(1, 2, 3, 4)"),
        ([(OUT, LSE), (OUT, LSE[:, :1])], "bhsd", errors.ShapeError, "states[1]", "(1, 2, 3)"),
        ([(OUT, LSE), (OUT.half(), LSE)], "bhsd", errors.DtypeError, "states[1]", "float32"),
        ([(OUT, LSE.half())], "bhsd", errors.DtypeError, "states[0]", "float16"),
        ([(OUT.int(), LSE)], "bhsd", errors.DtypeError, "states[0]", "int32"),
        ([(None, LSE)], "bhsd", errors.DtypeError, "states[0]", "None"),
        ([(OUT, LSE), (OUT.to("meta"), LSE.to("meta"))], "bhsd", errors.DeviceError, "states[1]", "meta"),
    ],
)
def test_what_does_not_fit_is_named(states: object, layout: str, error: type, argument: str, words: str) -> None:
    with pytest.raises(error) as caught:
        merge_states(states, layout=layout)  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.argument == argument
    assert words in str(caught.value)
