"""Coords: the indices of a block of query-key pairs, which mask and sparsity expressions are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Coords"]


@dataclass(frozen=True)
class Coords:
    """Broadcastable int64 indices of query-key pairs, and the call's tensors.

    b: batch (thd: sequence) index. h: query head. i: row of the query in q (thd: within its sequence).
    p: position of the query on the key time line. j: key index. `packed` is True under layout thd, where
    `cu_seqlens` already separates the documents. `heads` is a number above every h, which a trace cannot read
    off h; 0 where it may be read.
    """

    b: Tensor
    h: Tensor
    i: Tensor
    p: Tensor
    j: Tensor
    tensors: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False
    heads: int = 0
