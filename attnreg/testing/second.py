"""What the second run of a candidate is given: other values at the same addresses, gradients in other strides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnreg.testing.inputs import Inputs

__all__ = ["other_values", "transposed"]


@contextlib.contextmanager
def other_values(inputs: Inputs, names: Sequence[str]) -> Iterator[None]:
    """Within the block, those of q, k and v hold other values where they lie; afterwards what they held before.

    The channels change places, those of q in another way than those of k and v: each row keeps its size, so that logits
    stay as large or as low as the flavour makes them, and every dtype is exact.
    """
    places = [_once(getattr(inputs, name).detach()) for name in names]
    before = [x.clone() for x in places]
    try:
        for name, x, old in zip(names, places, before, strict=True):
            x.copy_(_permuted(old, turn=name == "q"))
        yield
    finally:
        for x, old in zip(places, before, strict=True):
            x.copy_(old)


def transposed(x: Tensor) -> Tensor:
    """The values of x in memory of the reverse order of dimensions; every second element where that is dense too."""
    order = list(range(x.dim()))[::-1]
    out = x.permute(order).contiguous().permute(order)
    return torch.stack([x, x], -1)[..., 0] if out.is_contiguous() else out


def _once(x: Tensor) -> Tensor:
    """Every element of x once: one entry of the dimensions that repeat the same memory."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


def _permuted(x: Tensor, turn: bool) -> Tensor:
    bits = x.view(torch.uint8) if x.element_size() == 1 else x  # float8 has neither roll nor flip
    return (bits.roll(1, -1) if turn else bits.flip(-1)).view(x.dtype)
