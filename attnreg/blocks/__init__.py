"""Mask AND sparsity as blocks: the one form that sparse kernels read, its cost, and a cache of it."""

from attnreg.blocks.build import block_layout
from attnreg.blocks.cache import cached_block_layout, clear_cache
from attnreg.blocks.layout import BlockLayout

__all__ = ["BlockLayout", "block_layout", "cached_block_layout", "clear_cache"]
