"""On a GPU: the Triton backends at real sizes against the oracle, in CUDA graphs and under torch.compile.

They ran on an H200 (docs/gpu.md). tests/triton runs the same kernels interpreted, and test_rehearsal.py this module's
own code.
"""

from __future__ import annotations

import pytest
import torch
from gpu_bench import SHAPES, problem_of

import attnreg
from attnreg import AttentionSpec, masks, registry
from attnreg.hardware import detect
from attnreg.testing import check_inputs, make_inputs

pytestmark = pytest.mark.gpu
BACKENDS = ("triton_flash", "triton_decode", "triton_block_sparse")


def right_or_refused(name: str, backend: str, grad: bool, device: str = "cuda", scale: int = 1) -> bool:
    """The backend serves the shape rightly (True), or refuses it with reasons (False)."""
    inputs = make_inputs(problem_of(name, device, grad, scale))
    entry = registry.current().get(backend).backend
    hardware = detect(device)
    if entry.supports(inputs.problem, hardware):
        return False
    space = entry.space(inputs.problem, hardware)
    for config in [space.default, *space.seeds[:3]]:
        result = check_inputs(entry.prepare(inputs.problem, config), inputs, poison=False)
        assert result.ok, f"{backend} {dict(config)}: {result.reason}"
    return True


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", SHAPES)
def test_real_sizes(name: str, grad: bool) -> None:
    if grad and problem_of(name).sq == 1:
        grad = False
    served = [right_or_refused(name, backend, grad) for backend in BACKENDS]  # every backend, not the first alone
    assert any(served)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("BigBird", "Longformer")])
def test_cuda_graph(name: str) -> None:
    """A captured call replays on new values: no host synchronisation, no allocation outside of torch's pool."""
    inputs = make_inputs(problem_of(name))
    backend = "triton_decode" if inputs.problem.sq == 1 else "triton_flash"
    with attnreg.use_backend(backend), torch.no_grad():
        run = attnreg.prepare(inputs.problem.spec, inputs.q, inputs.k, inputs.v)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(inputs.q, inputs.k, inputs.v)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(inputs.q, inputs.k, inputs.v)
        inputs.q.copy_(torch.randn_like(inputs.q))
        graph.replay()
        torch.testing.assert_close(out, run(inputs.q, inputs.k, inputs.v), rtol=0, atol=0)


def compiled_like_called(device: str, length: int) -> None:
    """torch.compile(fullgraph=True) over the flash kernels, forward and backward, equals the plain call."""
    spec = AttentionSpec(mask=masks.Causal())

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attnreg.attention(spec, q * 2, k, v) + 1

    def gradients(call: object) -> list[torch.Tensor]:
        torch.manual_seed(0)
        leaves = [torch.randn(1, 2, length, 32, device=device, requires_grad=True) for _ in range(3)]
        out = call(*leaves)  # type: ignore[operator]  # step, or step compiled
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    with attnreg.use_backend("triton_flash"):
        plain = gradients(step)
        compiled = gradients(torch.compile(step, fullgraph=True))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def test_compile_fullgraph() -> None:
    compiled_like_called("cuda", 1024)
