"""Law: narrower vectors compute the same attention: AVX2, and the compiler's plain vectors without either."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_backward
import test_forward as forward_tests
import torch
from cpu_cases import CASES, Case

from attnreg_cpu import build, variant

NAMES = (
    "causal",
    "more_queries_than_keys",
    "mqa_wide_values",
    "window_causal",
    "scattered_documents",
    "dense_mask",
    "bias",
    "alibi_batch",
    "sinks_empty_rows",
    "softcap",
    "thd",
    "paged",
    "bigbird",
    "union_padding_alibi",
)
CHOSEN = [case for case in CASES if case.name in NAMES]


@pytest.fixture(params=["x86-64-v3", "x86-64"])
def march(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    flags = set(build.cpu_identity().replace("'", " ").split())
    if build.find_compiler() is None or "x86_64" not in flags:
        pytest.skip("needs a C++ compiler on x86-64")
    if request.param == "x86-64-v3" and not {"avx2", "fma"} <= flags:
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setenv("ATTNREG_CPU_MARCH", request.param)
    variant.load_kernel.cache_clear()
    yield request.param
    variant.load_kernel.cache_clear()


def test_the_table_names_cases_that_exist() -> None:
    assert {case.name for case in CHOSEN} == set(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_forward(case: Case, dtype: torch.dtype, march: str) -> None:
    forward_tests.compare(case, dtype, vectors=3)


@pytest.mark.parametrize("case", [case for case in CHOSEN if not case.pages], ids=str)
def test_backward_too(case: Case, march: str) -> None:
    test_backward.compare(case, torch.float32, through_lse=True, vectors=3)
