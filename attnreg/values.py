"""Check the values of integer tensors: lengths, offsets and tables that contradict the sizes of the call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from attnreg.errors import InputError
from attnreg.spec import AttentionSpec
from attnreg.validate import Sizes, check_blocks

__all__ = ["VALUE_NAMES", "check_values"]

VALUE_NAMES = frozenset(
    {"kv_lengths", "prefix_lengths", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k", "query_offset"}
)
"""The call tensors whose values can contradict the call."""


def check_values(spec: AttentionSpec, sizes: Sizes, tensors: Mapping[str, Any]) -> None:
    """Raise InputError for a value that cannot be meant. Reads every tensor: on a GPU that synchronises."""
    for name, check in CHECKS.items():
        x = tensors.get(name)
        if isinstance(x, Tensor):
            check(name, x.tolist(), spec, sizes, tensors)


def _lengths(name: str, values: list[int], spec: AttentionSpec, sizes: Sizes, tensors: Mapping[str, Any]) -> None:
    for b, n in enumerate(values):
        if not 0 <= n <= sizes.skv:
            raise InputError(name, f"expected 0 <= length <= Skv = {sizes.skv}, got {n} at batch {b}")


def _prefix(name: str, values: list[int], spec: AttentionSpec, sizes: Sizes, tensors: Mapping[str, Any]) -> None:
    for b, n in enumerate(values):
        if n < 0:
            raise InputError(name, f"expected lengths >= 0, got {n} at batch {b}")


def _offset(name: str, values: list[int], spec: AttentionSpec, sizes: Sizes, tensors: Mapping[str, Any]) -> None:
    for b, n in enumerate(values):
        if abs(n) >= 2**45:
            raise InputError(name, f"expected an offset that fits a key time line (below 2**45), got {n} at batch {b}")


def _cumulative(name: str, values: list[int], spec: AttentionSpec, sizes: Sizes, tensors: Mapping[str, Any]) -> None:
    side = name[-1]
    total = sizes.total_q if side == "q" else sizes.total_k
    if values[0] != 0:
        raise InputError(name, f"expected to start at 0, got {values[0]}")
    longest = tensors.get(f"max_seqlen_{side}")
    for b in range(1, len(values)):
        step = values[b] - values[b - 1]
        if step < 0:
            raise InputError(
                name, f"expected values that never fall, got {values[b - 1]} then {values[b]} at entry {b}"
            )
        if longest is not None and step > longest:
            raise InputError(f"max_seqlen_{side}", f"expected at least the longest sequence, {step}, got {longest}")
    if values[-1] != total:
        raise InputError(name, f"expected to end at the {total} packed rows of {side}, got {values[-1]}")
    if side == "k" and longest is None:
        # Shapes alone cannot tell on a device, where the longest sequence was not read.
        check_blocks(spec, max((b - a for a, b in itertools.pairwise(values)), default=0), tensors)


def _table(name: str, rows: list[list[int]], spec: AttentionSpec, sizes: Sizes, tensors: Mapping[str, Any]) -> None:
    size = spec.page_size or 1
    used = _used(tensors)
    for b, row in enumerate(rows):
        live = len(row) if used is None else -(-used[b] // size)
        for n, page in enumerate(row):
            # Unused entries may be 0 or -1 even where there is no page at all.
            if not (0 if n < live else -1) <= page < max(sizes.pages, 0 if n < live else 1):
                what = f"a page in 0 .. {sizes.pages - 1}" if n < live else f"a page, 0 or -1 (of {sizes.pages} pages)"
                raise InputError(name, f"expected {what}, got {page} at batch {b}, entry {n}")


def _used(tensors: Mapping[str, Any]) -> list[int] | None:
    used = tensors.get("seqused_k")
    return used.tolist() if isinstance(used, Tensor) else None


# seqused_k and kv_lengths stand before block_table, whose check counts on their range.
CHECKS: dict[str, Callable[[str, Any, AttentionSpec, Sizes, Mapping[str, Any]], None]] = {
    "kv_lengths": _lengths,
    "seqused_k": _lengths,
    "prefix_lengths": _prefix,
    "query_offset": _offset,
    "cu_seqlens_q": _cumulative,
    "cu_seqlens_k": _cumulative,
    "block_table": _table,
}
assert frozenset(CHECKS) == VALUE_NAMES
