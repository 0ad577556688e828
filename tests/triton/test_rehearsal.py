"""The GPU tests' own code, run small on CPU tensors with interpreted kernels: what they say, they can do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from gpu_bench import SHAPES  # the folder of the GPU tests is no package
from test_gpu_right import compiled_like_called, right_or_refused  # the same
from test_gpu_speed import ratios  # the same

SERVED_BY = {
    "llama-3 8B decode": "triton_decode",
    "gemma-2 9B window": "triton_flash",
    "BigBird": "triton_block_sparse",
}


@pytest.mark.parametrize("name", SERVED_BY)
def test_right_or_refused(name: str) -> None:
    assert right_or_refused(name, SERVED_BY[name], grad=False, device="cpu", scale=128)
    assert not right_or_refused("Longformer", "triton_flash", grad=False, device="cpu", scale=128)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_peer_that_means_the_same(name: str) -> None:
    with torch.no_grad():
        assert ratios(name, "cpu", scale=32, rounds=2)


def test_training_has_peers_too() -> None:
    assert ratios("llama-3 8B prefill", "cpu", scale=64, rounds=2, grad=True)


def test_compiled_like_called() -> None:
    compiled_like_called("cpu", 17)
