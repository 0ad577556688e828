"""From mask AND sparsity to a BlockLayout: analyse, list the live blocks, evaluate only the undecided tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks import tables as _tables  # noqa: F401  # registers its masks
from attnreg.blocks.analysis import Analysis, Context, analyse, meet
from attnreg.blocks.code import reads_batch_and_head
from attnreg.blocks.grid import Grid, Tiles
from attnreg.blocks.intervals import Ints, ragged
from attnreg.blocks.layout import BlockLayout
from attnreg.blocks.patterns import analyse_pattern, pattern_allows
from attnreg.blocks.tiles import EMPTY, FULL, BitTiles, distinct
from attnreg.errors import InputError, MissingTensorError, ShapeError

__all__ = ["block_layout"]

Lengths = int | Sequence[int] | Tensor | None
LIMIT = 2**31 - 1


def block_layout(
    mask: m.Mask,
    sparsity: s.Sparsity | None,
    sq: int,
    skv: int,
    block_q: int,
    block_kv: int,
    *,
    heads: int = 1,
    batch: int = 1,
    offset: Lengths = None,
    q_len: Lengths = None,
    kv_len: Lengths = None,
    pattern_keys: Lengths = None,
    tensors: Mapping[str, Any] | None = None,
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The block form of `mask` AND `sparsity` for `sq` queries on `skv` keys, in tiles of block_q x block_kv.

    heads: query heads. offset: position of row 0 on the key time line, one for all or one a batch; the default is
    bottom-right, kv_len - q_len. q_len, kv_len: the rows and keys that exist, one for all or one a batch; the
    default is sq and skv. pattern_keys: the keys that BigBird counts its last blocks from and draws from; skv by
    default, and packed sequences give their own lengths. tensors: the call tensors that mask and sparsity need
    (`kv_lengths` [batch], `document_ids` [batch, skv], `attn_mask`, ...), on any device. packed: layout thd, where
    each sequence is a batch and documents are already apart. device: where the arrays go; `Custom` masks are
    evaluated there.

    Of no batch, the layout is that of one batch without rows and keys: nothing is live.

    Time and memory are O(live blocks), plus the evaluation of the different undecided tiles; `attn_mask` is read
    once, and `Custom` is evaluated block by block, in bounded memory.

    Raises InputError (or a kind of it) where a size is negative, a tensor is missing or does not fit `batch`, or
    there are 2**31 live blocks or more.
    """
    for name, value, least in (
        ("sq", sq, 0),
        ("skv", skv, 0),
        ("block_q", block_q, 1),
        ("block_kv", block_kv, 1),
        ("heads", heads, 1),
        ("batch", batch, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(name, f"expected an integer >= {least}, got {value!r}")
    pattern = s.Dense() if sparsity is None else sparsity
    given = _needed(mask, pattern, tensors or {}, (batch, heads, sq, skv), packed)
    q_lens = _lengths("q_len", q_len, batch, sq, 0, sq)
    kv_lens = _lengths("kv_len", kv_len, batch, skv, 0, skv)
    pattern_lens = _lengths("pattern_keys", pattern_keys, batch, skv, 0, skv)
    offsets = _lengths("offset", offset, batch, kv_lens - q_lens, -(2**61), 2**61)
    if not batch:
        none, zero = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
        grid = Grid(sq, skv, block_q, block_kv, 1, 1, zero, zero, zero, zero)
        bits = BitTiles(mask.allows, {}, packed, torch.device("cpu"))
        return _finish(grid, Tiles(grid, none, none), none, bits, 0, heads, q_len, kv_len, torch.device(device))
    # Custom reads tensors of its own, which live where the call's do.
    where = torch.device(device) if any(isinstance(x, m.Custom) for x in m.walk(mask)) else torch.device("cpu")
    by_batch, by_head = _depends(mask, pattern, given, (q_lens, kv_lens, offsets, pattern_lens), where)
    n_batch, n_heads = (batch if by_batch else 1), (heads if by_head else 1)
    lens = (x[:n_batch] for x in (offsets, q_lens, kv_lens, pattern_lens))
    grid = Grid(sq, skv, block_q, block_kv, n_batch, n_heads, *lens)
    if grid.lines >= LIMIT:
        raise InputError("sq", f"{grid.lines} row blocks do not fit int32 lists; use larger blocks than {block_q}")

    at = Context(grid, {name: x.detach().cpu().numpy() for name, x in given.items()}, packed)
    whole = analyse(mask, at)
    blocks = analyse_pattern(pattern, at)
    if blocks is not None:
        whole = meet(whole, blocks)
    tiles, kind = _listed(grid, whole)
    bits = _resolve(mask, pattern, tiles, kind, whole, given, packed, where)
    return _finish(grid, tiles, kind, bits, batch, heads, q_len, kv_len, torch.device(device))


def _needed(
    mask: m.Mask, pattern: s.Sparsity, tensors: Mapping[str, Any], sizes: tuple[int, int, int, int], packed: bool
) -> dict[str, Tensor]:
    names = set(mask.tensors() | pattern.tensors())
    if packed:
        names.discard("document_ids")
    for name in sorted(names):
        got = tensors.get(name)
        if not isinstance(got, Tensor):
            raise MissingTensorError(name, f"the mask or sparsity needs this tensor, got {got!r}")
        _check_shape(name, tuple(got.shape), pattern, sizes)
    return {name: tensors[name] for name in sorted(names)}


def _check_shape(name: str, shape: tuple[int, ...], pattern: s.Sparsity, sizes: tuple[int, int, int, int]) -> None:
    batch, heads, sq, skv = sizes
    if name in ("kv_lengths", "prefix_lengths"):
        fits, wanted = shape == (batch,), f"[{batch}], one entry a batch"
    elif name in ("document_ids", "global_mask"):
        fits, wanted = len(shape) == 2 and shape[0] == batch and shape[1] >= skv, f"[{batch}, {skv}]"
    elif isinstance(pattern, s.Blocks) and name == "block_mask":
        blocks = (-(-sq // pattern.block_q), -(-skv // pattern.block_kv))
        fits = len(shape) == 4 and shape[2:] == blocks and shape[0] in (1, batch) and shape[1] in (1, heads)
        wanted = f"[{batch} or 1, {heads} or 1, {blocks[0]}, {blocks[1]}]"
    else:
        fits = len(shape) <= 4 and all(n in (1, size) for n, size in zip(shape[::-1], sizes[::-1], strict=False))
        wanted = f"a shape that broadcasts to {sizes}"
    if not fits:
        raise ShapeError(name, f"expected {wanted}, got shape {shape}")


def _lengths(name: str, value: Lengths, batch: int, default: int | Ints, low: int, high: int) -> Ints:
    if value is None:
        out = np.asarray(default, dtype=np.int64)
    elif isinstance(value, Tensor):
        out = value.detach().cpu().numpy().astype(np.int64)
    else:
        out = np.asarray(value, dtype=np.int64)
    if out.ndim > 1 or (out.ndim == 1 and out.size not in (1, batch)):
        raise ShapeError(name, f"expected one integer or {batch}, one a batch, got shape {out.shape}")
    if out.size and (out.min() < low or out.max() > high):
        raise InputError(name, f"expected {low} <= {name} <= {high}, got {out.tolist()}")
    return np.ascontiguousarray(np.broadcast_to(out.reshape(-1), (batch,)))


def _depends(
    mask: m.Mask,
    pattern: s.Sparsity,
    given: Mapping[str, Tensor],
    lengths: tuple[Ints, ...],
    where: torch.device,
) -> tuple[bool, bool]:
    """Can the pattern differ between batches, between heads?"""
    by_batch = any(bool((x != x[0]).any()) for x in lengths)
    by_head = isinstance(pattern, s.BigBird) and pattern.random_blocks > 0
    for name, x in given.items():
        if name in ("attn_mask", "block_mask"):
            by_batch |= x.dim() >= 4 and x.shape[-4] > 1
            by_head |= x.dim() >= 3 and x.shape[-3] > 1
        else:
            by_batch |= x.shape[0] > 1
    for part in m.walk(mask):
        if isinstance(part, m.Custom):
            reads = reads_batch_and_head(part, where)
            by_batch, by_head = by_batch or reads[0], by_head or reads[1]
    # What is not known is asked for every batch and head; equal answers are joined again at the end.
    unknown = any(type(x) not in _KNOWN for x in m.walk(mask)) or type(pattern) not in _PATTERNS
    return bool(by_batch or unknown), bool(by_head or unknown)


_KNOWN = {
    m.And, m.Or, m.Not, m.Full, m.Causal, m.SlidingWindow, m.PrefixLM, m.Chunked, m.Dilated, m.Global, m.Document,
    m.Padding, m.Dense, m.Custom,
}  # fmt: skip
_PATTERNS = {s.Dense, s.Blocks, s.BigBird, s.Strided}


def _listed(grid: Grid, whole: Analysis) -> tuple[Tiles, Ints]:
    """Every block that may be live, by line and column, with FULL or EMPTY (not yet decided)."""
    may, must = grid.blocks(whole.may, inner=False), grid.blocks(whole.must, inner=True)
    if int((may.hi - may.lo).sum()) > LIMIT:
        raise InputError("sq", f"{int((may.hi - may.lo).sum())} live blocks do not fit int32 lists; use larger blocks")
    _, code = ragged(may.lo, may.hi - may.lo)
    width = grid.n_kv + 1
    kind = np.where(must.covers(code, code + 1), FULL, EMPTY)
    return Tiles(grid, code // width, code % width), kind


def _resolve(
    mask: m.Mask,
    pattern: s.Sparsity,
    tiles: Tiles,
    kind: Ints,
    whole: Analysis,
    given: Mapping[str, Tensor],
    packed: bool,
    where: torch.device,
) -> BitTiles:
    """Evaluates each different undecided tile once and writes the outcome to `kind`."""
    exists = pattern_allows(pattern, tiles.grid)

    def allows(c: m.Coords) -> Tensor:
        return mask.allows(c) if isinstance(pattern, s.Dense) else mask.allows(c) & exists(c)

    there = {name: x.detach().to(where) for name, x in given.items()}
    bits = BitTiles(allows, there, packed, where)
    open_ = np.flatnonzero(kind == EMPTY)
    if open_.size:
        asked = tiles[open_]
        sizes = [(asked.rows, tiles.grid.block_q + 1), (asked.keys, tiles.grid.block_kv + 1)]
        first, inverse = distinct([*sizes, *whole.sign(asked)], open_.size)
        kind[open_] = bits.evaluate(asked[first])[inverse]
    return bits


def _finish(
    grid: Grid,
    tiles: Tiles,
    kind: Ints,
    bits: BitTiles,
    batch: int,
    heads: int,
    q_len: Lengths,
    kv_len: Lengths,
    device: torch.device,
) -> BlockLayout:
    live = kind != EMPTY
    tiles, kind = tiles[np.flatnonzero(live)], kind[live]
    full = kind == FULL
    cells = np.where(full, tiles.rows * tiles.keys, 0)
    cells[~full] = bits.counts[kind[~full]]
    pairs = int(cells.sum()) * (batch // grid.batch) * (heads // grid.heads)
    group = tiles.line * 2 + ~full
    order = np.argsort(group, kind="stable")
    held = np.bincount(group, minlength=2 * grid.lines).reshape(-1, 2)
    col, kind = tiles.col[order], kind[order]
    n_batch, n_heads, held, col, kind = _joined(grid, held, col, kind)
    ptr = np.concatenate([[0], np.cumsum(held.sum(1))])
    split = ptr[:-1] + held[:, 0]

    def out(x: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device)

    per_batch = [tuple(int(n) for n in x[:n_batch]) for x in (grid.offset, grid.q_len, grid.kv_len)]
    return BlockLayout(
        sq=grid.sq,
        skv=grid.skv,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        batch=batch,
        heads=heads,
        n_batch=n_batch,
        n_heads=n_heads,
        offset=per_batch[0][0] if n_batch == 1 else per_batch[0],
        q_len=None if q_len is None else per_batch[1],
        kv_len=None if kv_len is None else per_batch[2],
        pairs=pairs,
        row_ptr=out(ptr),
        row_split=out(split),
        col_idx=out(col),
        tile_idx=out(kind),
        bits=out(bits.bits(grid.block_q, grid.block_kv)),
    )


def _joined(grid: Grid, held: Ints, col: Ints, kind: Ints) -> tuple[int, int, Ints, Ints, Ints]:
    """Heads, then batches, whose lists are all equal become one."""
    n_batch, n_heads, n_q = grid.batch, grid.heads, grid.n_q
    if n_batch * n_heads == 1 or not n_q:
        return n_batch, n_heads, held, col, kind
    counts = held.reshape(n_batch, n_heads, n_q * 2)
    ends = np.cumsum(counts.sum(2).reshape(-1)).reshape(n_batch, n_heads)
    starts = ends - counts.sum(2)

    def equal(b: int, h: int, c: int, g: int) -> bool:
        one, two = slice(starts[b, h], ends[b, h]), slice(starts[c, g], ends[c, g])
        return (
            np.array_equal(counts[b, h], counts[c, g])
            and np.array_equal(col[one], col[two])
            and np.array_equal(kind[one], kind[two])
        )

    if n_heads > 1 and all(equal(b, 0, b, h) for b in range(n_batch) for h in range(1, n_heads)):
        n_heads = 1
    same = all(bool((x == x[0]).all()) for x in (grid.offset, grid.q_len, grid.kv_len))
    if n_batch > 1 and same and all(equal(0, h, b, h) for b in range(1, n_batch) for h in range(n_heads)):
        n_batch = 1
    kept = [slice(starts[b, h], ends[b, h]) for b in range(n_batch) for h in range(n_heads)]
    col, kind = np.concatenate([col[k] for k in kept]), np.concatenate([kind[k] for k in kept])
    return n_batch, n_heads, counts[:n_batch, :n_heads].reshape(-1, 2), col, kind
