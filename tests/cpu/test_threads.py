"""Threads: one runtime shared with torch, torch's count obeyed, forked children safe, the GIL released."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import Case
from test_forward import prepare

from attnreg import AttentionSpec, masks
from attnreg_cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
CASE = Case("threads", AttentionSpec(mask=masks.Causal()), batch=1, heads=(4, 4), sq=512, skv=512)


def _run() -> tuple[Any, tuple[torch.Tensor, ...]]:
    q, k, v, named = CASE.draw(torch.float32)
    return prepare(CASE, q, k, v, named), (q, k, v)


def _runtimes() -> set[str]:
    """OpenMP runtimes that are mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return {p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))}


def test_kernels_bring_no_second_openmp_runtime() -> None:
    torch.ones(1 << 20).add_(1)  # torch's own threads are up
    before = _runtimes()
    call, (q, k, v) = _run()
    call(q, k, v)
    assert _runtimes() == before
    assert build.openmp_entry() is not None


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two threads")
def test_no_pool_of_its_own() -> None:
    torch.ones(1 << 20).add_(1)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    call, (q, k, v) = _run()
    before = _thread_count()
    for _ in range(3):
        call(q, k, v)
    assert _thread_count() <= before + 1  # at most the pool that torch had not yet filled


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    call, (q, k, v) = _run()
    expected = call(q, k, v)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(call(q, k, v), expected)
    finally:
        torch.set_num_threads(before)


def test_a_forked_child_computes_and_ends() -> None:
    """The child of a process whose pool is up has no pool; entering a region there would hang."""
    call, (q, k, v) = _run()
    expected = call(q, k, v).numpy().tobytes()
    child = os.fork()
    if child == 0:
        # Compared as bytes: torch's own parallel loops hang in such a child.
        os._exit(0 if call(q, k, v).numpy().tobytes() == expected else 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")


FORKS = """
import os, threading, time, torch
torch.set_num_threads(2)

def region():
    torch.ones(1 << 20).add_(1)

def on_a_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread

def child_finds(expected, before=lambda: None):
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    before()
    from attnreg_cpu.threads import thread_count  # its first import, so that no hook saw the fork
    started = time.monotonic()
    first, again, after = thread_count(), thread_count(), time.monotonic() - started
    if first == 2:
        region()
    os._exit(0 if first == again == expected and after < 9 else 1)

import attnreg
child_finds(2)
child_finds(2, region)  # the child has a pool of its own
on_a_thread(region).join()
child_finds(2)  # the parent's thread had one, and is not there
region()
child_finds(1)
child_finds(1, lambda: on_a_thread(lambda: time.sleep(60)))
"""


def test_a_child_that_imports_the_plugin_knows_its_pool() -> None:
    """A server that forks first must not lose its threads, and one that forks late must not hang."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=300)


class _Rows(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, call: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.call, self.inputs = call, inputs

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        out: torch.Tensor = self.call(*self.inputs)
        return out


def test_data_loader_workers_can_call_it() -> None:
    call, inputs = _run()
    expected = call(*inputs)
    loader = torch.utils.data.DataLoader(_Rows(call, inputs), num_workers=2, batch_size=None, timeout=60)
    assert all(torch.equal(out, expected) for out in loader)


def test_threads_may_call_at_once_and_python_goes_on() -> None:
    call, (q, k, v) = _run()
    inputs = [(q + n, k, v) for n in range(4)]
    expected = [call(*x) for x in inputs]
    got: list[Any] = [None] * 4

    def work(n: int) -> None:
        for _ in range(5):
            got[n] = call(*inputs[n])

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    ticks = 0
    while any(worker.is_alive() for worker in workers):
        ticks += 1  # only possible while kernels run if they let go of the GIL
        time.sleep(0)
    assert ticks > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
