"""LayerMask: what the queries of one layer may attend, read off what transformers hands to that layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnreg.errors import InputError
from attnreg.integrations.call import Window
from attnreg.integrations.structured_mask import MaskSlice, StructuredMask, check_sizes, check_tensor
from attnreg.masks import Causal, Dense, Full, Mask

__all__ = ["CAUSAL", "DENSE", "FULL", "LayerMask"]

# Made once: Dynamo knows an object of the module's own, and can make none itself.
CAUSAL, FULL, DENSE = Causal(), Full(), Dense()


class LayerMask:
    """A mask expression with its window, alignment and tensors, and the floats that are added to the scores.

    given: what the mask interface made; a 4-D tensor of the model's or the user's own, bool (True = may attend) or
    additive; or None, which means causal or full as `is_causal` or the module says. Raises InputError for other sizes.
    """

    def __init__(
        self, given: Any, module: nn.Module, query: Tensor, skv: int, is_causal: bool | None, window: int | None
    ) -> None:
        self.query, self.skv = query, skv
        self.tensors: dict[str, Any] = {}
        self.window: Window = ()
        self.align = "bottom_right"
        self.added: Tensor | None = None
        self.made: StructuredMask | None = None
        self.mask: Mask = FULL
        if isinstance(given, MaskSlice) or (isinstance(given, StructuredMask) and given.handed is not None):
            given = given.dense
        if given is None:
            self.mask, self.window = _bare(module, is_causal, window, query.shape[2], skv)
        elif isinstance(given, StructuredMask):
            check_sizes(given, query, skv)
            self.made, self.mask = given, given.mask
            self.align = _align(given, skv, self.tensors, query)
            self.tensors |= given.tensors
        else:
            check_tensor(given, query, skv)
            if given.dtype == torch.bool:
                self.mask, self.tensors["attn_mask"] = DENSE, given[..., :skv]
            else:
                self.added = given[..., :skv]

    def allowed(self) -> Tensor | None:
        """Bool that broadcasts to [B, Hq, Sq, Skv], True where a query may attend; None where all may."""
        if self.made is not None:
            return None if self.mask is FULL else self.made.bools()
        if "attn_mask" in self.tensors:
            dense: Tensor = self.tensors["attn_mask"]
            return dense
        if self.mask is FULL and self.window == ():
            return None
        rows = torch.arange(self.query.shape[2], device=self.query.device)
        p, j = (rows + self.skv - self.query.shape[2])[:, None], torch.arange(self.skv, device=self.query.device)
        bools = j <= p if self.mask is CAUSAL else (j == j) & (p == p)
        if len(self.window) == 2:
            left, right = self.window
            bools = bools & (j >= p - left) & (j <= p + right)
        return bools

    def only(self, chosen: Tensor) -> None:
        """Narrow it to the pairs that `chosen`, bool [B, 1 or Hq, Sq, Skv], says as well."""
        allowed = self.allowed()
        self.mask, self.window, self.align, self.made = DENSE, (), "bottom_right", None
        self.tensors = {"attn_mask": chosen if allowed is None else allowed & chosen}

    def only_keys(self, indices: Tensor) -> None:
        """Narrow it to the keys that a sparse layer chose for each query: integers [B, Sq, any], -1 for none."""
        batch, _, sq, _ = self.query.shape
        if indices.ndim != 3 or tuple(indices.shape[:2]) != (batch, sq) or indices.is_floating_point():
            raise InputError(
                "indices", f"expected the chosen keys, integers [{batch}, {sq}, any], got {list(indices.shape)}"
            )
        where = indices.long()
        chosen = torch.zeros((batch, sq, self.skv + 1), dtype=torch.bool, device=indices.device)
        chosen = chosen.scatter(-1, where.masked_fill(where < 0, self.skv), True)
        self.only(chosen[:, None, :, : self.skv])

    def only_blocks(self, module: nn.Module, blocks: Tensor, positions: Tensor | None) -> None:
        """Narrow it to the blocks of keys that MiniMax M3's indexer chose, by the indexer's own reading of them."""
        read = getattr(getattr(module, "indexer", None), "build_block_mask", None)
        if read is None:
            raise InputError("block_indices", f"{type(module).__name__} has no indexer.build_block_mask that reads it")
        batch, _, sq, _ = self.query.shape
        if positions is None:
            positions = torch.arange(self.skv - sq, self.skv, device=self.query.device)
        positions = (positions if positions.ndim > 1 else positions[None]).expand(batch, -1)
        given = self.allowed() if self.added is None else self.added
        if given is None:
            given = torch.ones((1, 1, sq, self.skv), dtype=torch.bool, device=self.query.device)
        elif given.ndim == 2:
            given = given[None, None]
        kept = read(blocks, given, self.skv, self.query.dtype, self.query.device, positions) == 0
        self.mask, self.window, self.align, self.made, self.added = DENSE, (), "bottom_right", None, None
        self.tensors = {"attn_mask": kept}


def _align(made: StructuredMask, skv: int, tensors: dict[str, Any], query: Tensor) -> str:
    """How the spec says the offset: bottom_right counts from kv_lengths, so a padded pass says top_left."""
    offset = made.query_offset
    if not isinstance(offset, Tensor):
        if "kv_lengths" not in made.tensors and offset == skv - query.shape[2]:
            return "bottom_right"
        if offset == 0:
            return "top_left"
        tensors["query_offset"] = torch.full((query.shape[0],), offset, device=query.device)
    else:
        tensors["query_offset"] = offset.to(query.device).reshape(-1).expand(query.shape[0]).contiguous()
    return "offset"


def _bare(module: nn.Module, is_causal: bool | None, window: int | None, sq: int, skv: int) -> tuple[Mask, Window]:
    """The mask where transformers passes none: the argument says, else the module does; a guess would be silent."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", None)
    if causal is None:
        raise InputError(
            "attention_mask",
            f"None, and neither is_causal nor {type(module).__name__}.is_causal says whether that means causal or full",
        )
    if not causal:
        return FULL, () if window is None else (window, window)
    if 1 < sq != skv:
        raise InputError(
            "attention_mask",
            f"None for causal attention of {sq} queries on {skv} keys: where the queries stand is not said",
        )
    if window is not None and window < 1:
        raise InputError(
            "sliding_window",
            f"{window} for causal attention without a mask: no keys, or no window at all? Pass None for no window",
        )
    return CAUSAL, () if window is None else (window - 1, 0)
