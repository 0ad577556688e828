"""BlockLayout: the one block form of mask AND sparsity that every sparse kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attnreg.blocks.intervals import ragged
from attnreg.blocks.tiles import unpack

__all__ = ["BlockLayout"]


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Per query block the list of live key blocks, each full or partial; partial ones point to a bit tile.

    The pattern is told apart for `n_batch` batches and `n_heads` query heads, each 1 where the pattern does not
    depend on it: a kernel reads batch `b if n_batch > 1 else 0`, and head likewise. A line is one row block:
    line = (b * n_heads + h) * n_q + r, with n_q = ceil(sq / block_q) and n_kv = ceil(skv / block_kv).

    Row lists (all int32, contiguous, on one device); the blocks of line n are the entries
    row_ptr[n] .. row_ptr[n + 1] - 1, first the full ones by ascending column, then the partial ones by ascending
    column:

        row_ptr    [n_batch * n_heads * n_q + 1]
        row_split  [n_batch * n_heads * n_q]   entry where the line's partial blocks begin
        col_idx    [n_live]                    column block of each entry: its keys start at col_idx * block_kv
        tile_idx   [n_live]                    -1: full; otherwise the index of the entry's bit tile

    Bit tiles, each different one once:

        bits       [n_tiles, block_q, ceil(block_kv / 32)] int32; bit n of word w of a row (lowest bit is 0) says
                   whether key w * 32 + n of the block may be attended

    Column lists, for the backward: the same with rows and columns exchanged; line = (b * n_heads + h) * n_kv + c.
    They are built when first read:

        col_ptr    [n_batch * n_heads * n_kv + 1]
        col_split  [n_batch * n_heads * n_kv]
        row_idx    [n_live]                    row block of each entry
        col_tile   [n_live]                    -1 or the index of the bit tile (the same tiles, not transposed)

    Full means: every pair of the block that exists attends. Rows >= q_len[b] and keys >= kv_len[b] do not exist
    (None: all sq rows, all skv keys): a kernel bounds both itself in full blocks; in bit tiles they hold 0. The
    layout is minimal: an entry without a live pair, and a bit tile that is full, never occur. A row of queries
    without any entry attends nothing.

    offset: position of row 0 on the key time line, one number or one a batch. pairs: live pairs over all `batch`
    batches and `heads` heads, exactly.
    """

    sq: int
    skv: int
    block_q: int
    block_kv: int
    batch: int
    heads: int
    n_batch: int
    n_heads: int
    offset: int | tuple[int, ...]
    q_len: tuple[int, ...] | None
    kv_len: tuple[int, ...] | None
    pairs: int
    row_ptr: Tensor
    row_split: Tensor
    col_idx: Tensor
    tile_idx: Tensor
    bits: Tensor

    @property
    def n_q(self) -> int:
        """Row blocks of one batch and head."""
        return -(-self.sq // self.block_q)

    @property
    def n_kv(self) -> int:
        """Column blocks of one batch and head."""
        return -(-self.skv // self.block_kv)

    @property
    def device(self) -> torch.device:
        return self.row_ptr.device

    @property
    def live_blocks(self) -> int:
        """Entries: live blocks over the batches and heads that are told apart."""
        return self.col_idx.numel()

    @cached_property
    def full_blocks(self) -> int:
        """Entries that are full."""
        return int((self.tile_idx < 0).sum())

    @property
    def partial_blocks(self) -> int:
        """Entries that are partial."""
        return self.live_blocks - self.full_blocks

    @property
    def n_tiles(self) -> int:
        """Different bit tiles."""
        return self.bits.shape[0]

    @property
    def density(self) -> float:
        """Live pairs of all pairs; 0 where there are none."""
        return self.pairs / max(self.batch * self.heads * self.sq * self.skv, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the row lists and bit tiles."""
        parts = (self.row_ptr, self.row_split, self.col_idx, self.tile_idx, self.bits)
        return sum(x.numel() * x.element_size() for x in parts)

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        line = torch.repeat_interleave(
            torch.arange(self.row_ptr.numel() - 1, device=self.device), self.row_ptr.diff().long()
        )
        lead = torch.div(line, max(self.n_q, 1), rounding_mode="floor")
        column = lead * self.n_kv + self.col_idx
        partial = (self.tile_idx >= 0).long()
        # A stable sort keeps rows ascending within each half of a column's list.
        order = torch.argsort(column * 2 + partial, stable=True)
        lines = self.n_batch * self.n_heads * self.n_kv
        held = torch.bincount(column * 2 + partial, minlength=2 * lines).view(lines, 2)
        ptr = torch.zeros(lines + 1, dtype=torch.int64, device=self.device)
        ptr[1:] = held.sum(1).cumsum(0)
        split = ptr[:-1] + held[:, 0]
        row = (line - lead * self.n_q)[order]
        return ptr.int(), split.int(), row.int(), self.tile_idx[order]

    @property
    def col_ptr(self) -> Tensor:
        return self._columns[0]

    @property
    def col_split(self) -> Tensor:
        return self._columns[1]

    @property
    def row_idx(self) -> Tensor:
        return self._columns[2]

    @property
    def col_tile(self) -> Tensor:
        return self._columns[3]

    def flops(self, head_dim: int, head_dim_v: int | None = None, *, backward: bool = False) -> int:
        """Floating-point operations of the two products over live pairs; backward: 2.5 times as many."""
        forward = 2 * self.pairs * (head_dim + (head_dim if head_dim_v is None else head_dim_v))
        return forward * 5 // 2 if backward else forward

    def bytes(
        self, head_dim: int, head_dim_v: int | None = None, *, itemsize: int = 4, kv_heads: int | None = None
    ) -> int:
        """Bytes that a forward reads and writes if each tensor is touched once: q, k, v, out, lse, the layout."""
        dv = head_dim if head_dim_v is None else head_dim_v
        rows, keys = self.batch * self.heads * self.sq, self.batch * (kv_heads or self.heads) * self.skv
        return (rows + keys) * (head_dim + dv) * itemsize + rows * 4 + self.nbytes

    def to(self, device: torch.device | str) -> BlockLayout:
        """The layout with its arrays on `device`; itself where they are there."""
        if torch.device(device) == self.device:
            return self
        names = ("row_ptr", "row_split", "col_idx", "tile_idx", "bits")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def padded(self, *, partial: bool, width: int | None = None) -> tuple[Tensor, Tensor]:
        """The full or the partial row lists as a table: (count [n_batch, n_heads, n_q], columns [..., width]).

        int32; unused columns are 0. width: at least the longest list, which is the default.
        """
        start, end = self.row_ptr[:-1], self.row_split
        if partial:
            start, end = self.row_split, self.row_ptr[1:]
        count = end - start
        lead = (self.n_batch, self.n_heads, self.n_q)
        width = int(count.max()) if width is None and count.numel() else width or 0
        lane = torch.arange(width, device=self.device, dtype=torch.int32)
        at = (start[:, None] + lane).clamp(max=max(self.live_blocks - 1, 0))
        table = self.col_idx[at] if self.live_blocks else torch.zeros_like(at)
        table = torch.where(lane < count[:, None], table, 0).int()
        return count.view(lead), table.view(*lead, width)

    def to_dense(self) -> Tensor:
        """Bool [n_batch, n_heads, sq, skv] on the CPU: which pairs attend. For tests and small sizes."""
        ptr, col, tile = (x.cpu().numpy() for x in (self.row_ptr, self.col_idx, self.tile_idx))
        kinds = unpack(self.bits.cpu().numpy(), self.block_kv)
        kinds = np.concatenate([kinds, np.ones((1, self.block_q, self.block_kv), dtype=bool)])
        lines = self.n_batch * self.n_heads * self.n_q
        out = np.zeros((lines, self.n_kv, self.block_q, self.block_kv), dtype=bool)
        line, _ = ragged(np.zeros(lines, dtype=np.int64), np.diff(ptr).astype(np.int64))
        out[line, col] = kinds[tile]
        out = out.reshape(self.n_batch, self.n_heads, self.n_q, self.n_kv, self.block_q, self.block_kv)
        out = out.transpose(0, 1, 2, 4, 3, 5)
        out = out.reshape(self.n_batch, self.n_heads, self.n_q * self.block_q, self.n_kv * self.block_kv)
        out = np.ascontiguousarray(out[:, :, : self.sq, : self.skv])
        for b in range(self.n_batch):
            if self.q_len is not None:
                out[b, :, self.q_len[b if len(self.q_len) > 1 else 0] :] = False
            if self.kv_len is not None:
                out[b, :, :, self.kv_len[b if len(self.kv_len) > 1 else 0] :] = False
        return torch.from_numpy(out)

    def show(self, *, batch: int = 0, head: int = 0, width: int = 64) -> str:
        """A picture in text of one batch and head: which blocks are full, partial, not live."""
        from attnreg.blocks.picture import of_blocks

        return of_blocks(self, batch=batch, head=head, width=width)

    def __repr__(self) -> str:
        return (
            f"BlockLayout({self.sq} x {self.skv}, blocks {self.block_q} x {self.block_kv}, "
            f"told apart {self.n_batch} x {self.n_heads}, full {self.full_blocks}, partial {self.partial_blocks}, "
            f"tiles {self.n_tiles}, density {self.density:.4g})"
        )
