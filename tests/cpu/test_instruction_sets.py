"""Law: other vectors compute the same attention: AVX2, and the compiler's plain ones of 4 lanes or, as AVX-512 has, 16.

A Zen reads e4m3 in its own way with AVX2, so that decoding is compiled for one too where the CPU can run that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import test_backward
import test_decode as decode_tests
import test_decode_quantised as quantised_tests
import test_forward as forward_tests
import torch
from cpu_cases import CASES, Case

from attnreg import AttentionSpec, masks
from attnreg.testing import oracle
from attnreg_cpu import build, decode, product, variant

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
    "additive",
    "thd",
    "paged",
    "bigbird",
    "union_padding_alibi",
)
CHOSEN = [case for case in CASES if case.name in NAMES]
PAIRED = [
    c for c in CHOSEN if c.name in ("mqa_wide_values", "window_causal", "bias", "sinks_empty_rows", "thd", "bigbird")
]

FLAGS = set(build.cpu_identity().replace("'", " ").split())
MARCHES = ["x86-64-v3", "x86-64"]
WIDE = "16 lanes"
# The extensions of Zen 3 that Zen 4 and 5 share and no other CPU with all of them lacks; a Zen without AVX-512 runs
# that code natively, in test_decode_quantised.
ZEN = ["znver3"] if {"AMD", "avx2", "fma", "sse4a", "clzero", "vaes", "rdpid", "avx512f"} <= FLAGS else []


@pytest.fixture
def march(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if build.find_compiler() is None or "x86_64" not in FLAGS:
        pytest.skip("needs a C++ compiler on x86-64")
    if request.param == "x86-64-v3" and not {"avx2", "fma"} <= FLAGS:
        pytest.skip("this CPU has no AVX2")
    if request.param == WIDE:
        monkeypatch.setattr(build, "BASE_FLAGS", (*build.BASE_FLAGS, "-DATTNREG_PLAIN_LANES=16"))
    else:
        monkeypatch.setenv("ATTNREG_CPU_MARCH", request.param)
    kernels = (variant.load_kernel, decode._kernel)
    for kernel in kernels:
        kernel.cache_clear()
    yield request.param
    for kernel in kernels:
        kernel.cache_clear()


def test_the_table_names_cases_that_exist() -> None:
    assert {case.name for case in CHOSEN} == set(NAMES)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("march", "dtype"), [*itertools.product(MARCHES, DTYPES), (WIDE, torch.float32)], indirect=["march"], ids=str
)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_forward(case: Case, dtype: torch.dtype, march: str) -> None:
    forward_tests.compare(case, dtype, vectors=3)


@pytest.fixture
def every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of plain lanes multiply as the CPUs do that have the instructions."""
    monkeypatch.setattr(product, "has_bfloat_dot", lambda hardware: True)
    monkeypatch.setattr(product, "has_tiles", lambda hardware: True)
    monkeypatch.setattr(product, "refused", lambda: False)


@pytest.mark.parametrize("march", [WIDE], indirect=True)
@pytest.mark.parametrize(("way", "pack"), [("dot", "values"), ("dot", "all"), ("amx", "values"), ("amx", "all")])
@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_bfloat_pairs(case: Case, way: str, pack: str, march: str, every_product: None) -> None:
    forward_tests.compare(case, torch.bfloat16, vectors=3, pack=pack, product=way)


@pytest.mark.parametrize("march", [WIDE], indirect=True)
@pytest.mark.parametrize("way", ["dot", "amx"])
@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_bfloat_pairs_backward(case: Case, way: str, march: str, every_product: None) -> None:
    test_backward.compare(case, torch.bfloat16, through_lse=True, vectors=2, product=way)


@pytest.mark.parametrize("march", [WIDE], indirect=True)
@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_floats_in_parts(case: Case, march: str, every_product: None) -> None:
    forward_tests.compare(case, torch.float32, vectors=3, product="amx_bf16x3")


@pytest.mark.parametrize("march", [WIDE], indirect=True)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e18])
def test_parts_are_float32_at_any_size(size: float, march: str, every_product: None) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 64, generator=g) for _ in range(3))
    q, k, v = q * size, k / size, v * size
    case = Case("sizes", AttentionSpec(return_lse=True))
    out, lse = forward_tests.prepare(case, q, k, v, {}, product="amx_bf16x3")(q, k, v)
    exact, exact_lse = oracle(case.spec, q, k, v)
    assert ((out.double() - exact) / size).abs().max() <= 2e-6
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=4e-6)


@pytest.mark.parametrize("march", [WIDE], indirect=True)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_have_no_parts_go_another_way(which: int, value: float, march: str, every_product: None) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 70, 64, generator=g) for _ in range(3)]
    tensors[which][0, 1, 40, 3] = value
    case = Case("values", AttentionSpec(mask=masks.Causal(), return_lse=True))
    split, plain = (forward_tests.prepare(case, *tensors, {}, product=way)(*tensors) for way in ("amx_bf16x3", "fma"))
    for got, want in zip(split, plain, strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
        assert torch.equal(got.isnan(), want.isnan())
    assert split[0][0, 0].isfinite().all()


@pytest.mark.parametrize("march", MARCHES, indirect=True)
@pytest.mark.parametrize("case", [case for case in CHOSEN if not case.pages], ids=str)
def test_backward_too(case: Case, march: str) -> None:
    test_backward.compare(case, torch.float32, through_lse=True, vectors=3)


@pytest.mark.parametrize("march", [*MARCHES, WIDE], indirect=True)
@pytest.mark.parametrize("case", decode_tests.DECODE, ids=str)
def test_decode(case: Case, march: str) -> None:
    decode_tests.compare(case, torch.float32)


@pytest.mark.parametrize("march", [*MARCHES, *ZEN, WIDE], indirect=True)
@pytest.mark.parametrize("name", quantised_tests.STORED)
def test_stored_codes(name: str, march: str) -> None:
    quantised_tests.test_every_code_is_read_right(name)
    for heads, dims in (((4, 4), (64, 64)), ((4, 1), (72, 40)), ((40, 2), (128, 128)), ((64, 2), (128, 128))):
        quantised_tests.test_quantised_cache(name, "block", torch.float32, heads, dims)


@pytest.mark.parametrize("march", [*MARCHES, *ZEN, WIDE], indirect=True)
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (40, 2), (64, 2)], ids=str)
def test_stored_nans(name: str, heads: tuple[int, int], march: str) -> None:
    quantised_tests.test_a_nan_reaches_what_it_belongs_to(name, heads, (72, 40))
