"""Tables of ways to ask for a derivative, and what the ways share: fixed numbers, leaves, a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FIRST",
    "FORWARD",
    "SECOND",
    "Function",
    "Way",
    "leaves_of",
    "like",
    "loss_of",
    "only_of",
    "way",
    "weights_of",
]

Function = Callable[..., tuple[Tensor, ...]]
Way = Callable[[Function, Sequence[Tensor]], Any]

FIRST: dict[str, Way] = {}
SECOND: dict[str, Way] = {}
FORWARD: dict[str, Way] = {}


def way(table: dict[str, Way]) -> Callable[[Way], Way]:
    def keep(way: Way) -> Way:
        table[way.__name__] = way
        return way

    return keep


def like(x: Tensor, n: int) -> Tensor:
    """Fixed numbers in the shape of x, equal in every dtype."""
    count = math.prod(x.shape)
    places = torch.arange(count, dtype=torch.float64)
    return (torch.sin(places * 1.7 + n * n + 1) * 8).round().reshape(x.shape).to(x.dtype) / 8


def leaves_of(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in xs]


def weights_of(ys: Sequence[Tensor]) -> list[Tensor]:
    return [like(y.detach(), 100 + n) for n, y in enumerate(ys)]


def loss_of(f: Function) -> Callable[..., Tensor]:
    """A number that depends on every result, not linearly."""

    def loss(*xs: Tensor) -> Tensor:
        return sum((y * like(y, 100 + n)).sum() + (y * y).sum() / 2 for n, y in enumerate(f(*xs)))  # type: ignore[return-value]

    return loss


def only_of(f: Function, n: int) -> Callable[..., Tensor]:
    return lambda *xs: f(*xs)[n]


def some_of(f: Function) -> Callable[..., Tensor]:
    """A few numbers, each of every result."""

    def numbers(*xs: Tensor) -> Tensor:
        first, *rest = f(*xs)
        return (first * like(first, 100)).flatten(1).sum(1) + sum((y * like(y, 101)).sum() for y in rest)

    return numbers
