"""Records and problems that the tests of the database share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnreg import AttentionSpec, masks
from attnreg.hardware import Hardware
from attnreg.problem import Problem, TensorInfo
from attnreg.records import Gate, Policy, Quantiles, Record, Rival, hardware_facts, software

HARDWARE = Hardware("cpu", "amd", "family99-model9", "avx2", 2, isa=("avx2", "fma"), caches=(32768, 524288, 2**25))
VERSIONS = {"cpu": "1", "sdpa": "2.13", "eager": "1"}


def problem(**changes: Any) -> Problem:
    """Causal, 8/2 heads, S 512, D 64, float32."""
    base = Problem(
        spec=AttentionSpec(mask=masks.Causal()),
        batch=2,
        q_heads=8,
        kv_heads=2,
        sq=512,
        skv=512,
        head_dim=64,
        head_dim_k=64,
        head_dim_v=64,
        square=True,
    )
    return replace(base, **changes)


def padded(batch: int) -> Problem:
    """A problem with a call tensor."""
    return problem(
        spec=AttentionSpec(mask=masks.Causal() & masks.Padding(), align="top_left"),
        batch=batch,
        tensors=(TensorInfo("kv_lengths", "int32", (0,)),),
    )


def rival(backend: str = "sdpa", ratio: tuple[float, ...] = (1.1, 1.15, 1.2), **config: Any) -> Rival:
    return Rival(backend, VERSIONS[backend], config, 1.15e-3, ratio)


def record(**changes: Any) -> Record:
    """cpu wins over sdpa by 10 to 20%."""
    base = Record(
        problem=problem(),
        backend="cpu",
        version="1",
        config={"block_q": 64, "pack": True, "kernel": "6x16"},
        hardware=hardware_facts(HARDWARE),
        software={**software(), "backends": VERSIONS},
        date="2026-11-24T04:30:00Z",
        policy=Policy(threads=2, rounds=20, dropped=1),
        times=Quantiles.of([1e-3 * (1 + 0.001 * n) for n in range(20)]),
        gate=Gate(1e-7, 4e-7),
        runner_up=rival(),
        refused=(("eager", 1, "error 3e-2 over the bound 4e-7"),),
        peak_memory=3 << 20,
        trials=31,
    )
    return replace(base, **changes)
