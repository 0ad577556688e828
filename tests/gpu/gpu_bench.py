"""What the GPU tests share: problems of real sizes, peers, and interleaved timing; on a CPU it all rehearses small."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnreg import AttentionSpec, Problem, masks, sparsity
from attnreg.hardware import detect
from attnreg.measure.timing import Clock
from attnreg.suites import attention_problem
from attnreg.testing import Inputs

Run = Callable[[], Any]
CAUSAL = masks.Causal()
WINDOW = CAUSAL & masks.SlidingWindow(1023)
SHAPES: dict[str, tuple[AttentionSpec, tuple[int, int], int, int, int, int]] = {
    "llama-3 8B prefill": (AttentionSpec(mask=CAUSAL), (32, 8), 4096, 4096, 128, 1),
    "llama-3 8B decode": (AttentionSpec(mask=CAUSAL), (32, 8), 1, 8192, 128, 8),
    "llama-3 8B decode alone": (AttentionSpec(mask=CAUSAL), (32, 8), 1, 8192, 128, 1),
    "gemma-2 9B window": (AttentionSpec(mask=WINDOW, softcap=50.0), (16, 8), 4096, 4096, 256, 1),
    "BERT-base": (AttentionSpec(), (12, 12), 512, 512, 64, 16),
    "BigBird": (AttentionSpec(sparsity=sparsity.BigBird(64)), (16, 16), 8192, 8192, 64, 1),
    "Longformer": (AttentionSpec(mask=masks.longformer(512, (0,))), (12, 12), 8192, 8192, 64, 1),
}
"""name -> (spec, (query heads, KV heads), Sq, Skv, head_dim, batch)."""


def problem_of(name: str, device: str = "cuda", grad: bool = False, scale: int = 1) -> Problem:
    """A shape in bfloat16; scale cuts its lengths and heads for a rehearsal without a GPU."""
    spec, heads, sq, skv, dim, batch = SHAPES[name]
    cut = (max(heads[0] // scale, heads[0] // heads[1]), max(heads[1] // scale, 1))
    rows, keys = (max(x // scale, 1) for x in (sq, skv))
    batch = max(batch // scale, 1)
    made = attention_problem(spec, cut, rows, keys, dim, batch=batch, dtype="bfloat16", grad=grad, device=device)
    return replace(made, device=device)


def peers(problem: Problem, inputs: Inputs) -> Iterator[tuple[str, Run]]:
    """(name, run) of every peer that says exactly this problem on its device, forward."""
    spec, q, k, v = problem.spec, inputs.q, inputs.k, inputs.v
    plain = spec.mask in (masks.Full(), CAUSAL) and isinstance(spec.sparsity, sparsity.Dense) and not spec.softcap
    causal = spec.mask == CAUSAL and problem.sq > 1
    gqa = problem.group > 1

    def sdpa(kind: SDPBackend) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        return run

    if plain:
        on_gpu = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION}
        kinds = on_gpu if problem.device == "cuda" else {"sdpa math": SDPBackend.MATH}
        for name, kind in kinds.items():
            yield name, sdpa(kind)
        if find_spec("flash_attn") is not None and problem.device == "cuda":
            from flash_attn import flash_attn_func

            rows = [x.transpose(1, 2) for x in (q, k, v)]
            yield "flash-attn", lambda: flash_attn_func(*rows, causal=spec.mask == CAUSAL).transpose(1, 2)
    yield "flex", flex(problem, q, k, v)


def flex(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Run:
    """FlexAttention of the problem's mask, pattern and softcap; compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spec, shift = problem.spec, problem.skv - problem.sq
    pattern = None
    if not isinstance(spec.sparsity, sparsity.Dense):
        from attnreg import blocks

        heads = problem.q_heads
        layout = blocks.block_layout(masks.Full(), spec.sparsity, problem.sq, problem.skv, 64, 64, heads=heads)
        pattern = layout.to_dense()[0].expand(heads, -1, -1).to(q.device)

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        from attnreg.masks import Coords

        said = spec.mask.allows(Coords(b, h, i, i + shift, j, {}))
        return said if pattern is None else said & pattern[h, i, j]

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return spec.softcap * torch.tanh(score / spec.softcap)

    heads = problem.q_heads if pattern is not None else None
    mask = create_block_mask(mod, None, heads, problem.sq, problem.skv, device=str(q.device))
    call = torch.compile(flex_attention, dynamic=False) if problem.device == "cuda" else flex_attention
    scored = cap if spec.softcap else None
    return lambda: call(q, k, v, score_mod=scored, block_mask=mask, enable_gqa=problem.group > 1)


def with_backward(run: Run, inputs: Inputs) -> Run:
    """The run and its gradients by q, k and v, for an output gradient drawn once."""
    leaves = (inputs.q, inputs.k, inputs.v)
    weights = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), leaves, weights)


def race(runs: dict[str, Run], device: str, rounds: int = 15) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each in interleaved rounds: on the device alone, inside a CUDA graph, and as called."""
    clock = Clock(detect(device), "warm", 2e-3)
    rough = {name: min(clock.once(run) for _ in range(4)) for name, run in runs.items()}
    graphs = {name: clock.recorded(run, rough[name]) for name, run in runs.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append((clock.sample(*graphs[name]), clock.sample(run, rough[name])))
    return {
        name: (statistics.median(x[0] for x in taken) * 1e3, statistics.median(x[1] for x in taken) * 1e3)
        for name, taken in samples.items()
    }
