"""transformers: attnreg as an attention implementation, through its AttentionInterface and mask interface.

    from attnreg.integrations.transformers import register
    register()
    model = AutoModel.from_pretrained(path, attn_implementation="attnreg")

What transformers passes (causal, sliding window, padding, packed sequences, softcap, sinks, position bias, scaling,
dropout, GQA) becomes an AttentionSpec; what is not known raises, so that nothing is dropped in silence.

`output_attentions=True`, as an argument, in a config or to generate(), gives each layer's weights. They cost what the
fast path saves: Sq x Skv values a head and layer, kept in the output, and a few such tensors in float32 while they are
made (and for backward); the output itself is computed as ever. They are the weights before dropout, and 0 in a row with
nothing to attend, where eager attention gives equal weights to what is masked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as hf

from attnreg.errors import InputError, UnexpectedTensorError
from attnreg.integrations.call import call
from attnreg.integrations.expected_mask import Expected, expected_mask
from attnreg.integrations.layer_mask import CAUSAL, DENSE, FULL, LayerMask
from attnreg.integrations.structured_mask import StructuredMask
from attnreg.integrations.weights import asked_for, weights
from attnreg.masks import Mask, Padding, SlidingWindow

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

# Models whose own attention scales its output by what the sink leaves, and gives its weights before that.
SINK_AFTERWARDS = frozenset({"granite_swa", "granitemoe_swa"})

CAUSAL_DENSE, FULL_DENSE = CAUSAL & DENSE, FULL & DENSE


def register(name: str = "attnreg") -> None:
    """Register attention and mask functions under `name`, for `attn_implementation=name`.

    `output_attentions=True` is served by plain torch beside the call: it takes time and memory in Sq x Skv a head for
    every layer, as eager attention does. Without it no weights are formed.
    """
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
    config: Any = None,
    **kwargs: Any,
) -> StructuredMask | Tensor:
    """transformers' mask interface: the mask function as a mask expression, or, where it is none, as exact bools.

    attention_mask: None, or 2-D bool [batch, keys seen], True for real tokens. See `transformers.masking_utils`. For
    a model that asks whether its mask is a Tensor, the tensor that eager attention gets.
    """
    if isinstance(attention_mask, StructuredMask):
        return attention_mask
    expected = expected_mask(config)
    dtype = torch.bool if expected is Expected.BOOLS else kwargs.get("dtype", torch.float32)
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    mask, tensors = _meaning(sizes, mask_function, attention_mask, use_vmap, kwargs)
    shape, device = (batch_size, 1, q_length, kv_length), torch.device(kwargs.get("device", "cpu"))
    made = StructuredMask(mask, tensors, q_offset - kv_offset, shape, device, dtype)
    return made.values() if expected is Expected.TENSOR else made


def _meaning(
    sizes: tuple[Any, ...], mask_function: Any, attention_mask: Any, use_vmap: bool, kwargs: dict[str, Any]
) -> tuple[Mask, dict[str, Tensor]]:
    """The mask expression and its tensors."""
    kv_length, kv_offset = sizes[2], sizes[4]
    expression = _expression(mask_function) if not use_vmap else None
    if expression is None:
        whole = kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": use_vmap}
        make: Any = hf.sdpa_mask  # annotated int there, but a static cache's offset is a tensor
        return DENSE, {"attn_mask": make(*sizes, mask_function, attention_mask, **whole)}
    padding = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return expression, {}
    real = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    lengths = _right_padded(real)
    if lengths is None:
        return _and_dense(expression), {"attn_mask": real[:, None, None, :]}
    if bool((lengths == kv_length).all()):
        return expression, {}
    return expression & Padding(), {"kv_lengths": lengths}


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
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, Hq, Sq, D], key and value [B, Hkv, Skv, D] to [B, Sq, Hq, Dv].

    attention_mask: what `attention_mask` made; a 4-D mask of the user's own, bool (True = may attend) or additive;
    or None, which means causal or full as `is_causal` or the module says. s_aux or sinks: logits that join the
    denominator, [Hq] or, for each query, [B or 1, Hq, Sq or 1, 1]. indices: the keys that a sparse layer chose,
    integers [B, Sq, any]. block_indices: MiniMax M3's. The second result is the weights [B, Hq, Sq, Skv] before
    dropout, where the model returns them to its user, else None. Raises InputError for anything that would change the
    result and is not known here, and for a mask of other sizes.
    """
    _refuse_unknown(module, kwargs)
    skv = key.shape[2]
    read = LayerMask(attention_mask, module, query, skv, is_causal, sliding_window)
    if indices is not None:
        read.only_keys(indices)
    if block_indices is not None:
        read.only_blocks(module, block_indices, kwargs.get("position_ids"))
    tensors = read.tensors
    if read.added is not None:
        position_bias = read.added if position_bias is None else position_bias + read.added
    if position_bias is not None:
        tensors["bias"] = position_bias.to(query.dtype)
    sink = _sink(s_aux, sinks, query)
    each_query = sink is not None and sink.ndim == 4
    if sink is not None and not each_query:
        tensors["sinks"] = sink
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    said = (read.align, scale, softcap or 0.0, dropout or 0.0, bool(deterministic), each_query)
    out = call(read.mask, read.window, said, query, key, value, tensors)
    if sink is not None and each_query:
        out, lse = out
        # The share of the softmax that the sink leaves: exp(lse) / (exp(lse) + exp(sink)).
        out = out * torch.sigmoid(lse - sink.squeeze(-1).to(lse.dtype)).unsqueeze(-1).to(out.dtype)
    shown = None
    if asked_for(module, output_attentions):
        counted = None if _kind(module) in SINK_AFTERWARDS else sink
        shown = weights(query, key, read.allowed(), tensors.get("bias"), counted, scale, softcap or 0.0)
    return out.transpose(1, 2).contiguous(), shown


def _kind(module: nn.Module) -> Any:
    return getattr(getattr(module, "config", None), "model_type", None)


def _sink(s_aux: Tensor | None, sinks: Tensor | None, query: Tensor) -> Tensor | None:
    if s_aux is not None and sinks is not None:
        raise InputError("sinks", "given beside s_aux, which is another name for the same")
    sink = s_aux if s_aux is not None else sinks
    if sink is None or sink.ndim == 1:
        return sink
    name = "s_aux" if s_aux is not None else "sinks"
    batch, heads, rows, _ = query.shape
    wanted = zip(sink.shape, (batch, heads, rows, 1), strict=False)
    if sink.ndim != 4 or sink.shape[1] != heads or any(have not in (size, 1) for have, size in wanted):
        raise InputError(name, f"expected [{heads}] or [{batch} or 1, {heads}, {rows} or 1, 1], got {list(sink.shape)}")
    return sink


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in SILENT and value is not None and value is not False:
            raise UnexpectedTensorError(
                name,
                f"{type(module).__name__} passes it to attention and attnreg does not know what it means there; "
                "it is refused rather than dropped",
            )
