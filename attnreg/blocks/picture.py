"""A block layout as a picture in text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnreg._picture import TALLEST, Survey, draw, edges_of, kinds_of
from attnreg.errors import InputError

if TYPE_CHECKING:
    from attnreg.blocks.layout import BlockLayout

__all__ = ["of_blocks"]


def of_blocks(layout: BlockLayout, *, batch: int = 0, head: int = 0, width: int = 64) -> str:
    """A block layout as text: marks are blocks, or groups of blocks where there are more than `width`."""
    for name, n, many in (("batch", batch, layout.batch), ("head", head, layout.heads)):
        if not 0 <= n < many:
            raise InputError(name, f"expected 0 <= {name} < {many}, got {n}")
    if not layout.n_q * layout.n_kv:
        return f"{layout!r}: no pairs"
    lead = (batch if layout.n_batch > 1 else 0) * layout.n_heads + (head if layout.n_heads > 1 else 0)
    ptr = layout.row_ptr[lead * layout.n_q : (lead + 1) * layout.n_q + 1].cpu().numpy()
    row = np.repeat(np.arange(layout.n_q), np.diff(ptr))
    entries = slice(int(ptr[0]), int(ptr[-1]))
    col, full = layout.col_idx[entries].cpu().numpy(), layout.tile_idx[entries].cpu().numpy() < 0
    top, left = edges_of(layout.n_q, TALLEST), edges_of(layout.n_kv, width)
    at = (np.searchsorted(top, row, side="right") - 1, np.searchsorted(left, col, side="right") - 1)
    live, whole = np.zeros((2, top.size - 1, left.size - 1), dtype=np.int64)
    np.add.at(live, at, 1)
    np.add.at(whole, at, full)
    cells = kinds_of(live > 0, whole == np.diff(top)[:, None] * np.diff(left))
    seen = Survey(cells, layout.n_q, layout.n_kv, int(live.sum()))
    title = f"blocks of {layout.block_q} x {layout.block_kv}: batch {batch}, head {head}"
    return draw(seen, title=title, unit="blocks", verb="are live")
