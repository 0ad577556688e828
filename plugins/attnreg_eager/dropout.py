"""Dropout masks that repeat: one seed a call, one generator a tile, so that the backward draws the same again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["draw_seed", "keeps", "keeps_traced"]

Keep = Callable[[tuple[int, ...]], Tensor]


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed from the generator, or from torch's default CPU one, which advances by one draw."""
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(1 << 62, (), generator=generator, device=device))


def keeps(seed: int, dropout_p: float, device: torch.device) -> Callable[[int], Keep]:
    """For the n-th tile of a call: a function that draws the same keep mask of a shape each time."""

    def tile(n: int) -> Keep:
        def draw(shape: tuple[int, ...]) -> Tensor:
            generator = torch.Generator(device=device).manual_seed((seed + n) % (1 << 62))
            return torch.rand(shape, generator=generator, device=device) >= dropout_p

        return draw

    return tile


def keeps_traced(dropout_p: float, device: torch.device, generator: torch.Generator | None) -> Callable[[int], Keep]:
    """The same inside a captured graph, which keeps the mask itself for its backward."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        if generator is None:  # symbolic sizes take no generator argument, not even None
            return torch.rand(shape, device=device) >= dropout_p
        return torch.rand(shape, generator=generator, device=device) >= dropout_p

    return lambda n: draw
