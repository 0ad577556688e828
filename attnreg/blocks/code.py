"""Does a mask_mod read its batch, its head? One that does not is evaluated once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import masks as m

__all__ = ["reads_batch_and_head"]


class _Watched(Tensor):
    """A tensor that notes whether any operation took it."""

    read: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _note((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _note(value: Any) -> None:
    if isinstance(value, _Watched):
        value.read = True
    elif isinstance(value, (tuple, list)):
        for item in value:
            _note(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            _note(item)


def _watched(device: torch.device) -> _Watched:
    x = torch.zeros((1, 1, 1), dtype=torch.int64, device=device).as_subclass(_Watched)
    x.read = False
    return x


def reads_batch_and_head(mask: m.Custom, device: torch.device) -> tuple[bool, bool]:
    """Whether mask_mod(b, h, p, j) takes b, and h, into any operation.

    One call decides, as FlexAttention's signature has no control flow on values (it must run under vmap). One that
    fails on a single pair is taken to read both.
    """
    b, h = _watched(device), _watched(device)
    at = torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
    try:
        mask.mask_mod(b, h, at, at)
    except Exception:  # user code: whatever it raises, asking for every batch and head stays right
        return True, True
    return b.read, h.read
