"""Every way to ask for a derivative is right by default; a forced backend is right or names the one that can."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from derivative_cases import CASES, Case, attend, reference
from derivative_higher import create_graph
from derivative_ways import FIRST, FORWARD, WAYS, Way
from torch import Tensor
from torch.utils._pytree import tree_flatten

import attnreg
import attnreg_eager.plan
from attnreg import AttentionSpec, Problem, explain, hot, masks
from attnreg.decide import decide
from attnreg.errors import AttnregError, BackendError, UnsupportedError
from attnreg.hardware import detect

BACKENDS = ("eager", "sdpa", "cpu", "flex")
QUICK = ("lse", "bias", "packed")
"""Cases of the quick grid; the first goes through every way, all others through a few."""
FEW = ("backward", "create_graph", "by_upstream", "batched_gradients", "vmapped_grad", "dual_numbers", "func_mixed")
NEVER_REFUSED = ("backward", "of_each_result", "odd_upstream", "functorch_reverse", "anomaly", "checkpointed", "hooks")
SLOW_WAYS = ("func_linearize",)
TOLERANCE = {torch.float64: 3e-6, torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Of the largest number in a result. lse is float32 whatever the inputs are."""


@pytest.fixture(autouse=True)
def no_backend_breaks() -> Any:
    """An error about a derivative sets no backend aside."""
    with warnings.catch_warnings(), hot.fresh_table() as table:
        warnings.filterwarnings("error", message="attnreg:")
        yield
        assert not table.failures
        assert all(settled.again is None for settled in table.buckets.values())


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """eager computes the smallest call in many tiles."""
    monkeypatch.setattr(attnreg_eager.plan, "BUDGET", 64)


def found(case: Case, way: Way, compute: Callable[..., Any], inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
    names = ("q", "k", "v", *case.smooth)
    rest = {n: x for n, x in inputs.items() if n not in names}

    def function(*xs: Tensor) -> tuple[Tensor, ...]:
        return compute(case, {**dict(zip(names, xs, strict=True)), **rest})

    return tree_flatten(way(function, [inputs[n] for n in names]))[0]


def check(case: Case, way: Way, dtype: torch.dtype = torch.float32) -> None:
    inputs = case.inputs(dtype)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    wanted = found(case, way, reference, exact)
    got = found(case, way, attend, inputs)
    assert len(got) == len(wanted)
    for n, (mine, right) in enumerate(zip(got, wanted, strict=True)):
        assert (mine is None) == (right is None), f"result {n} is {mine}, expected {right}"
        if mine is not None and right is not None:
            off = float((mine.double() - right).abs().max())
            bound = TOLERANCE[dtype] * (1 + float(right.abs().max()))
            assert off <= bound, f"result {n} is off by {off:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("way", [w for w in WAYS if w not in SLOW_WAYS])
def test_default_is_right(way: str) -> None:
    check(CASES["lse"], WAYS[way])


@pytest.mark.parametrize("way", FEW)
@pytest.mark.parametrize("case", [c for c in CASES if c != "lse"])
def test_default_is_right_for_every_spec(case: str, way: str) -> None:
    check(CASES[case], WAYS[way])


@pytest.mark.parametrize("way", [w for w in WAYS if w not in SLOW_WAYS])
def test_eager_has_all_in_tiles(way: str, tiles: None) -> None:
    with attnreg.use_backend("eager"):
        check(CASES["sinks"], WAYS[way], torch.float64)


@pytest.mark.parametrize(
    ("backend", "way"),
    [
        *((backend, way) for backend in ("sdpa", "cpu") for way in WAYS if way not in SLOW_WAYS),
        *(("flex", way) for way in FEW),  # it compiles for each
    ],
)
def test_forced_is_right_or_names_who_can(backend: str, way: str) -> None:
    right_or_named(backend, CASES["bias lse" if backend == "cpu" else "causal"], way)


def right_or_named(backend: str, case: Case, way: str) -> None:
    text = ""
    with attnreg.use_backend(backend):
        try:
            check(case, WAYS[way])
        except (UnsupportedError, BackendError) as why:
            text = str(why)
    if text:
        assert backend != "eager", text
        assert backend in text
        assert backend == "flex" or case.spec != CASES["causal"].spec or "use_backend('eager')" in text
        assert backend == "flex" or case.spec != CASES["causal"].spec or way not in NEVER_REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_every_spec(case: str, way: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.float32 or way in FIRST:
            check(CASES[case], WAYS[way], dtype)
    for backend in BACKENDS:
        right_or_named(backend, CASES[case], way)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_every_spec_in_tiles(case: str, way: str, tiles: None) -> None:
    with attnreg.use_backend("eager"):
        check(CASES[case], WAYS[way], torch.float64)


@pytest.mark.parametrize("case", ["lse", "packed", "sinks"])
@pytest.mark.parametrize("way", ["backward", "of_each_result", "odd_upstream", "create_graph", "dual_numbers"])
def test_half_precision(case: str, way: str) -> None:
    check(CASES[case], WAYS[way], torch.bfloat16)


def test_linearize() -> None:
    check(CASES["causal"], WAYS["func_linearize"])


@pytest.mark.parametrize(
    ("case", "fast", "backend"),
    [
        ("bias", True, "eager"),
        *(
            pytest.param(case, fast, backend, marks=pytest.mark.slow)
            for case in ("window", "bias") for fast in (True, False) for backend in (None, "eager")
        ),
    ],
)  # fmt: skip
def test_gradcheck(case: str, fast: bool, backend: str | None, tiles: None) -> None:
    one = replace(CASES[case], spec=CASES[case].spec.model_copy(update={"return_lse": False}))
    inputs = one.inputs(torch.float64)
    names = ("q", "k", "v", *one.smooth)
    # A number by a few directions: the slow mode perturbs each input by itself.
    leaves = tuple(torch.full((2,), 0.25, dtype=torch.float64, requires_grad=True) for _ in names)

    def function(*ts: Tensor) -> Tensor:
        moved = {n: inputs[n] + torch.sin(inputs[n] * 3) * t.sum() * t[0] for n, t in zip(names, ts, strict=True)}
        return attend(one, {**inputs, **moved})[0][:, :, ::3, ::4]

    with attnreg.use_backend(backend) if backend else contextlib.nullcontext():
        forward = {"check_forward_ad": True, "check_batched_grad": True}
        assert torch.autograd.gradcheck(function, leaves, fast_mode=fast, **forward)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=fast, check_fwd_over_rev=True)


@pytest.mark.parametrize("backend", [None, "sdpa", "cpu", "eager"])
@pytest.mark.parametrize("again", [False, True])
def test_inputs_changed_before_the_backward_pass(again: bool, backend: str | None) -> None:
    """torch's error; or right, where the kernel read a copy."""
    case, exact = CASES["lse"], CASES["lse"].inputs(torch.float64)
    leaves = [x.float().requires_grad_() for x in exact.values()]
    moved = [x * 1 for x in leaves]
    with attnreg.use_backend(backend) if backend else contextlib.nullcontext():
        out, _ = attend(case, dict(zip("qkv", moved, strict=True)))
    moved[1].add_(1)
    try:
        got = torch.autograd.grad(out.sum(), leaves, create_graph=again)
        if again:
            second = torch.autograd.grad(sum((g * g).sum() for g in got), leaves)
    except RuntimeError as why:
        if "modified by an inplace operation" not in str(why):
            raise
        return
    own = [x.requires_grad_() for x in exact.values()]
    right = torch.autograd.grad(reference(case, exact)[0].sum(), own, create_graph=again)
    pairs = list(zip(got, right, strict=True))
    if again:
        pairs += zip(second, torch.autograd.grad(sum((g * g).sum() for g in right), own), strict=True)
    for mine, wanted in pairs:
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [None, "sdpa", "cpu", "eager"])
@pytest.mark.parametrize("case", ["causal", "lse", "bshd"])
def test_results_can_be_changed_in_place(case: str, backend: str | None) -> None:
    """Right, or torch's error where its kernel's backward pass reads what was changed; as torch itself does."""
    inputs = CASES[case].inputs(torch.float32)
    leaves = [inputs[n].requires_grad_() for n in "qkv"]
    with attnreg.use_backend(backend) if backend else contextlib.nullcontext():
        out = attend(CASES[case], dict(zip("qkv", leaves, strict=True)))[0]
    kept = out.detach().clone()
    out += 1
    assert torch.equal(out, kept + 1)
    try:
        got = torch.autograd.grad((out * out).sum(), leaves)
    except RuntimeError as why:
        if "modified by an inplace operation" not in str(why):
            raise
        return
    exact = [x.detach().double().requires_grad_() for x in leaves]
    right = reference(CASES[case], dict(zip("qkv", exact, strict=True)))[0] + 1
    for mine, wanted in zip(got, torch.autograd.grad((right * right).sum(), exact), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [None, "sdpa", "cpu", "eager"])
@pytest.mark.parametrize(
    "unpack",
    [lambda x: x.to(torch.bfloat16), lambda x: x[..., :1], lambda x: x.flatten()],
    ids=["dtype", "size", "rank"],
)
def test_hooks_that_restore_something_else_are_named(unpack: Callable[[Tensor], Tensor], backend: str | None) -> None:
    inputs = CASES["lse"].inputs(torch.float32)
    leaves = [inputs[n].requires_grad_() for n in "qkv"]
    with (
        attnreg.use_backend(backend) if backend else contextlib.nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack),
    ):
        out, lse = attend(CASES["lse"], dict(zip("qkv", leaves, strict=True)))
    with pytest.raises(BackendError, match="saved_tensors_hooks"):
        torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])


def test_a_second_derivative_that_nobody_asks_for_is_no_error() -> None:
    """create_graph alone, as libraries say it by habit."""
    for backend in ("cpu", "sdpa"):
        inputs = CASES["causal"].inputs(torch.float32)
        leaves = [inputs[n].requires_grad_() for n in "qkv"]
        with attnreg.use_backend(backend):
            (out,) = attend(CASES["causal"], dict(zip("qkv", leaves, strict=True)))
            first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
            with pytest.raises(BackendError, match=rf"{backend}: no second derivative; attnreg.use_backend\('eager'\)"):
                torch.autograd.grad(sum((g * g).sum() for g in first), leaves)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_dropout_draws_the_same_mask_again(backend: str | None, tiles: None) -> None:
    """Second derivatives and tangents under dropout, against differences of first ones with the same seed."""
    case = replace(CASES["causal"], spec=AttentionSpec(mask=masks.Causal(), dropout_p=0.4))
    inputs = case.inputs(torch.float64)
    step = {n: torch.sin(x * 3) for n, x in inputs.items()}

    def first(t: float, graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        moved = {n: (x + t * step[n]).requires_grad_() for n, x in inputs.items()}
        torch.manual_seed(7)
        (out,) = attend(case, moved)
        return list(torch.autograd.grad((out * out).sum(), list(moved.values()), create_graph=graph)), [*moved.values()]

    with attnreg.use_backend(backend) if backend else contextlib.nullcontext():
        grads, leaves = first(0, True)
        second = torch.autograd.grad(grads, leaves, list(step.values()))
        for plus, minus, mine in zip(first(1e-4)[0], first(-1e-4)[0], second, strict=True):
            torch.testing.assert_close(mine, (plus - minus) / 2e-4, rtol=1e-4, atol=1e-4)
        with forward_ad.dual_level():
            torch.manual_seed(7)
            (out,) = attend(case, {n: forward_ad.make_dual(x, step[n]) for n, x in inputs.items()})
            tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None


def test_explain_knows_what_is_asked() -> None:
    inputs = CASES["causal"].inputs(torch.float32)
    q, k, v = (inputs[n] for n in "qkv")
    spec = CASES["causal"].spec
    assert explain(spec, q, k, v).decision.backend != "eager"
    with forward_ad.dual_level():
        told = explain(spec, forward_ad.make_dual(q, q), k, v)
    assert told.decision.backend == "eager"
    assert told.decision.problem.tangents == {"q"}
    assert "forward-mode derivative of q" in str(told)
    seen = []

    def nested(x: Tensor) -> Tensor:
        seen.append(explain(spec, x, k, v))
        return attnreg.attention(spec, x, k, v).sum()

    torch.func.grad(lambda x: torch.func.grad(nested)(x).sum())(q)
    assert seen[0].decision.problem.order == 2
    assert seen[0].decision.backend == "eager"
    assert "no second derivative" in str(seen[0])


def test_a_problem_says_it_in_json() -> None:
    plain = Problem(AttentionSpec(), 1, 2, 2, 5, 5, 8, 8, 8, grads=frozenset({"q"}))
    asked = replace(plain, tangents=frozenset({"k", "q"}), order=3)
    assert Problem.from_json(asked.to_json()) == asked
    assert asked.key() != plain.key()
    assert "tangent k,q" in str(asked)
    assert "order 3" in str(asked)
    decision = decide(asked, detect("cpu"))
    assert decision.backend == "eager"
    for name in BACKENDS[1:]:
        with pytest.raises(AttnregError, match="use_backend"):
            decide(asked, detect("cpu"), forced=name)


def test_one_way_of_all_is_first_order() -> None:
    """The tables are what they say: a way of the first kind asks no backend for more than a first derivative."""
    with attnreg.use_backend("sdpa"):
        for name in ("backward", "checkpointed", "hooks"):
            check(CASES["causal"], FIRST[name])
        with pytest.raises(UnsupportedError, match="forward-mode"):
            check(CASES["causal"], FORWARD["dual_numbers"])
        with pytest.raises(BackendError, match="no second derivative"):
            check(CASES["causal"], create_graph)
