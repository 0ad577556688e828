"""Law: output_attentions gives on attnreg what the model's own eager attention gives, however it is asked for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from architectures import apart, build, taken, tensors
from torch import nn

from attnreg.integrations import transformers as integration
from attnreg.integrations.transformers import attention_forward, attention_mask, register

TEXT = {
    "opt": "OPTForCausalLM", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "granite_swa": "GraniteSWAForCausalLM",
}  # fmt: skip
MODELS = TEXT | {
    "stablelm": "StableLmForCausalLM", "nemotron": "NemotronForCausalLM", "persimmon": "PersimmonForCausalLM",
    "mistral": "MistralForCausalLM", "inkling2_text": "Inkling2ForCausalLM", "deepseek_v4": "DeepseekV4ForCausalLM",
    "hy_v4": "HYV4ForCausalLM", "bert": "BertForMaskedLM", "vit": "ViTModel",
    "siglip_vision_model": "SiglipVisionModel",
    "clip": "CLIPModel", "t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration",
    "longt5": "LongT5ForConditionalGeneration", "whisper": "WhisperForConditionalGeneration",
    "bigbird_pegasus": "BigBirdPegasusForConditionalGeneration", "patchtst": "PatchTSTModel",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def pair(kind: str, **said: Any) -> tuple[nn.Module, nn.Module]:
    own, ours = (build(kind, MODELS[kind], attention, **said) for attention in ("eager", "attnreg"))
    ours.load_state_dict(own.state_dict())
    return own, ours


def weights_of(out: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in tensors(out) if "attentions" in name}


@pytest.mark.parametrize("kind", MODELS)
def test_the_argument_gives_the_models_own_weights(kind: str) -> None:
    own, ours = pair(kind)
    with torch.no_grad():
        said, want = taken(own, lambda said: own(**said, output_attentions=True))
        got, plain = ours(**said, output_attentions=True), ours(**said)
    assert weights_of(want)
    assert apart(want, got) < 1e-4
    assert not weights_of(plain), "nobody asked"
    shared = dict(tensors(plain))
    assert all(torch.equal(shared[name], x) for name, x in tensors(got) if name in shared), "the output stays attnreg's"


@pytest.mark.parametrize("kind", ["opt", "gpt2", "bert", "t5", "longt5", "vit", "patchtst"])
def test_the_config_says_it_as_well(kind: str) -> None:
    own, ours = pair(kind, output_attentions=True)
    with torch.no_grad():
        said, want = taken(own)
        got = ours(**said)
    assert weights_of(want)
    assert apart(want, got) < 1e-4


def test_a_sub_config_says_it_for_its_part() -> None:
    own, ours = pair("clip")
    for model in (own, ours):
        model.config.vision_config._output_attentions = True
    with torch.no_grad():
        said, want = taken(own)
        got = ours(**said)
    assert {name.split(".")[1] for name in weights_of(want)} == {"vision_model_output"}
    assert apart(want, got) < 1e-4


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt_oss", "t5", "longt5", "whisper"])
def test_generate_gives_them_step_by_step(kind: str) -> None:
    own, ours = pair(kind)
    with torch.no_grad():
        said, _ = taken(own)
    said.pop("decoder_input_ids", None)
    if own.config.is_encoder_decoder:
        said["decoder_start_token_id"] = 0
    said |= {"output_attentions": True, "return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
    want, got = (model.generate(**said, max_new_tokens=5, eos_token_id=None) for model in (own, ours))
    assert torch.equal(want.sequences, got.sequences)
    assert weights_of(want)
    assert apart(weights_of(want), weights_of(got)) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [*TEXT, "bert"])
def test_weights_of_a_padded_batch(kind: str, side: str) -> None:
    own, ours = pair(kind)
    with torch.no_grad():
        said, _ = taken(own)
        real = said["attention_mask"].bool().clone()
        real[1, slice(4) if side == "left" else slice(9, None)] = False
        said["attention_mask"] = real.long()
        want, got = (model(**said, output_attentions=True).attentions for model in (own, ours))
    for a, b in zip(want, got, strict=True):
        rows = real[:, None, :, None].expand(-1, a.shape[1], -1, 13)
        torch.testing.assert_close(b[rows], a[rows], rtol=1e-4, atol=1e-5)
        if side == "left" and kind != "bert":
            assert not b[1, :, :4].any(), "a row with nothing to attend has no weights, as its output is 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "gpt_oss", "gemma2", "bert", "t5", "vit"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    own, ours = (model.to(dtype) for model in pair(kind))
    for model in (own, ours):
        for weight in model.parameters():
            weight.data.mul_(0.3 if weight.dim() >= 2 else 1.0)
    with torch.no_grad():
        said, _ = taken(own, lambda said: own(**half(said, dtype)))
        want, got = (weights_of(model(**half(said, dtype), output_attentions=True)) for model in (own, ours))
    assert want.keys() == got.keys()
    for name, a in want.items():
        assert got[name].dtype == a.dtype
        torch.testing.assert_close(got[name], a, rtol=0.05, atol=0.01)


def half(said: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in said.items()}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_weights_are_differentiable_in_training(kind: str, checkpointing: bool | None) -> None:
    own, ours = pair(kind)
    with torch.no_grad():
        said, _ = taken(own)
    gradients = []
    for model in (own, ours):
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        out = model(**said, output_attentions=True, use_cache=False)
        loss = out.logits.square().mean()
        shown = weights_of(out)
        assert shown
        for weight in shown.values():
            if weight.requires_grad:  # reentrant checkpointing records under no_grad
                loss = loss + (weight * torch.linspace(0, 1, weight.shape[-1])).square().sum()
        loss.backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_weights_are_freed_with_the_output() -> None:
    _, ours = pair("llama")
    with torch.no_grad():
        said, _ = taken(ours)
    out = ours(**said, output_attentions=True)
    held = weakref.ref(out.attentions[0])
    gc.disable()
    try:
        del out
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "longt5"])
def test_a_compiled_model_is_one_graph_and_gives_them(kind: str) -> None:
    own, ours = pair(kind)
    with torch.no_grad():
        said, want = taken(own, lambda said: own(**said, output_attentions=True, use_cache=False))
        ours(**said, output_attentions=True)  # transformers installs its hooks outside of a graph alone
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        got = compiled(**said, output_attentions=True, use_cache=False)
        assert apart(want, got) < 1e-4
        assert not weights_of(compiled(**said, use_cache=False))


def test_compiled_layers_give_them() -> None:
    own, ours = pair("llama")
    with torch.no_grad():
        said, want = taken(own, lambda said: own(**said, output_attentions=True))
        torch._dynamo.reset()
        for layer in ours.model.layers:
            layer.compile(backend="aot_eager")
        ours(**said)
        assert apart(want, ours(**said, output_attentions=True)) < 1e-4


def test_no_weights_are_formed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    true = integration.weights
    monkeypatch.setattr(integration, "weights", lambda *args: formed.append(1) or true(*args))
    for kind in ("llama", "t5", "longt5", "patchtst"):
        _, ours = pair(kind)
        with torch.no_grad():
            said, _ = taken(ours)
            assert not formed, kind
            ours(**said, output_attentions=True)
            assert formed, kind
        formed.clear()


def test_a_layer_alone_gives_them_to_who_asks_and_else_none() -> None:
    q = torch.randn(2, 4, 5, 8)
    mask = attention_mask(2, 5, 5)
    assert attention_forward(nn.Module(), q, q, q, mask)[1] is None
    shown = attention_forward(nn.Module(), q, q, q, mask, output_attentions=True)[1]
    assert shown is not None
    want = (q @ q.mT * 8**-0.5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    torch.testing.assert_close(shown, want)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
    ("said", "keep"),
    [
        ({"is_causal": False}, lambda p, j: j >= 0),
        ({"is_causal": True}, lambda p, j: j <= p),
        ({"is_causal": True, "sliding_window": 3}, lambda p, j: (j <= p) & (j > p - 3)),
        ({"is_causal": False, "sliding_window": 2}, lambda p, j: (j - p).abs() <= 2),
    ],
)
def test_weights_times_values_are_the_output(said: dict[str, Any], keep: Any, softcap: float | None) -> None:
    torch.manual_seed(4)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    bias, sinks = torch.randn(2, 4, 7, 7), torch.randn(4)
    out, shown = attention_forward(
        nn.Module(), q, k, v, None, scaling=0.4, softcap=softcap, position_bias=bias, s_aux=sinks,
        output_attentions=True, **said,
    )  # fmt: skip
    assert shown is not None
    assert shown.shape == (2, 4, 7, 7)
    torch.testing.assert_close(out.transpose(1, 2), shown @ v.repeat_interleave(2, 1), rtol=1e-5, atol=1e-5)
    rows = torch.arange(7)
    allowed = keep(rows[:, None], rows[None, :]).expand(2, 4, 7, 7)
    assert not shown[~allowed].any()
    assert (shown[allowed] > 0).all()
