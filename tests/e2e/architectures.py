"""Every architecture of the installed transformers, made tiny: a config with few small layers, weights and inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 2

# Sizes by the names that configs use; the first that matches, and never more than the config's own.
SIZES: tuple[tuple[str, int], ...] = (
    (
        r"(num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_(num_hidden_)?layers|depth|num_hidden_groups)",
        LAYERS,
    ),
    (r"(.*num_key_value_heads|n_head_kv|num_kv_heads|linear_num_key_heads)", 2),
    (r".*(attention_heads|num_heads|n_heads?|linear_num_value_heads)", 4),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_dim|embedding_size|emb_dim|word_embed_proj_dim)", 32),
    (r"((en|de)coder_hidden_size|attention_hidden_size|out_hidden_size|text_hidden_size|projection_dim|proj_dim)", 32),
    (r"(intermediate_size|(en|de)coder_ffn_dim|ffn_dim|d_ff|n_inner|hidden_dim|ffn_hidden_size)", 48),
    (r"(moe_|shared_expert_|dense_|expert_)+intermediate_size|dense_intermediate_size", 48),
    (r"(head_dim|d_kv|kv_channels|global_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|index_head_dim)", 8),
    (r"(mamba_d_head|linear_key_head_dim|linear_value_head_dim|d_head)", 8),
    (r"(kv_lora_rank|q_lora_rank|o_lora_rank)", 16),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|top_k_experts|moe_k)", 2),
    (r"(n_group|topk_group|first_k_dense_replace)", 1),
    (r"(vocab_size|text_vocab_size|vocab_size_per_layer_input|(en|de)coder_vocab_size)", 99),
    (r"(max_position_embeddings|n_positions|n_ctx|max_target_positions)", 128),
    (r"(sliding_window|attention_window_size|index_block_size|compress_rate_.*)", 6),
    (r"index_topk|index_kpool", 4),
    (r"(rotary_dim|attention_chunk_size|block_size)", 4),
    (r"max_source_positions", 50),
    (r"image_size", 32),
    (r"patch_size", 8),
)
OFF = re.compile(r".*(dropout|dropout_rate|drop_rate|layerdrop|_pdrop|dropout_prob|drop_path)(_rate)?")
UNSAID = {"head_dim": 8, "num_key_value_heads": 2, "vocab_size": 99}
LEFT_OUT = {
    "transformers_version", "model_type", "architectures", "_name_or_path", "dtype", "torch_dtype", "out_features",
    "out_indices", "_out_features", "_out_indices", "stage_names", "per_layer_config",
}  # fmt: skip


def shrink(said: dict[str, Any], without: str) -> dict[str, Any]:
    """The same config with small sizes, without the fields that match `without`."""
    layers = max((v for k, v in said.items() if re.fullmatch(SIZES[0][0], k) and isinstance(v, int)), default=0)
    small = {}
    for name, value in said.items():
        if name in LEFT_OUT or re.fullmatch(without, name):
            continue
        if isinstance(value, dict):
            kind = {"model_type": value["model_type"]} if "model_type" in value else {}
            value = shrink(value, without) | kind if name.endswith("config") else value
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            value = min(value, size) if size is not None else value
            if name.endswith("token_id") and value >= 90:
                value = 0 if name.startswith("pad") else 90 + len(name) % 9
        elif value is None:
            value = UNSAID.get(name)
        elif isinstance(value, float):
            value = 0.0 if OFF.fullmatch(name) else value
        elif name == "image_size" and isinstance(value, (list, tuple)):
            value = [32] * len(value)
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers:
            kinds = list(dict.fromkeys(map(str, value)))
            value = [next(v for v in value if str(v) == kind) for kind in (kinds * LAYERS)[:LAYERS]]
        small[name] = value
    if any(name in small for name in ("kv_lora_rank", "conv_kernel_size_k")):  # their heads are not grouped
        small |= {name: 4 for name in ("num_key_value_heads",) if isinstance(small.get(name), int)}
    return small


def config_of(kind: str) -> Any:
    """A small config of a model type; the error of the last attempt where none is valid."""
    cls = CONFIG_MAPPING[kind]
    error: Exception = RuntimeError(kind)
    for without in (
        "",
        ".*layer_types",
        "(num_key_value_heads|.*head_dim)",
        ".*(head_dim|layer_types|rope_parameters)",
    ):
        try:
            config = cls(**shrink(cls().to_dict(), without))
        except Exception as e:  # each config class validates in its own way
            error = e
            continue
        return config
    raise error


def classes() -> Iterator[tuple[str, str]]:
    """(model type, class name) of what has a head for text, then of every other type its base."""
    heads = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    seen: set[str] = set()
    for mapping in heads:
        for kind, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name in seen or not hasattr(transformers, name):
                    continue
                if mapping is auto.MODEL_MAPPING_NAMES and kind in seen:
                    continue
                seen |= {name, kind}
                yield kind, name


def build(kind: str, name: str, attention: str = "eager", most: float = 3e7, **said: Any) -> nn.Module:
    """The model with random weights, in float32 and eval mode. Raises ValueError for more than `most` parameters."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    kind = cls.config_class.model_type or kind
    config = config_of(kind)
    for field, value in said.items():
        setattr(config, field, value)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(config, attn_implementation="eager").parameters())
    if size > most:
        raise ValueError(f"{name}: {size} parameters are too many for a test")
    torch.manual_seed(0)
    model: nn.Module = cls._from_config(config_of(kind) if not said else config, attn_implementation=attention)
    for weight in model.float().parameters():
        if weight.dim() >= 2:  # default inits make attention nearly uniform, which would hide mistakes
            nn.init.normal_(weight, std=0.2)
        elif not weight.any():
            nn.init.normal_(weight, std=0.1)
    return model.eval()


def inputs(model: nn.Module, batch: int = 3, length: int = 13) -> Iterator[dict[str, Any]]:
    """Candidates: the first that the model takes is good."""
    torch.manual_seed(1)
    config: Any = model.config
    ids = torch.randint(3, 85, (batch, length))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoder = {"decoder_input_ids": torch.randint(3, 85, (batch, 7))} if config.is_encoder_decoder else {}
    if model.main_input_name == "input_ids":
        yield text | decoder
    if model.main_input_name == "pixel_values" or "vision_config" in config.sub_configs:
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", 32)
        height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
        pixels = {"pixel_values": torch.randn(batch, getattr(vision, "num_channels", 3), height, width)}
        yield pixels | decoder
        yield text | pixels
        yield pixels | {"input_ids": ids}
        video = getattr(vision, "num_frames", 4)
        yield {"pixel_values": torch.randn(batch, video, getattr(vision, "num_channels", 3), height, width)}
    bins = getattr(config, "num_mel_bins", getattr(config, "feature_size", 80))
    frames = 2 * getattr(config, "max_source_positions", 50)
    if model.main_input_name == "input_features":
        yield {"input_features": torch.randn(batch, bins, frames)} | decoder
        yield {"input_features": torch.randn(batch, 60, bins)} | decoder
        yield {"input_features": torch.randn(batch, 60, 160)} | decoder
    if model.main_input_name == "input_values":
        yield {"input_values": torch.randn(batch, 4000)} | decoder
        yield {"input_values": torch.randn(batch, 1, 4000)} | decoder
        yield {"input_values": torch.randn(batch, 100, 80)} | decoder
    if model.main_input_name == "past_values":
        yield {"past_values": torch.randn(batch, 32, 1)}
    yield text | {"bbox": torch.randint(0, 90, (batch, length, 4)).sort(-1).values} | decoder
    yield {"inputs_embeds": torch.randn(batch, length, 32)}


def taken(model: nn.Module, run: Callable[[dict[str, Any]], Any] | None = None) -> tuple[dict[str, Any], Any]:
    """The inputs that the model takes, and what it gives; the first candidate's error where it takes none."""
    error: Exception | None = None
    for candidate in inputs(model):
        try:
            return candidate, (run or (lambda said: model(**said)))(candidate)
        except Exception as e:  # a model says in its own way that these are not its inputs
            error = error or e
    raise error or RuntimeError("no inputs")


def tensors(out: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of all that an output holds but its cache."""
    if torch.is_tensor(out):
        yield name, out
    elif isinstance(out, dict):
        for key, part in out.items():
            if "past_key_values" not in key and "cache" not in key:
                yield from tensors(part, f"{name}.{key}")
    elif isinstance(out, (list, tuple)):
        for i, part in enumerate(out):
            yield from tensors(part, f"{name}.{i}")


def apart(own: Any, ours: Any) -> float:
    """The largest difference, next to the largest value of its tensor; inf for other names, shapes or NaNs."""
    a, b = dict(tensors(own)), dict(tensors(ours))
    if a.keys() != b.keys():
        return float("inf")
    worst = 0.0
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            return float("inf")
        if x.is_floating_point() and x.numel():
            finite = torch.isfinite(x)
            if not torch.equal(finite, torch.isfinite(y)):
                return float("inf")
            if finite.any():
                worst = max(worst, ((x - y)[finite].abs().max() / (1 + x[finite].abs().max())).item())
    return worst
