"""Mask AND sparsity as blocks: the one form that sparse kernels read, its cost, and a cache of it."""

from attnreg.blocks.build import block_layout
from attnreg.blocks.cache import cached_block_layout, clear_cache
from attnreg.blocks.call import call_layout
from attnreg.blocks.cost import LivePairs, live_pairs
from attnreg.blocks.layout import BlockLayout

__all__ = [
    "BlockLayout",
    "LivePairs",
    "block_layout",
    "cached_block_layout",
    "call_layout",
    "clear_cache",
    "live_pairs",
]
