"""transformers: attnreg as an attention implementation, through its AttentionInterface and mask interface.

    from attnreg.integrations.transformers import register
    register()
    model = AutoModel.from_pretrained(path, attn_implementation="attnreg")

What transformers passes (causal, sliding window, padding, packed sequences, softcap, sinks, position bias, scaling,
dropout, GQA) becomes an AttentionSpec; what is not known raises, so that nothing is dropped in silence.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as hf

from attnreg.dispatch import attention
from attnreg.errors import InputError, UnexpectedTensorError
from attnreg.masks import Causal, Dense, Full, Mask, Padding, SlidingWindow
from attnreg.scores import ScaledDot
from attnreg.spec import AttentionSpec

__all__ = ["StructuredMask", "attention_forward", "attention_mask", "register"]

# Arguments that say nothing about attention: positions are in the rotary embedding or in the mask already.
SILENT = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "past_key_values", "past_key_value", "output_hidden_states",
        "return_dict", "output_router_logits", "num_items_in_batch", "logits_to_keep", "layer_idx", "token_type_ids",
        "position_embeddings", "is_training", "inputs_embeds", "labels", "input_ids", "encoder_hidden_states",
        "block_sequence_ids", "cache_params", "mask", "deterministic",
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class StructuredMask:
    """What the mask function hands to each layer: a mask expression with its tensors, instead of Sq x Skv bools.

    query_offset: where query row 0 stands on the keys' time line; an int, or a one-element tensor where a
    static cache keeps it on the device.
    """

    mask: Mask
    tensors: dict[str, Tensor]
    query_offset: int | Tensor
    shape: tuple[int, int, int, int]

    @property
    def ndim(self) -> int:
        """4, as of the tensor that it stands for: transformers looks before it converts a 2-D mask."""
        return 4

    def contiguous(self) -> StructuredMask:
        """Itself: generate() asks this of every mask that it makes ahead for a static cache."""
        return self


def register(name: str = "attnreg") -> None:
    """Register attention and mask functions under `name`, for `attn_implementation=name`."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = hf.causal_mask_function,
    attention_mask: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> StructuredMask:
    """transformers' mask interface: the mask function as a mask expression, or, where it is none, as exact bools.

    attention_mask: None, or 2-D bool [batch, keys seen], True for real tokens. See `transformers.masking_utils`.
    """
    if isinstance(attention_mask, StructuredMask):
        return attention_mask
    shape = (batch_size, 1, q_length, kv_length)
    offset = q_offset - kv_offset
    expression = _expression(mask_function) if not use_vmap else None
    if expression is None:
        whole = kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": use_vmap}
        make: Any = hf.sdpa_mask  # annotated int there, but a static cache's offset is a tensor
        dense = make(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **whole)
        return StructuredMask(Dense(), {"attn_mask": dense}, offset, shape)
    padding = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return StructuredMask(expression, {}, offset, shape)
    real = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    lengths = _right_padded(real)
    if lengths is None:
        return StructuredMask(expression & Dense(), {"attn_mask": real[:, None, None, :]}, offset, shape)
    if bool((lengths == kv_length).all()):
        return StructuredMask(expression, {}, offset, shape)
    return StructuredMask(expression & Padding(), {"kv_lengths": lengths}, offset, shape)


def _right_padded(real: Tensor) -> Tensor | None:
    """The lengths [B] where the values can be read without a sync and every row is real tokens, then padding."""
    if real.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    lengths = real.sum(-1)
    prefix = torch.arange(real.shape[-1]) < lengths[:, None]
    return lengths if bool((prefix == real).all()) else None


_AND = hf.and_masks(hf.causal_mask_function).__code__
_WINDOW = hf.sliding_window_overlay(1).__code__
_BOTH_SIDES = hf.sliding_window_bidirectional_overlay(1).__code__


def _expression(function: Any) -> Mask | None:
    """The mask expression of a mask function that transformers built from its own parts; None for any other."""
    if function is hf.causal_mask_function:
        return Causal()
    if function is hf.bidirectional_mask_function:
        return Full()
    code = getattr(function, "__code__", None)
    if code is None or function.__closure__ is None:
        return None
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if code is _WINDOW:  # kv > q - window, with no bound on the right
        return SlidingWindow(held["sliding_window"] - 1, _FAR)
    if code is _BOTH_SIDES:
        return SlidingWindow(held["sliding_window"], held["sliding_window"])
    if code is _AND:
        parts = [_expression(part) for part in held["mask_functions"]]
        return None if None in parts else functools.reduce(lambda a, b: a & b, [p for p in parts if p is not None])
    return None


_FAR = 2**61


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StructuredMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, Hq, Sq, D], key and value [B, Hkv, Skv, D] to [B, Sq, Hq, Dv].

    attention_mask: what `attention_mask` made; a 4-D mask of the user's own, bool (True = may attend) or additive;
    or None, which means causal or full as `is_causal` or the module says. Raises InputError for anything that
    would change the result and is not known here, attention weights among them.
    """
    _refuse_unknown(module, kwargs)
    sq, skv = query.shape[2], key.shape[2]
    tensors: dict[str, Any] = {}
    if isinstance(attention_mask, StructuredMask):
        mask, align = attention_mask.mask, _align(attention_mask, sq, skv, tensors, query)
        tensors |= attention_mask.tensors
        if attention_mask.shape[3] != skv:
            raise InputError("attention_mask", f"made for {attention_mask.shape[3]} keys, the layer has {skv}")
    elif attention_mask is None:
        mask, align = _bare_mask(module, is_causal, sliding_window, sq, skv), "bottom_right"
    elif attention_mask.dtype == torch.bool:
        mask, align = Dense(), "bottom_right"
        tensors["attn_mask"] = attention_mask[..., :skv]
    else:
        mask, align = Full(), "bottom_right"
        additive = attention_mask[..., :skv]
        position_bias = additive if position_bias is None else position_bias + additive
    if position_bias is not None:
        tensors["bias"] = position_bias.to(query.dtype)
    if s_aux is not None:
        tensors["sinks"] = s_aux
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    spec = _spec(mask, align, scale, softcap or 0.0, position_bias is not None, s_aux is not None, dropout or 0.0)
    out = attention(spec, query, key, value, **tensors)
    return out.transpose(1, 2).contiguous(), None


@functools.lru_cache(maxsize=1024)
def _spec(
    mask: Mask, align: Any, scale: float, softcap: float, bias: bool, sinks: bool, dropout_p: float
) -> AttentionSpec:
    """One spec object a meaning: making one costs far more than a call."""
    return AttentionSpec(
        mask=mask, align=align, score=ScaledDot(scale), softcap=softcap, bias=bias, sinks=sinks, dropout_p=dropout_p
    )


def _align(made: StructuredMask, sq: int, skv: int, tensors: dict[str, Any], query: Tensor) -> str:
    """How the spec says the offset: bottom_right counts from kv_lengths, so a padded pass says top_left."""
    offset = made.query_offset
    if isinstance(offset, int):
        if "kv_lengths" not in made.tensors and offset == skv - sq:
            return "bottom_right"
        if offset == 0:
            return "top_left"
        tensors["query_offset"] = torch.full((query.shape[0],), offset, device=query.device)
    else:
        tensors["query_offset"] = offset.to(query.device).reshape(-1).expand(query.shape[0]).contiguous()
    return "offset"


def _bare_mask(module: nn.Module, is_causal: bool | None, window: int | None, sq: int, skv: int) -> Mask:
    """The mask where transformers passes none: the argument says, else the module does; a guess would be silent."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", None)
    if causal is None:
        raise InputError(
            "attention_mask",
            f"None, and neither is_causal nor {type(module).__name__}.is_causal says whether that means causal or full",
        )
    if not causal:
        return Full() if window is None else SlidingWindow(window, window)
    if 1 < sq != skv:
        raise InputError(
            "attention_mask",
            f"None for causal attention of {sq} queries on {skv} keys: where the queries stand is not said",
        )
    return Causal() if window is None else Causal() & SlidingWindow(window - 1)


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.pop("output_attentions", None):
        raise InputError("output_attentions", "attnreg never forms attention weights; use attn_implementation='eager'")
    for name, value in kwargs.items():
        if name not in SILENT and value is not None and value is not False:
            raise UnexpectedTensorError(
                name,
                f"{type(module).__name__} passes it to attention and attnreg does not know what it means there; "
                "it is refused rather than dropped",
            )
