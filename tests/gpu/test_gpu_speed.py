"""On a GPU: tune the shapes, then print each peer's time over ours. A ratio is printed, never judged here.

Run with `pytest -m gpu -s tests/gpu`. docs/gpu.md holds a run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_bench import SHAPES, peers, problem_of, race, with_backward

import attnreg
from attnreg import dispatch
from attnreg.testing import make_inputs

pytestmark = pytest.mark.gpu
TRAINED = ("llama-3 8B prefill", "BERT-base")


def ratios(name: str, device: str = "cuda", scale: int = 1, rounds: int = 15, grad: bool = False) -> dict[str, float]:
    """Peers' times over ours, which is what attention() chooses; a peer that cannot run is printed with its reason.

    The ratio is that of the device's times inside CUDA graphs; the one of plain calls is printed beside it.
    """
    problem = problem_of(name, device, grad, scale)
    inputs = make_inputs(problem)
    spec, q, k, v = problem.spec, inputs.q, inputs.k, inputs.v
    chosen = dispatch.decision_of(inputs.problem)
    runs = {"attnreg": lambda: attnreg.attention(spec, q, k, v)}
    expected = runs["attnreg"]().detach().float()
    for peer, run in peers(problem, inputs):
        try:
            found = run().detach().float()
        except Exception as error:  # a peer's own limit, by its own words
            print(f"{name}: {peer} does not run: {str(error).splitlines()[0][:100]}")
            continue
        # A peer that computes something else is no peer: bfloat16's rounding of both is all that may differ.
        assert (found - expected).abs().max() < 0.05, f"{peer} means something else"
        runs[peer] = run
    if grad:
        runs = {peer: with_backward(run, inputs) for peer, run in runs.items()}
    times = race(runs, device, rounds)
    ours = times.pop("attnreg")
    kind, by = f"{name}{', training' if grad else ''}", f"{chosen.backend} ({chosen.source})"
    print(f"{kind}: attnreg {ours[0]:.3f} ms on the device, {ours[1]:.3f} as called, by {by}")
    for peer, taken in times.items():
        print(f"    {peer}: {taken[0] / ours[0]:.2f}x on the device, {taken[1] / ours[1]:.2f}x as called")
    return {peer: taken[0] / ours[0] for peer, taken in times.items()}


@pytest.mark.parametrize(("name", "grad"), [*((name, False) for name in SHAPES), *((name, True) for name in TRAINED)])
def test_tune_then_race(name: str, grad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREG_DATA_DIR", str(tmp_path))
    inputs = make_inputs(problem_of(name, grad=grad))
    with torch.set_grad_enabled(grad):
        report = attnreg.tune(inputs.problem.spec, inputs.q, inputs.k, inputs.v, budget=60, seconds=120)
        print(report)
        assert ratios(name, grad=grad)
