"""Which of the two native paths serves a problem: decode, by rows of a cache, or prefill, by tiles of query rows."""

from __future__ import annotations

from attnreg import Hardware, Problem
from attnreg_cpu import build
from attnreg_cpu.decode import ONE_PASS, decode_supports
from attnreg_cpu.prefill import prefill_supports
from attnreg_cpu.product import products_of
from attnreg_cpu.tuning_space import lanes_of, ready_shapes
from attnreg_cpu.variant import ELEMENTS

MOST_ROWS = 64  # query rows of a KV head: beyond, tiles of them are faster
MOST_ROWS_OF_IDLE_CORES = 512  # where tiles would leave half of the cores without work
MOST_ROWS_BY_BLOCKS = 8  # where AMX could multiply them
KEYS_A_ROW = 8  # fewer keys than so many for each row: tiles are faster


def decodes(problem: Problem, hardware: Hardware) -> bool:
    """Is the problem the decode path's: few query rows a KV head, or a cache that the prefill kernels do not read?

    Few are also rows that would leave prefill half of the cores idle, as it cuts nothing but rows (128 query heads on
    one KV head): decoding cuts the keys as well. Where both fill the cores, it is a tenth slower for so many.
    """
    if decode_supports(problem):
        return False
    rows = problem.sq * problem.group
    if rows > MOST_ROWS and problem.kv_dtype in ELEMENTS:
        idle = not _tiles_fill_cores(2, problem, hardware)
        return rows <= MOST_ROWS_OF_IDLE_CORES and idle and problem.skv >= rows
    return bool(prefill_supports(problem)) or not _tiles_are_faster(problem, hardware)


def _tiles_are_faster(problem: Problem, hardware: Hardware) -> bool:
    """Of up to MOST_ROWS rows. Measured on an Emerald Rapids.

    Where the keys are few, starting to decode takes longer than the rest: 16 sequences of 64 tokens and 12 heads take
    2.7 ms, and 1.6 by tiles. AMX multiplies nine rows of bfloat16 and more so fast that decoding, which widens them,
    takes 1.3 to 4 times as long; with eight, only where the cache was read a moment ago.
    """
    rows = problem.sq * problem.group
    if rows <= ONE_PASS or (build.lacking() and not ready_shapes(problem, hardware)):
        return False
    if problem.skv < KEYS_A_ROW * rows:
        return True
    by_blocks = products_of(problem.dtype, hardware)[0] == "amx" and rows > MOST_ROWS_BY_BLOCKS
    return by_blocks and _tiles_fill_cores(1, problem, hardware)


def _tiles_fill_cores(vectors: int, problem: Problem, hardware: Hardware) -> bool:
    """Do tiles with so many registers of query rows occupy more than half of the cores?"""
    tiles = -(-problem.sq * problem.group // (vectors * lanes_of(hardware)))
    return 2 * tiles * problem.kv_heads * problem.sequences > hardware.cores
