"""Law: what a call means depends on its arguments and on the state that is listed here, and on nothing else.

Each state is flipped between two equal calls, in both orders, over all CPU backends. Most change nothing; autocast of
the tensors' own device changes the dtype; deterministic mode asks for backends that repeat.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from faults.reference import attend, close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnreg
from attnreg import AttentionSpec, errors, hot, masks, sparsity

BACKENDS = (None, "eager", "sdpa", "cpu", "flex")
S = 70
# flex compiles anew for each of torch's states, some 10 s each time.
WITH_SLOW_FLEX = (*BACKENDS[:4], pytest.param("flex", marks=pytest.mark.slow))


@contextlib.contextmanager
def _set(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _flush_denormal() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


STATES: dict[str, Callable[[], Any]] = {
    "autocast_of_cuda": lambda: _set(
        lambda: torch.is_autocast_enabled("cuda"), lambda on: torch.set_autocast_enabled("cuda", on), True
    ),
    "autocast_turned_off": lambda: torch.autocast("cpu", enabled=False),
    "default_dtype": lambda: _set(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default_device": lambda: torch.device("meta"),
    "deterministic": lambda: _set(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly_mode": lambda: torch.autograd.set_detect_anomaly(True),
    "threads": lambda: _set(torch.get_num_threads, torch.set_num_threads, 1),
    "flush_denormal": _flush_denormal,
    "matmul_precision": lambda: _set(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "sdpa_kernel_math": lambda: sdpa_kernel(SDPBackend.MATH),
    "sdpa_kernel_flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "random_seed": lambda: torch.random.fork_rng([]),
    "multithreading_off": lambda: torch.autograd.set_multithreading_enabled(False),
}


def _draw(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn((2, h, S, 16), generator=draw).to(dtype) for h in (4, 2, 2)]


def _use(backend: str | None) -> Any:
    return attnreg.use_backend(backend) if backend else contextlib.nullcontext()


def _keep(mask: masks.Mask) -> Tensor:
    at = torch.arange(S)
    low = at[:, None] >= at[None, :]
    return low if isinstance(mask, masks.Causal) else low & (at[:, None] - at[None, :] <= 9)


@pytest.mark.parametrize("backend", WITH_SLOW_FLEX)
@pytest.mark.parametrize("first", [False, True], ids=["off_then_on", "on_then_off"])
@pytest.mark.parametrize("state", STATES)
def test_a_state_that_must_not_matter(state: str, first: bool, backend: str | None, fresh: hot.HotTable) -> None:
    for mask in (masks.Causal(), masks.Causal() & masks.SlidingWindow(9)):
        spec = AttentionSpec(mask=mask)
        q, k, v = _draw()
        want, _ = attend(q, k, v, _keep(mask))
        for on in (first, not first, first):
            with STATES[state]() if on else contextlib.nullcontext(), _use(backend):
                out = attnreg.attention(spec, q, k, v)
            assert out.dtype == torch.float32
            assert out.device.type == "cpu"
            close(out, want)


@pytest.mark.parametrize("backend", BACKENDS[:4])
@pytest.mark.parametrize("first", [False, True], ids=["off_then_on", "on_then_off"])
@pytest.mark.parametrize("state", [state for state in STATES if state not in ("no_grad", "inference_mode")])
def test_nor_for_gradients(state: str, first: bool, backend: str | None, fresh: hot.HotTable) -> None:
    spec = AttentionSpec(mask=masks.Causal())
    leaves = [x.requires_grad_() for x in _draw()]
    want = torch.autograd.grad(attend(*leaves, _keep(spec.mask))[0].sin().sum(), leaves)
    for on in (first, not first, first):
        with STATES[state]() if on else contextlib.nullcontext(), _use(backend):
            got = torch.autograd.grad(attnreg.attention(spec, *leaves).sin().sum(), leaves)
        for one, other in zip(got, want, strict=True):
            close(one, other, 1e-4)


@pytest.mark.parametrize("state", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("backend", BACKENDS[:4])
def test_grad_mode_decides_whether_there_is_a_gradient(state: str, backend: str | None, fresh: hot.HotTable) -> None:
    leaves = [x.requires_grad_() for x in _draw()]
    for on in (False, True, False, True):
        with STATES[state]() if on else contextlib.nullcontext(), _use(backend):
            out = attnreg.attention(AttentionSpec(mask=masks.Causal()), *leaves)
        assert out.requires_grad is not on


@pytest.mark.parametrize("backend", BACKENDS[:4])
@pytest.mark.parametrize("first", [False, True])
def test_autocast_of_the_own_device_decides_the_dtype(first: bool, backend: str | None, fresh: hot.HotTable) -> None:
    q, k, v = _draw()
    want, _ = attend(q, k, v, _keep(masks.Causal()))
    for dtype in (torch.bfloat16, torch.float16):
        for on in (first, not first, first):
            with torch.autocast("cpu", dtype=dtype, enabled=on), _use(backend):
                out = attnreg.attention(AttentionSpec(mask=masks.Causal()), q, k, v)
            assert out.dtype == (dtype if on else torch.float32)
            close(out, want, 3e-2 if on else 2e-5)


def test_deterministic_mode_makes_the_spec_deterministic(fresh: hot.HotTable) -> None:
    spec = AttentionSpec(mask=masks.Causal())
    with _set(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True):
        problem, _ = attnreg.dispatch.decision(spec, *_draw())
    assert problem.spec.deterministic
    problem, _ = attnreg.dispatch.decision(spec, *_draw())
    assert not problem.spec.deterministic


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["in_place", "rebound", "number"])
def test_what_a_mask_mod_reads_may_change(change: str, backend: str | None, fresh: hot.HotTable) -> None:
    state: dict[str, Any] = {"document": torch.zeros(S, dtype=torch.long), "cut": 0}

    def by_tensor(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
        return (state["document"][p] == state["document"][j]) & (j <= p)

    def by_number(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
        return ((p >= state["cut"]) == (j >= state["cut"])) & (j <= p)

    spec = AttentionSpec(mask=masks.Custom(by_number if change == "number" else by_tensor))
    q, k, v = _draw()
    for cut in (30, 10, 30, 50):
        document = (torch.arange(S) >= cut).long()
        if change == "in_place":
            state["document"].copy_(document)
        state |= {"cut": cut} if change == "number" else {} if change == "in_place" else {"document": document}
        want, _ = attend(q, k, v, (document[:, None] == document[None, :]) & _keep(masks.Causal()))
        with _use(backend):
            close(attnreg.attention(spec, q, k, v), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("said", ["tensors", "version"])
def test_a_mask_mod_whose_author_says_what_it_reads(said: str, backend: str | None, fresh: hot.HotTable) -> None:
    document = torch.zeros(S, dtype=torch.long)

    def same(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
        return (document[p] == document[j]) & (j <= p)

    q, k, v = _draw()
    for cut in (30, 10, 30):
        document.copy_((torch.arange(S) >= cut).long())
        mask = masks.Custom(same, tensors=[document]) if said == "tensors" else masks.Custom(same, version=cut)
        want, _ = attend(q, k, v, (document[:, None] == document[None, :]) & _keep(masks.Causal()))
        with _use(backend):
            for _ in range(2):
                close(attnreg.attention(AttentionSpec(mask=mask), q, k, v), want)


def test_what_is_said_of_a_mask_mod_is_checked_and_kept() -> None:
    def mod(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
        return p >= j

    x = torch.zeros(3)
    assert masks.Custom(mod) == masks.Custom(mod)
    assert masks.Custom(mod, version=1) != masks.Custom(mod, version=2)
    assert masks.Custom(mod, tensors=[x]) == masks.Custom(mod, tensors=(x,)) != masks.Custom(mod, tensors=[x.clone()])
    assert masks.state(masks.Custom(mod)) is None
    assert masks.state(masks.Causal() & masks.Custom(mod)) is None
    assert masks.state(masks.Causal()) is not None
    before = masks.state(masks.Custom(mod, tensors=[x]))
    x.add_(1)
    assert masks.state(masks.Custom(mod, tensors=[x])) not in (before, None)
    with torch.inference_mode():
        unwatched = torch.zeros(3)
    assert masks.state(masks.Custom(mod, tensors=[unwatched])) is None
    with pytest.raises(errors.SpecError, match="version"):
        masks.Custom(mod, version=[1])  # type: ignore[arg-type]  # what is tested
    with pytest.raises(errors.SpecError, match="tensors"):
        masks.Custom(mod, tensors=3)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("backend", BACKENDS[:4])
def test_values_at_the_same_address_may_change(backend: str | None, fresh: hot.HotTable) -> None:
    q, k, v = _draw()
    lengths, block = torch.tensor([S, 20]), torch.ones(1, 1, 5, 5, dtype=torch.bool)
    at = torch.arange(S)
    with _use(backend):
        for n in (20, 50, 1):
            lengths[1] = n
            keep = at[None, None, None, :] < lengths.view(2, 1, 1, 1)
            spec = AttentionSpec(mask=masks.Padding(), align="top_left")
            close(attnreg.attention(spec, q, k, v, kv_lengths=lengths), attend(q, k, v, keep)[0])
            block[0, 0, 1] = torch.arange(5) < n % 5
            keep = block.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :S, :S]
            spec = AttentionSpec(sparsity=sparsity.Blocks(16, 16))
            close(attnreg.attention(spec, q, k, v, block_mask=block), attend(q, k, v, keep)[0])


def test_threads_have_states_of_their_own(fresh: hot.HotTable) -> None:
    """One thread under autocast, one without, one that forces a backend: all at once, none disturbs another."""
    q, k, v = _draw()
    spec = AttentionSpec(mask=masks.Causal())
    want, _ = attend(q, k, v, _keep(spec.mask))
    wrong: list[str] = []

    def work(name: str, context: Callable[[], Any], dtype: torch.dtype) -> None:
        for _ in range(40):
            with context(), torch.no_grad():
                out = attnreg.attention(spec, q, k, v)
            if out.dtype != dtype or float((out.double() - want).abs().max()) > 3e-2:
                wrong.append(name)

    jobs = (
        ("autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.bfloat16),
        ("plain", contextlib.nullcontext, torch.float32),
        ("forced", lambda: attnreg.use_backend("eager"), torch.float32),
    )
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
