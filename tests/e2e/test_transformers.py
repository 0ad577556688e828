"""Law: a transformers model gives the same outputs and loss gradients on attnreg as on its own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import masking_utils as hf

from attnreg import AttentionSpec, errors
from attnreg.integrations import call
from attnreg.integrations.transformers import StructuredMask, attention_forward, attention_mask, register
from attnreg.masks import Causal, Dense, Full, Padding, SlidingWindow

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


def gemma4() -> nn.Module:
    """Its layers that share keys run on the last rows alone when it generates, and cut the mask to them."""
    config = transformers.Gemma4TextConfig(
        **TINY | {"num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=6,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
    )
    return transformers.Gemma4ForCausalLM(config)


def doge() -> nn.Module:
    """Makes an additive mask of its own from the mask that it is given."""
    return transformers.DogeForCausalLM(transformers.DogeConfig(**TINY, num_key_value_heads=2))


def longformer() -> nn.Module:
    config = transformers.LongformerConfig(**TINY | {"pad_token_id": 0}, attention_window=6)
    return transformers.LongformerModel._from_config(config, attn_implementation="attnreg")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama, "mistral": mistral, "gemma2": gemma2, "gpt_oss": gpt_oss, "bert": bert, "t5": t5,
    "gemma4": gemma4, "doge": doge,
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
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "t5", "gemma4", "doge"])
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
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q"),
        ({"something_new": 3}, "something_new"),
        ({"mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "mask"),
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


def test_a_window_of_zero_keys_sees_nothing_as_with_sdpa() -> None:
    """Qwen2-MoE's own defaults say sliding_window=0."""
    config = transformers.Qwen2MoeConfig(
        **TINY,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
    )
    assert config.sliding_window == 0
    torch.manual_seed(0)
    own = transformers.Qwen2MoeForCausalLM(config)
    ours = copy.deepcopy(own)
    own.set_attn_implementation("sdpa")
    ours.set_attn_implementation("attnreg")
    a, b = (model.eval()(tokens(2, 9)).logits for model in (own, ours))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    x, module = torch.randn(1, 2, 4, 8), nn.Module()
    with pytest.raises(errors.InputError, match="sliding_window: 0"):
        attention_forward(module, x, x, x, None, is_causal=True, sliding_window=0)


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[AttentionSpec]:
    """The specs of the calls that layers make."""
    seen: list[AttentionSpec] = []
    true = call.attention

    def watched(spec: AttentionSpec, *qkv: Any, **tensors: Any) -> Any:
        seen.append(spec)
        return true(spec, *qkv, **tensors)

    monkeypatch.setattr(call, "attention", watched)
    return seen


@pytest.mark.parametrize("said", [None, False, True])
def test_deterministic_becomes_part_of_the_spec(said: bool | None, specs: list[AttentionSpec]) -> None:
    x = torch.randn(1, 2, 4, 8)
    attention_forward(nn.Module(), x, x, x, None, is_causal=True, deterministic=said)
    assert [spec.deterministic for spec in specs] == [bool(said)]


BOOLS = torch.ones(3, 1, 4, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (torch.ones(3, 6, dtype=torch.bool), r"expected \[3 or 1.*got \[3, 6\]"),
        (torch.ones(4, 6, dtype=torch.bool), r"got \[4, 6\]"),
        (BOOLS.long(), r"expected bool.*or floats.*got torch.int64"),
        (BOOLS[:2], r"got \[2, 1, 4, 6\]"),
        (BOOLS[:, :, :3], r"got \[3, 1, 3, 6\]"),
        (BOOLS[..., :5], r"got \[3, 1, 4, 5\]"),
        (BOOLS.expand(-1, 3, -1, -1), r"got \[3, 3, 4, 6\]"),
        (object(), "expected a 4-D tensor"),
        (attention_mask(5, 4, 6, 2), "made for a batch of 5, the layer has 3"),
        (attention_mask(3, 6, 6), "made for 6 queries, the layer has 4"),
        (attention_mask(3, 1, 6, 5), "made for 1 queries, the layer has 4"),
        (attention_mask(3, 4, 7, 3), "made for 7 keys, the layer has 6"),
    ],
)
def test_a_mask_of_other_sizes_is_refused(mask: Any, named: str) -> None:
    q, k = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 6, 8)
    with pytest.raises(errors.InputError, match=f"attention_mask: .*{named}"):
        attention_forward(nn.Module(), q, k, k, mask)


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (3, 1, 1, 6), (3, 2, 4, 1), (3, 1, 4, 9)])
def test_a_mask_that_broadcasts_is_taken(shape: tuple[int, ...]) -> None:
    q, k = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 6, 8)
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    want = nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask[..., :6])
    got = attention_forward(nn.Module(), q, k, k, mask)[0].transpose(1, 2)
    torch.testing.assert_close(got, want)


STRUCTURED = {
    "causal": (4, 4, 0, 0, hf.causal_mask_function, None),
    "later": (2, 6, 4, 0, hf.causal_mask_function, None),
    "static": (2, 6, torch.tensor(3), 0, hf.causal_mask_function, None),
    "window": (4, 6, 6, 4, hf.sliding_window_causal_mask_function(3), None),
    "no window": (4, 4, 0, 0, hf.sliding_window_causal_mask_function(0), None),
    "both sides": (5, 5, 0, 0, hf.sliding_window_bidirectional_mask_function(2), None),
    "right": (4, 4, 0, 0, hf.causal_mask_function, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()),
    "left": (4, 4, 0, 0, hf.bidirectional_mask_function, torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_model_that_works_on_the_mask_finds_the_bools_that_it_stands_for(name: str) -> None:
    sq, skv, offset, kv_offset, function, real = STRUCTURED[name]
    made = attention_mask(2, sq, skv, offset, kv_offset, function, real)
    want = hf.sdpa_mask(2, sq, skv, offset, kv_offset, function, real, allow_is_causal_skip=False)
    assert want is not None
    other = torch.rand(2, 1, sq, skv) > 0.5
    scores = torch.randn(2, 1, sq, skv)
    assert (made.dtype, made.device, tuple(made.shape), made.ndim) == (want.dtype, want.device, tuple(want.shape), 4)
    for got, bools in (
        (made[:, :, -1:, :], want[:, :, -1:, :]),
        (made & ~other, want & ~other),
        (other & made, other & want),
        (made | other, want | other),
        (~made, ~want),
        (made.logical_not(), ~want),
        (made == 0, want == 0),
        (made != made[:], want != want),
        (torch.where(made, scores, -1.0), torch.where(want, scores, -1.0)),
        (scores.masked_fill(made, -1.0), scores.masked_fill(want, -1.0)),
        (torch.cat([made, other], -1), torch.cat([want, other], -1)),
    ):
        assert torch.equal(got, bools)


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda mask: mask + 1, "__add__"),
        (lambda mask: torch.zeros(4, 4) + mask, "add"),
        (lambda mask: 1.0 - mask, "__rsub__"),
        (lambda mask: mask * 2, "__mul__"),
        (lambda mask: mask < 0, "__lt__"),
        (lambda mask: torch.softmax(mask, -1), "softmax"),
        (lambda mask: mask.masked_fill(mask, 0), "masked_fill"),
        (lambda mask: mask.to(torch.float32), r"\.to"),
    ],
)
def test_what_bools_cannot_answer_as_it_is_meant_is_refused(use: Callable[[Any], Any], named: str) -> None:
    """A model that adds its mask to the scores expects zeros and minus infinities."""
    with pytest.raises(errors.InputError, match=f"attention_mask: the model uses .?{named}"):
        use(attention_mask(1, 4, 4))
    assert not hasattr(attention_mask(1, 4, 4), "block_size")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_compiled_model_is_one_graph_and_means_the_same(name: str, kind: str, specs: list[AttentionSpec]) -> None:
    own, ours = pair(name)
    ids, real = tokens(3, 13), padding(kind, 3, 13)
    labels = ids if real is None else ids.masked_fill(real == 0, -100)
    if real is not None:
        labels[:, 1:] = labels[:, 1:].masked_fill(real[:, :-1] == 0, -100)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    outs = [run(input_ids=ids, attention_mask=real, labels=labels, use_cache=False) for run in (own, compiled)]
    assert counter.frame_count == 1
    keep = torch.ones(3, 13, dtype=torch.bool) if real is None else real.bool()
    torch.testing.assert_close(outs[1].logits[keep], outs[0].logits[keep], rtol=1e-4, atol=1e-4)
    for out in outs:
        out.loss.backward()
    torch.testing.assert_close(gradients(ours), gradients(own), rtol=1e-3, atol=1e-4)
    if (name, kind) == ("llama", "left"):
        assert {spec.mask for spec in specs} == {Causal() & Dense()}, "what is known of a mask stays known in a graph"


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_decoding_from_a_static_cache_is_as_many_graphs_as_with_sdpa(name: str) -> None:
    own, ours = pair(name)
    sdpa = copy.deepcopy(own)
    sdpa.set_attn_implementation("sdpa")
    ids, real = tokens(2, 9), padding("left", 2, 9)
    said = {"attention_mask": real, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = own.eval().generate(ids, **said)
    graphs = []
    for model in (sdpa, ours):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()  # generate() copies the options, and a counting backend with them
        options = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
        options._compile_all_devices = True
        got = model.eval().generate(ids, cache_implementation="static", compile_config=options, **said)
        assert torch.equal(got, want)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[0] > 0


def test_a_compiled_layer_without_a_mask_takes_what_it_is_told(specs: list[AttentionSpec]) -> None:
    x, module = torch.randn(2, 2, 6, 8), nn.Module()
    for said, mask in (
        ({"is_causal": False}, Full()),
        ({"is_causal": True}, Causal()),
        ({"is_causal": True, "sliding_window": 3}, Causal() & SlidingWindow(2)),
        ({"is_causal": False, "sliding_window": 3}, SlidingWindow(3, 3)),
    ):
        torch._dynamo.reset()
        specs.clear()

        def layer(x: torch.Tensor, said: dict[str, Any] = said) -> torch.Tensor:
            return attention_forward(module, x, x, x, None, scaling=0.3, **said)[0]

        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, layer(x))
        assert {spec.mask for spec in specs} == {mask}


def test_a_model_that_counts_with_its_mask_gets_what_eager_attention_gets() -> None:
    """Longformer takes two dimensions off the mask and asks what is above and below 0, which a bool answers wrongly."""
    torch.manual_seed(0)
    ours = longformer().eval()
    own = transformers.LongformerModel._from_config(ours.config, attn_implementation="eager").eval()
    own.load_state_dict(ours.state_dict())
    ids, real = tokens(2, 18), padding("right", 2, 18)
    everywhere = torch.zeros_like(ids)
    everywhere[:, 0] = 1
    for said in ({}, {"global_attention_mask": everywhere}):
        a, b = (model(input_ids=ids, attention_mask=real, **said).last_hidden_state for model in (own, ours))
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
