"""Law: what a call's tensors are is asked before memory is read. Each kind is computed rightly or refused by name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults.reference import attend, close
from faults.wrappers import Counting, Named, Wrapped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnreg
from attnreg import AttentionSpec, errors, masks

BACKENDS = (None, "eager", "sdpa", "cpu")
KEEP = torch.ones(37, 37).tril().bool() & torch.ones(37, 37).triu(-7).bool()
SPEC = AttentionSpec(mask=masks.Causal() & masks.SlidingWindow(7), bias=True)

Make = Callable[[Tensor], Tensor]
COMPUTED: dict[str, Make] = {
    "parameter": torch.nn.Parameter,
    "subclass": lambda x: x.as_subclass(Named),
    "function_subclass": lambda x: x.as_subclass(Counting),
    "wrapper": Wrapped,
    "wrapper_of_wrapper": lambda x: Wrapped(Wrapped(x)),
    "negative_bit": lambda x: torch._neg_view(-x),
    "imaginary_of_conjugate": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "functional": torch._to_functional_tensor,
    "inference": lambda x: _inference(x),
    "expanded": lambda x: x[..., :1, :].expand(x.shape) if x.dim() == 4 else x,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
REFUSED: dict[str, tuple[Make, str]] = {
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested.*thd"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested.*thd"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), "MaskedTensor.*Dense"),
    "sparse": (lambda x: x.to_sparse(), "sparse_coo"),
    "sparse_csr": (lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(), "sparse_csr"),
    "mkldnn": (lambda x: x.to_mkldnn(), "mkldnn"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantis"),
    "dead_wrapper": (lambda x: _dead(x), "has ended"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|deprecated|beta).*:UserWarning")


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _dead(x: Tensor) -> Tensor:
    leaked: list[Tensor] = []

    def leak(y: Tensor) -> Tensor:
        leaked.append(y)
        return y.sum()

    torch.func.grad(leak)(x)
    return leaked[0]


def _draw() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    sizes = {"q": (2, 4, 37, 8), "k": (2, 2, 37, 8), "v": (2, 2, 37, 8), "bias": (1, 4, 37, 37)}
    return {name: torch.randn(size, generator=draw) for name, size in sizes.items()}


def _value(out: Tensor) -> Tensor:
    while isinstance(out, Wrapped):
        out = out.inner
    return torch._from_functional_tensor(out) if torch._is_functional_tensor(out) else out


def _want(given: dict[str, Tensor]) -> Tensor:
    return attend(given["q"], given["k"], given["v"], KEEP, given["bias"])[0]


def _use(backend: str | None) -> Any:
    return attnreg.use_backend(backend) if backend else contextlib.nullcontext()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", COMPUTED)
def test_every_kind_that_can_be_computed_is_right_in_every_place(kind: str, backend: str | None) -> None:
    given = _draw()
    make = COMPUTED[kind]
    with _use(backend), torch.no_grad():
        run = attnreg.prepare(SPEC, **given)
        attnreg.attention(SPEC, **given)  # hot: of the same sizes, and plain
        for places in (("q",), ("k",), ("v",), ("bias",), tuple(given)):
            if kind in ("functional", "wrapper", "wrapper_of_wrapper") and len(places) == 1:
                continue  # torch itself mixes none of these with plain tensors
            now = {name: make(x) if name in places else x for name, x in given.items()}
            plain = {name: _value(x) for name, x in now.items()}
            want = _want({name: x.as_subclass(Tensor) for name, x in plain.items()})
            close(_value(attnreg.attention(SPEC, **now)).as_subclass(Tensor), want)
            close(_value(run(**now)).as_subclass(Tensor), want)
        close(attnreg.attention(SPEC, **given), _want(given))  # and plain ones are still what they were


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", REFUSED)
def test_every_kind_that_cannot_be_computed_is_refused_by_name(kind: str, backend: str | None) -> None:
    given = _draw()
    make, said = REFUSED[kind]
    with _use(backend):
        run = attnreg.prepare(SPEC, **given)
        for name in given:
            if (kind, name) == ("jagged", "bias"):
                continue  # one sequence only: torch makes none of it
            now = {**given, name: make(given[name])}
            for call in (lambda now=now: attnreg.attention(SPEC, **now), lambda now=now: run(**now)):
                with pytest.raises(errors.InputError) as caught:
                    call()
                assert caught.value.argument == name
                assert re.search(said, str(caught.value), re.DOTALL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_without_data_are_refused_once_their_shapes_are_right(backend: str | None) -> None:
    given = {name: x.to("meta") for name, x in _draw().items()}
    with _use(backend):
        with pytest.raises(errors.DeviceError, match=r"q: .*meta device.*FakeTensorMode"):
            attnreg.attention(SPEC, **given)
        with pytest.raises(errors.ShapeError, match="bias"):
            attnreg.attention(SPEC, **{**given, "bias": given["bias"][..., :5]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hot", [False, True])
def test_fake_tensors_come_out_fake(hot: bool, backend: str | None) -> None:
    given = _draw()
    with _use(backend):
        if hot:
            attnreg.attention(SPEC, **given)
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(x) for name, x in given.items()}
            out = attnreg.attention(SPEC, **fakes)
        assert type(out) is type(fakes["q"])
        assert out.shape == given["q"].shape
        assert out.dtype == torch.float32


def test_a_subclass_with_a_say_of_its_own_sees_the_call() -> None:
    given = _draw()
    Counting.seen.clear()
    attnreg.attention(SPEC, **{**given, "v": given["v"].as_subclass(Counting)})
    assert "attention" in Counting.seen


UPSTREAM: dict[str, Make] = {
    "negative_bit": lambda x: torch._neg_view(-x),
    "imaginary_of_conjugate": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "subclass": lambda x: x.as_subclass(Named),
    "zero": lambda x: torch._efficientzerotensor(x.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", UPSTREAM)
def test_upstream_gradients_of_every_kind(kind: str, backend: str | None) -> None:
    given = {name: x.requires_grad_() for name, x in _draw().items()}
    upstream = UPSTREAM[kind](torch.randn(given["q"].shape, generator=torch.Generator().manual_seed(4)))
    plain = torch.zeros(upstream.shape) if kind == "zero" else upstream.clone().as_subclass(Tensor).resolve_neg()
    with _use(backend):
        out = attnreg.attention(SPEC, **given)
    got = torch.autograd.grad(out, list(given.values()), upstream)
    want = torch.autograd.grad(_want(given), list(given.values()), plain.double())
    for one, other in zip(got, want, strict=True):
        close(one.as_subclass(Tensor), other, 1e-4)


@pytest.mark.parametrize("kind", [kind for kind in COMPUTED if kind != "expanded"])
def test_merge_states_takes_the_same_kinds(kind: str) -> None:
    draw = torch.Generator().manual_seed(5)
    parts = [(torch.randn(2, 3, 5, 4, generator=draw), torch.randn(2, 3, 5, generator=draw)) for _ in range(2)]
    make = COMPUTED[kind]
    with torch.no_grad():
        want = attnreg.merge_states(parts)
        got = attnreg.merge_states([(make(out), make(lse)) for out, lse in parts])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(_value(one).as_subclass(Tensor), other)


@pytest.mark.parametrize("kind", ["nested", "masked", "sparse", "mkldnn"])
def test_merge_states_refuses_the_same_kinds(kind: str) -> None:
    out, lse = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5)
    make, said = REFUSED[kind]
    with pytest.raises(errors.InputError, match=said):
        attnreg.merge_states([(make(out), lse)])
