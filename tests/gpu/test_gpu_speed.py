"""On a GPU: tune the shapes, then print each peer's time over ours. A ratio is printed, never judged here.

Run with `pytest -m gpu -s tests/gpu`. Written where there was no GPU: these have not run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_bench import SHAPES, peers, problem_of, race

import attnreg
from attnreg.testing import make_inputs

pytestmark = pytest.mark.gpu


def ratios(name: str, device: str = "cuda", scale: int = 1, rounds: int = 15) -> dict[str, float]:
    """Peers' times over ours, which is what attention() chooses; a peer that cannot run is printed with its reason."""
    problem = problem_of(name, device, scale=scale)
    inputs = make_inputs(problem)
    spec, q, k, v = problem.spec, inputs.q, inputs.k, inputs.v
    runs = {"attnreg": lambda: attnreg.attention(spec, q, k, v)}
    expected = runs["attnreg"]().float()
    for peer, run in peers(problem, inputs):
        try:
            found = run().float()
        except Exception as error:  # a peer's own limit, by its own words
            print(f"{name}: {peer} does not run: {str(error).splitlines()[0][:100]}")
            continue
        # A peer that computes something else is no peer: bfloat16's rounding of both is all that may differ.
        assert (found - expected).abs().max() < 0.05, f"{peer} means something else"
        runs[peer] = run
    times = race(runs, device, rounds)
    ours = times.pop("attnreg")
    print(f"{name}: attnreg {ours:.3f} ms; " + ", ".join(f"{x} {t / ours:.2f}x" for x, t in times.items()))
    return {x: t / ours for x, t in times.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_tune_then_race(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREG_DATA_DIR", str(tmp_path))
    inputs = make_inputs(problem_of(name))
    with torch.no_grad():
        report = attnreg.tune(inputs.problem.spec, inputs.q, inputs.k, inputs.v, budget=60, seconds=120)
        print(report)
        assert ratios(name)
