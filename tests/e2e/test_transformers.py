"""Law: a transformers model gives the same outputs and loss gradients on attnreg as on its own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from attnreg import errors
from attnreg.integrations.transformers import StructuredMask, attention_forward, attention_mask, register
from attnreg.masks import Causal, Dense, Full, Padding

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_key_value_heads=2))


def mistral() -> nn.Module:
    config = transformers.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=5, head_dim=8)
    return transformers.MistralForCausalLM(config)


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        **TINY,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=11,
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **TINY, num_key_value_heads=2, head_dim=8, sliding_window=6, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssForCausalLM(config)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(weight)
    return model


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **NO_DROPOUT))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama, "mistral": mistral, "gemma2": gemma2, "gpt_oss": gpt_oss, "bert": bert, "t5": t5,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The same random weights twice: on the model's own eager attention, and on attnreg."""
    torch.manual_seed(0)
    own = MODELS[name]()
    for weight in own.parameters():  # default inits make attention nearly uniform, which would hide mistakes
        if weight.dim() >= 2:
            nn.init.normal_(weight, std=0.3)
    ours = copy.deepcopy(own)
    own.set_attn_implementation("eager")
    ours.set_attn_implementation("attnreg")
    return own, ours


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(kind: str, batch: int, length: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for b in range(1, batch):
        short = length - 3 * b
        if kind == "right":
            mask[b, short:] = 0
        elif kind == "left":
            mask[b, : length - short] = 0
        else:
            mask[b, 2:5] = 0
    return mask


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_the_models_own(name: str, kind: str) -> None:
    own, ours = pair(name)
    ids = tokens(3, 13)
    real = padding(kind, 3, 13)
    labels = ids if real is None else ids.masked_fill(real == 0, -100)
    if real is not None and name not in ("bert", "t5"):  # a padding row's own output, which nobody reads, predicts none
        labels[:, 1:] = labels[:, 1:].masked_fill(real[:, :-1] == 0, -100)
    outs = [model(input_ids=ids, attention_mask=real, labels=labels) for model in (own, ours)]
    keep = torch.ones(3, 13, dtype=torch.bool) if real is None or name == "t5" else real.bool()
    torch.testing.assert_close(outs[1].logits[keep], outs[0].logits[keep], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[1].loss, outs[0].loss, rtol=1e-5, atol=1e-5)
    for out in outs:
        out.loss.backward()
    for (weight, a), (_, b) in zip(own.named_parameters(), ours.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=lambda m, w=weight: f"{w}: {m}")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "t5"])
def test_generation_with_a_cache_gives_the_same_tokens(name: str, cache: str | None) -> None:
    own, ours = pair(name)
    ids, real = tokens(2, 9), padding("left", 2, 9)
    said = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    eager, attnreg = (
        model.eval().generate(ids, attention_mask=real, disable_compile=True, **said) for model in (own, ours)
    )
    assert torch.equal(eager, attnreg)


def test_packed_sequences_do_not_see_each_other() -> None:
    own, ours = pair("llama")
    ids = tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    a, b = (model(input_ids=ids, position_ids=positions, use_cache=False).logits for model in (own, ours))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    alone = ours(input_ids=ids[:, 5:8], use_cache=False).logits
    torch.testing.assert_close(b[:, 5:8], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_users_own_is_taken_as_it_is(additive: bool) -> None:
    own, ours = pair("llama")
    ids = tokens(2, 8)
    allowed = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.4
    allowed |= torch.eye(8, dtype=torch.bool)
    floats = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    want = own(input_ids=ids, attention_mask=floats).logits
    got = ours(input_ids=ids, attention_mask=floats if additive else allowed).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_masks_stay_structured_where_the_pattern_is_known() -> None:
    assert attention_mask(2, 5, 5).mask == Causal()
    assert attention_mask(2, 5, 5, mask_function=transformers.masking_utils.bidirectional_mask_function).mask == Full()
    right = attention_mask(2, 4, 4, attention_mask=torch.tensor([[True] * 4, [True, True, False, False]]))
    assert right.mask == Causal() & Padding()
    assert right.tensors["kv_lengths"].tolist() == [4, 2]
    left = attention_mask(1, 4, 4, attention_mask=torch.tensor([[False, True, True, True]]))
    assert left.mask == Causal() & Dense()
    assert isinstance(attention_mask(1, 4, 4, mask_function=lambda b, h, q, k: k == q).mask, Dense)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q"),
        ({"something_new": 3}, "something_new"),
    ],
)
def test_what_is_not_known_is_refused(extra: dict[str, Any], named: str) -> None:
    module = nn.Module()
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(errors.InputError, match=named):
        attention_forward(module, x, x, x, StructuredMask(Causal(), {}, 0, (1, 1, 4, 4)), **extra)


def test_no_mask_and_no_word_on_causality_is_refused() -> None:
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(errors.InputError, match="is_causal"):
        attention_forward(nn.Module(), x, x, x, None)
