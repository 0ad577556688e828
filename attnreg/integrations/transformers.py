"""transformers: attnreg as an attention implementation, through its AttentionInterface and mask interface.

    from attnreg.integrations.transformers import register
    register()
    model = AutoModel.from_pretrained(path, attn_implementation="attnreg")

What transformers passes (causal, sliding window, padding, packed sequences, softcap, sinks, position bias, scaling,
dropout, GQA) becomes an AttentionSpec; what is not known raises, so that nothing is dropped in silence.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as hf

from attnreg.errors import InputError, UnexpectedTensorError
from attnreg.integrations.call import Window, call
from attnreg.integrations.structured_mask import StructuredMask, check_sizes, check_tensor
from attnreg.masks import Causal, Dense, Full, Mask, Padding, SlidingWindow

__all__ = ["StructuredMask", "attention_forward", "attention_mask", "register"]

# Arguments that say nothing about attention: positions are in the rotary embedding or in the mask already.
SILENT = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "past_key_values", "past_key_value", "output_hidden_states",
        "return_dict", "output_router_logits", "num_items_in_batch", "logits_to_keep", "layer_idx", "token_type_ids",
        "position_embeddings", "is_training", "inputs_embeds", "labels", "input_ids", "encoder_hidden_states",
        "block_sequence_ids", "cache_params",
    }
)  # fmt: skip

# Made once: Dynamo knows an object of the module's own, and can make none itself.
CAUSAL, FULL, DENSE = Causal(), Full(), Dense()
CAUSAL_DENSE, FULL_DENSE = CAUSAL & DENSE, FULL & DENSE


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
    device = torch.device(kwargs.get("device", "cpu"))
    offset = q_offset - kv_offset
    expression = _expression(mask_function) if not use_vmap else None
    if expression is None:
        whole = kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": use_vmap}
        make: Any = hf.sdpa_mask  # annotated int there, but a static cache's offset is a tensor
        dense = make(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **whole)
        return StructuredMask(DENSE, {"attn_mask": dense}, offset, shape, device)
    padding = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return StructuredMask(expression, {}, offset, shape, device)
    real = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    lengths = _right_padded(real)
    if lengths is None:
        return StructuredMask(_and_dense(expression), {"attn_mask": real[:, None, None, :]}, offset, shape, device)
    if bool((lengths == kv_length).all()):
        return StructuredMask(expression, {}, offset, shape, device)
    return StructuredMask(expression & Padding(), {"kv_lengths": lengths}, offset, shape, device)


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
        return CAUSAL
    if function is hf.bidirectional_mask_function:
        return FULL
    code = getattr(function, "__code__", None)
    if code is None or torch.compiler.is_dynamo_compiling():  # which shows no closures
        return None
    if function.__closure__ is None:
        return None
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if code is _WINDOW:  # kv > q - window, with no bound on the right; a window of 0 sees nothing, as Qwen2-MoE's
        return SlidingWindow(held["sliding_window"] - 1, _FAR) if held["sliding_window"] > 0 else None
    if code is _BOTH_SIDES:
        return SlidingWindow(held["sliding_window"], held["sliding_window"])
    if code is _AND:
        parts = [_expression(part) for part in held["mask_functions"]]
        known = [part for part in parts if part is not None]
        return functools.reduce(lambda a, b: a & b, known) if len(known) == len(parts) else None
    return None


_FAR = 2**61


def _and_dense(mask: Mask) -> Mask:
    if mask is CAUSAL or mask is FULL:
        return CAUSAL_DENSE if mask is CAUSAL else FULL_DENSE
    return mask & DENSE


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
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, Hq, Sq, D], key and value [B, Hkv, Skv, D] to [B, Sq, Hq, Dv].

    attention_mask: what `attention_mask` made; a 4-D mask of the user's own, bool (True = may attend) or additive;
    or None, which means causal or full as `is_causal` or the module says. Raises InputError for anything that
    would change the result and is not known here, attention weights among them, and for a mask of other sizes.
    """
    _refuse_unknown(module, kwargs)
    sq, skv = query.shape[2], key.shape[2]
    tensors: dict[str, Any] = {}
    window: Window = ()
    align = "bottom_right"
    if attention_mask is None:
        mask, window = _bare_mask(module, is_causal, sliding_window, sq, skv)
    elif isinstance(attention_mask, StructuredMask):
        check_sizes(attention_mask, query, skv)
        mask, align = attention_mask.mask, _align(attention_mask, sq, skv, tensors, query)
        tensors |= attention_mask.tensors
    else:
        check_tensor(attention_mask, query, skv)
        given = attention_mask[..., :skv]
        if given.dtype == torch.bool:
            mask, tensors["attn_mask"] = DENSE, given
        else:
            mask, position_bias = FULL, given if position_bias is None else position_bias + given
    if position_bias is not None:
        tensors["bias"] = position_bias.to(query.dtype)
    if s_aux is not None:
        tensors["sinks"] = s_aux
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    said = (align, scale, softcap or 0.0, dropout or 0.0, bool(deterministic))
    out = call(mask, window, said, query, key, value, tensors)
    return out.transpose(1, 2).contiguous(), None


def _align(made: StructuredMask, sq: int, skv: int, tensors: dict[str, Any], query: Tensor) -> str:
    """How the spec says the offset: bottom_right counts from kv_lengths, so a padded pass says top_left."""
    offset = made.query_offset
    if not isinstance(offset, Tensor):
        if "kv_lengths" not in made.tensors and offset == skv - sq:
            return "bottom_right"
        if offset == 0:
            return "top_left"
        tensors["query_offset"] = torch.full((query.shape[0],), offset, device=query.device)
    else:
        tensors["query_offset"] = offset.to(query.device).reshape(-1).expand(query.shape[0]).contiguous()
    return "offset"


def _bare_mask(module: nn.Module, is_causal: bool | None, window: int | None, sq: int, skv: int) -> tuple[Mask, Window]:
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
