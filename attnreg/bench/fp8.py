"""FP8 accuracy on the published outlier test: root mean square error against float64, by scaling and rotation.

The test (FlashAttention-3, arXiv:2407.08608, section 4.3): entries of q, k and v are N(0, 1), plus N(0, 100) with
probability 0.001. Published: 2.4e-2 for FP8 with one scale a tensor, 9.1e-3 with scales a block and rotation.
A few rows that meet large entries make most of the error, so one draw says little: the table shows several.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from attnreg import registry
from attnreg.hardware import detect
from attnreg.problem import Problem
from attnreg.sheet import Sheet, paragraph
from attnreg.spec import AttentionSpec, Precision
from attnreg.testing import oracle

__all__ = ["CASES", "PUBLISHED", "Row", "measure", "outlier_inputs", "show"]

Scaling = Literal["tensor", "head", "block"]
CASES: tuple[tuple[str, Scaling, bool], ...] = (
    ("one scale a tensor", "tensor", False),
    ("a scale a head", "head", False),
    ("a scale a block", "block", False),
    ("a scale a tensor, rotated", "tensor", True),
    ("a scale a block, rotated", "block", True),
)
"""(name, dtype.scaling, dtype.rotate)."""
PUBLISHED = {"one scale a tensor": 2.4e-2, "a scale a block, rotated": 9.1e-3}
EMULATION, KERNEL = "eager_fp8", "triton_fp8"


@dataclass(frozen=True)
class Row:
    """One case: its name, the emulation's error on each draw, the kernel's on the first (None where it did not run)."""

    name: str
    errors: tuple[float, ...]
    kernel: float | None

    @property
    def mean(self) -> float:
        """Mean over the draws."""
        return sum(self.errors) / len(self.errors)


def outlier_inputs(length: int, heads: int = 2, head_dim: int = 128, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, heads, length, head_dim] float16 with rare large entries."""
    made = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        shape = (1, heads, length, head_dim)
        rare = torch.rand(shape, generator=made) < 0.001
        plain, large = (torch.randn(shape, generator=made) for _ in range(2))
        return (plain + 10.0 * large * rare).to(torch.float16)

    return draw(), draw(), draw()


def measure(backend: str, length: int, seed: int = 0) -> dict[str, float]:
    """Root mean square error of a backend against the float64 oracle, by case name, on one draw of `length` rows."""
    q, k, v = outlier_inputs(length, seed=seed)
    exact, _ = oracle(AttentionSpec(), q, k, v)
    entry = registry.current().entries[backend].backend
    out = {}
    for name, scaling, rotate in CASES:
        precision = Precision(compute="float8_e4m3fn", scaling=scaling, rotate=rotate)
        problem = _problem(precision, q)
        hardware = detect("cpu")
        reasons = entry.supports(problem, hardware)
        if reasons:
            raise RuntimeError(f"{backend}: {'; '.join(reasons)}")
        run = entry.prepare(problem, entry.space(problem, hardware).default)
        out[name] = float((run(q, k, v).double() - exact).square().mean().sqrt())
    return out


def _problem(precision: Precision, q: Tensor) -> Problem:
    _, heads, length, width = q.shape
    plain = Problem(AttentionSpec(dtype=precision), 1, heads, heads, length, length, width, width, width)
    return replace(plain, dtype="float16", kv_dtype="float16", square=True)


def _kernel_in_interpreter(length: int) -> dict[str, float] | str:
    """The kernel's errors, from a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""
    command = [sys.executable, "-m", "attnreg.bench.fp8", KERNEL, str(length)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1800, check=False
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(console: Console, *, length: int = 1024, draws: int = 8, kernel: bool = True) -> list[Row]:
    """Print the table: the emulation on each draw and, in Triton's interpreter, the kernel on the first of them."""
    emulated = [measure(EMULATION, length, seed) for seed in range(draws)]
    found = _kernel_in_interpreter(length) if kernel else "not asked for"
    rows = [
        Row(name, tuple(one[name] for one in emulated), found[name] if isinstance(found, dict) else None)
        for name, _, _ in CASES
    ]
    heads = ("scales", f"mean of {draws}", "least", "most", "first", "kernel, first", "published")
    title = f"FP8 (e4m3) RMSE against float64, outlier test, B=1 H=2 S={length} D=128"
    sheet = Sheet(*heads, title=title, right=heads[1:])
    for row in rows:
        published = PUBLISHED.get(row.name)
        cells = [row.mean, min(row.errors), max(row.errors), row.errors[0], row.kernel, published]
        sheet.add(row.name, *("" if x is None else f"{x:.2e}" for x in cells))
    sheet.print(console)
    if isinstance(found, str):
        paragraph(console, f"The kernel did not run: {found}")
    paragraph(console, f"Emulation on {draws} draws of the inputs; the kernel, in Triton's interpreter, on the first.")
    paragraph(console, "Published: FlashAttention-3 (arXiv:2407.08608), on an H100, of a shape and a draw not named.")
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
