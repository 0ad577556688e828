"""The vector code that every CPU kernel stands on: exp, tanh, transposition, 16-bit conversion, work distribution.

Run for each instruction set that this machine can execute, because each takes other branches of vec.h.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from attnreg_cpu import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")


def _runs_here(march: str) -> bool:
    flags = build.cpu_identity()
    needs = {"x86-64": (), "x86-64-v3": ("avx2", "fma"), "native": ()}[march]
    return march == "native" or ("x86_64" in flags and all(f" {flag}" in flags for flag in needs))


@pytest.fixture(params=["native", "x86-64-v3", "x86-64"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    if not _runs_here(request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    monkeypatch.setenv("ATTNREG_CPU_MARCH", request.param)
    return build.load(build.build("selftest.cpp", {}))


def _call(function: ctypes._NamedFuncPointer, *arguments: torch.Tensor | int) -> None:
    function.restype = None
    function(*[ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in arguments])


def _ulps(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    rounded = exact.float()
    spacing = (torch.nextafter(rounded.abs(), torch.tensor(torch.inf)) - rounded.abs()).double()
    return (got.double() - exact).abs() / spacing


def test_exp_is_within_two_ulp_over_its_range(library: ctypes.CDLL) -> None:
    x = torch.linspace(-87.6, 88.3, 1 << 20)
    near_zero = torch.linspace(-1e-3, 1e-3, 1 << 12)
    x = torch.cat([x, near_zero])
    y = torch.empty_like(x)
    _call(library.attnreg_exp, x, y, x.numel())
    assert _ulps(y, x.double().exp()).max() <= 2.0


def test_exp_at_the_ends(library: ctypes.CDLL) -> None:
    x = torch.tensor([-torch.inf, -1e30, -104.0, -88.0, 0.0, -0.0, torch.nan, 1e-30] * 2)
    y = torch.empty_like(x)
    _call(library.attnreg_exp, x, y, x.numel())
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, torch.nan, 1.0] * 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=2.0**-126, equal_nan=True)


def test_exp2_is_within_two_ulp_over_its_range(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-126.0, 126.9, 1 << 20), torch.linspace(-1.0, 1e-3, 1 << 16)])
    y = torch.empty_like(x)
    _call(library.attnreg_exp2, x, y, x.numel())
    assert _ulps(y, x.double().exp2()).max() <= 2.0


def test_exp2_at_the_ends(library: ctypes.CDLL) -> None:
    x = torch.tensor([-torch.inf, -1e30, -150.0, -126.75, 0.0, -0.0, torch.nan, 1e-30] * 2)
    y = torch.empty_like(x)
    _call(library.attnreg_exp2, x, y, x.numel())
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, torch.nan, 1.0] * 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_tanh(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-12.0, 12.0, 1 << 18), torch.linspace(-1e-2, 1e-2, 1 << 12)])
    y = torch.empty_like(x)
    _call(library.attnreg_tanh, x, y, x.numel())
    assert _ulps(y, x.double().tanh()).max() <= 8.0


def test_transpose(library: ctypes.CDLL) -> None:
    lanes = library.attnreg_lanes()
    block = torch.arange(lanes * lanes, dtype=torch.float32).reshape(lanes, lanes)
    moved = block.clone()
    _call(library.attnreg_transpose, moved)
    assert torch.equal(moved, block.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_widens_and_returns(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = torch.cat([values, values[:64], values[-(1 << 8) :]])
    wide = torch.empty(values.numel())
    back = torch.empty_like(values)
    name = "half" if dtype == torch.float16 else "bfloat"
    _call(getattr(library, f"attnreg_round_trip_{name}"), values, wide, back, values.numel())
    assert torch.equal(wide.nan_to_num(nan=12345.0), values.float().nan_to_num(nan=12345.0))
    assert torch.equal(back.float().nan_to_num(nan=12345.0), values.float().nan_to_num(nan=12345.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrowing_rounds_to_nearest_even(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(1 << 12).float() + 0.5
    scaled = torch.randn(1 << 14, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-30, 34).repeat(
        1 << 8
    )
    x = torch.cat(
        [bits.to(torch.int32).view(torch.float32), ties, scaled, torch.tensor([65519.0, 65520.0, -65536.0, 1e-8] * 4)]
    )
    out = torch.empty(x.numel(), dtype=dtype)
    name = "half" if dtype == torch.float16 else "bfloat"
    _call(getattr(library, f"attnreg_narrow_{name}"), x, out, x.numel())
    assert torch.equal(out.float().nan_to_num(nan=0.0), x.to(dtype).float().nan_to_num(nan=0.0))
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_item_runs_once(library: ctypes.CDLL, threads: int) -> None:
    for items in (0, 1, 3, 1000):
        sums = torch.zeros(8, dtype=torch.int64)
        _call(library.attnreg_count, items, threads, sums)
        assert sums.sum() == items * (items + 1) // 2
        assert (sums[threads:] == 0).all()


def test_torch_owns_the_openmp_runtime() -> None:
    assert build.openmp_entry() is not None
