"""Law: no memory is nobody's fault. It comes out as it is, on every path, and sets no backend aside; a trouble that may
pass sets one aside for a while."""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, Hardware, Problem, SearchSpace, dispatch, errors, hot, masks, registry
from attnreg.failures import is_out_of_memory, is_transient

BACKENDS = (None, "eager", "sdpa", "cpu")


def _caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


NO_MEMORY: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "torch_cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "torch_cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "triton": lambda: RuntimeError("Triton Error [CUDA]: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    "kernel": lambda: errors.OutOfMemoryError("cpu: out of memory for a thread's scratch buffers"),
    "behind_another": lambda: _caused(RuntimeError("while compiling"), MemoryError()),
}
PASSING: dict[str, Callable[[], Exception]] = {
    "full_disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "no_memory_for_a_compiler": lambda: _caused(errors.BackendError("killed"), OSError(errno.ENOMEM, "was killed")),
    "too_many_files": lambda: OSError(errno.EMFILE, "Too many open files"),
    "interrupted_compiler": lambda: errors.TransientError("the compiler was ended by signal 9"),
    "behind_another": lambda: _caused(
        errors.BackendError("cannot write"), OSError(errno.EDQUOT, "Disk quota exceeded")
    ),
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_no_memory_is_known_in_all_its_forms(name: str) -> None:
    assert is_out_of_memory(NO_MEMORY[name]())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


class Failing:
    """A backend that fails as told, in prepare or in the call, as often as told; else it gives zeros."""

    name, version = "cpu", "1"  # the name that stands first in the written order

    def __init__(self, error: Callable[[], Exception], step: str, times: int) -> None:
        self.error, self.step, self.times = error, step, times

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        return []

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        return SearchSpace()

    def _fail(self, step: str) -> None:
        if step == self.step and self.times:
            self.times -= 1
            raise self.error()

    def prepare(self, problem: Problem, config: Any) -> Any:
        self._fail("prepare")

        def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Tensor:
            self._fail("call")
            return torch.zeros_like(q)

        return run


@contextlib.contextmanager
def _with(backend: Failing) -> Iterator[None]:
    """`backend` in place of attnreg's own `cpu`; eager stays."""
    now = registry.current()
    entries = {"cpu": registry.Entry(backend, "planted", "test"), "eager": now.entries["eager"]}
    with registry.using(registry.Registry(entries)), hot.fresh_table():
        yield


@pytest.mark.parametrize("step", ["prepare", "call"])
@pytest.mark.parametrize("name", NO_MEMORY)
def test_no_memory_comes_out_and_sets_nothing_aside(name: str, step: str) -> None:
    x = torch.randn(1, 2, 5, 8)
    with _with(Failing(NO_MEMORY[name], step, 1)), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(NO_MEMORY[name]())):
            attnreg.attention(AttentionSpec(), x, x, x)
        assert torch.equal(attnreg.attention(AttentionSpec(), x, x, x), torch.zeros_like(x)), (
            "the backend is still there"
        )


@pytest.mark.parametrize("step", ["prepare", "call"])
@pytest.mark.parametrize("name", PASSING)
def test_a_trouble_that_may_pass_sets_aside_for_a_while(name: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 5, 8)
    now = [1000.0]
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now[0])
    assert is_transient(PASSING[name]())
    with _with(Failing(PASSING[name], step, 1)):
        with pytest.warns(RuntimeWarning, match="it is tried again"):
            first = attnreg.attention(AttentionSpec(), x, x, x)
        assert first.any(), "eager served"
        assert "tried again after" in str(attnreg.explain(AttentionSpec(), x, x, x))
        assert attnreg.attention(AttentionSpec(), x, x, x).any(), "not yet"
        now[0] += dispatch.RETRY_SECONDS + 1
        assert not attnreg.attention(AttentionSpec(), x, x, x).any(), "it is back"
        assert not attnreg.attention(AttentionSpec(), x, x, x).any()


def test_a_trouble_that_comes_again_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 5, 8)
    now = [1000.0]
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now[0])
    with _with(Failing(PASSING["full_disk"], "prepare", 2)):
        for match in ("it is tried again", "for such problems"):
            with pytest.warns(RuntimeWarning, match=match):
                attnreg.attention(AttentionSpec(), x, x, x)
            now[0] += 10 * dispatch.RETRY_SECONDS
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert attnreg.attention(AttentionSpec(), x, x, x).any(), "eager serves from now on"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hot_first", [False, True])
def test_the_real_allocator(hot_first: bool, backend: str | None, fresh: hot.HotTable) -> None:
    """A tensor of one element whose output would take 32 TiB, and later a call that is possible."""
    big = torch.zeros(1, 1, 1, 1).expand(1 << 26, 8, 256, 64)
    x = torch.randn(2, 8, 256, 64)
    with attnreg.use_backend(backend) if backend else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("error")
        if hot_first:
            attnreg.attention(AttentionSpec(), x, x, x)
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            attnreg.attention(AttentionSpec(), big, big, big)
        assert is_out_of_memory(caught.value)
        attnreg.attention(AttentionSpec(), x, x, x)
        assert "failed" not in str(attnreg.explain(AttentionSpec(), x, x, x))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu"])
def test_no_memory_in_the_backward_pass(backend: str, monkeypatch: pytest.MonkeyPatch, fresh: hot.HotTable) -> None:
    leaves = [torch.randn(1, 2, 33, 8, requires_grad=True) for _ in range(3)]
    with attnreg.use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attnreg.attention(AttentionSpec(mask=masks.Causal()), *leaves)
        out.register_hook(_no_memory)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            out.sum().backward()
        torch.autograd.grad(attnreg.attention(AttentionSpec(mask=masks.Causal()), *leaves).sum(), leaves)


def _no_memory(grad: Tensor) -> Tensor:
    return torch.empty(1 << 50, dtype=torch.float64)


def test_a_batch_that_cannot_be_is_refused_by_name() -> None:
    for batch, heads, rows, dim in ((2**42, 1, 1, 64), (2**42, 8, 16, 64), (2**30, 2**8, 2**6, 2**5)):
        x = torch.zeros(1, 1, 1, 1).expand(batch, heads, rows, dim)
        with pytest.raises(errors.ShapeError, match="no machine holds"):
            attnreg.attention(AttentionSpec(), x, x, x)
