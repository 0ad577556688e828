"""Quantise a call's tensors and describe their factors, as launches and as kernel arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import Descale, Descales, Strided
from .launch import Launch, next_power_of_two, strided

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
WEIGHTS = {torch.float8_e4m3fn: 2.0**8, torch.float8_e5m2: 2.0**15}
"""Weights are at most 1: this factor spreads them over the format's range, exactly."""
WHOLE = 1 << 30
"""Rows or keys of one factor where it serves them all."""
MIN_COLUMNS = 32
"""An 8-bit matrix instruction multiplies 32 columns."""
Start = Callable[[list[Launch]], None]


def amax_kernel() -> Any:
    """The kernel of largest magnitudes; loads Triton."""
    from . import fp8_quantise

    return fp8_quantise.amax_kernel


def quantise_kernel() -> Any:
    """The kernel that rounds; loads Triton."""
    from . import fp8_quantise

    return fp8_quantise.quantise_kernel


def described(value: Tensor, block: int = WHOLE) -> Descale:
    """Factors [B, H, blocks] float32, each dimension 1 where shared."""
    batch, head = (0 if value.shape[n] == 1 else value.stride(n) for n in (0, 1))
    return Descale(value, batch, head, block if value.shape[2] > 1 else WHOLE)


@dataclass(frozen=True)
class Quantiser:
    """How one tensor becomes 8-bit: dtype, scaling, rows of a factor under "block", heads that share one, rotation."""

    dtype: torch.dtype
    scaling: str
    block: int
    group: int = 1
    rotate: bool = False

    def __call__(
        self, x: Tensor, layout: str, used: Tensor | None, start: Start, transpose: bool = False
    ) -> tuple[Tensor, Descale]:
        """(8-bit tensor, factors) of x [B, H, N, D] (bhsd) or [B, N, H, D] (bshd).

        The tensor keeps the layout with its columns padded to a power of two, at least 32; with `transpose` it is a
        view whose rows lie next to each other. used: bool [B, N], rows that count; the others become 0.
        """
        view = strided(x, layout)
        batch = x.shape[0]
        heads, count = (x.shape[1], x.shape[2]) if layout == "bhsd" else (x.shape[2], x.shape[1])
        width = next_power_of_two(x.shape[-1])
        rows = self.block if self.scaling == "block" else 64
        blocks = -(-count // rows)
        shared = {"x": view, "used": used, "heads": heads, "count": count, "blocks": blocks, "norm": width**-0.5}
        constant: dict[str, Any] = {"D": x.shape[-1], "WIDTH": width, "BLOCK": rows, "ROTATE": self.rotate}
        options = {"num_warps": 4, "num_stages": 1}
        grid = blocks * heads * batch
        amax = x.new_empty((batch, heads, blocks), dtype=torch.float32)
        start([Launch(amax_kernel, grid, {**shared, "amax": amax}, constant, options)])
        inverse, factor = self._factors(amax)
        out = self._storage(x, layout, max(width, MIN_COLUMNS), transpose)
        target = strided(out, layout)
        arguments = {
            **shared,
            "inverse": described(inverse, rows),
            "out": Strided(out, target.batch, target.head, target.row),
            "column_stride": out.stride(-1),
        }
        constant = {**constant, "LARGEST": float(torch.finfo(self.dtype).max)}
        start([Launch(quantise_kernel, grid, arguments, constant, options)])
        return out, described(factor, rows)

    def _factors(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        """(inverse, descale) [B, H, blocks], or with dimensions of 1 where one serves all (step 3)."""
        batch, heads, _ = amax.shape
        if self.scaling == "tensor":
            amax = amax.amax().reshape(1, 1, 1) if amax.numel() else amax.new_zeros(1, 1, 1)
        elif self.scaling == "head":
            if amax.numel():
                amax = amax.amax(-1, keepdim=True).reshape(batch, -1, self.group).amax(-1, keepdim=True)
                amax = amax.repeat_interleave(self.group, 1)
            else:
                amax = amax.new_zeros(batch, heads, 1)
        largest = torch.finfo(self.dtype).max
        none = amax == 0
        inverse = torch.where(none, 1.0, largest / torch.where(none, 1.0, amax))
        # A row of tiny values would have an infinite inverse; the largest float32 saturates it as well.
        inverse = inverse.clamp(max=torch.finfo(torch.float32).max)
        return inverse.contiguous(), torch.where(none, 1.0, amax / largest).contiguous()

    def _storage(self, x: Tensor, layout: str, columns: int, transpose: bool) -> Tensor:
        shape = (*x.shape[:-1], columns)
        if not transpose:
            # Columns behind the head are read as zeros.
            return torch.zeros(shape, dtype=self.dtype, device=x.device)
        rows = 2 if layout == "bhsd" else 1
        order = [n for n in range(4) if n != rows] + [rows]
        stored = torch.zeros([shape[n] for n in order], dtype=self.dtype, device=x.device)
        return stored.permute([order.index(n) for n in range(4)])


def with_descales(launches: list[Launch], descales: Descales) -> list[Launch]:
    """Flash launches that read stored values: the same, with `descales` in their score."""
    out = []
    for launch in launches:
        if "score" in launch.arguments:
            score = launch.arguments["score"]._replace(stored=1, descales=descales)
            launch = replace(launch, arguments={**launch.arguments, "score": score})
        out.append(launch)
    return out
