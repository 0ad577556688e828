"""Law: whatever a Triton backend takes, it computes: random specs, sizes, tensors and values against the oracle."""

from __future__ import annotations

from random import Random

import pytest
from random_problems import KINDS, inputs

import attnreg_triton
from attnreg.hardware import detect
from attnreg.testing import check_inputs

BACKENDS = {backend.name: backend for backend in attnreg_triton.attnreg_backends()}
SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 150))]


def test_every_backend_is_drawn_for() -> None:
    assert set(BACKENDS) == set(KINDS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_taken_is_right(name: str, seed: int) -> None:
    """Under the default configuration or, every other time, under a random point of the search space."""
    backend, draw = BACKENDS[name], Random(f"{name} {seed}")
    drawn = inputs(backend, draw)
    space = backend.space(drawn.problem, detect("cpu"))
    config = space.sample(draw) if seed % 2 else space.default
    result = check_inputs(backend.prepare(drawn.problem, config), drawn)
    assert result.ok, f"{result.reason}\n{dict(config)}; {drawn}"
