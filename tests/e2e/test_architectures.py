"""Law: every architecture of the installed transformers means on attnreg what it means on its own eager attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import apart, build, classes, taken, tensors
from torch import nn

from attnreg.integrations.transformers import register

# One of each way to use a mask, a sink, a bias, a cache or a recording; all of them are in the slow test.
FAST = {
    "bigbird_pegasus": "BigBirdPegasusForConditionalGeneration", "git": "GitForCausalLM",
    "led": "LEDForConditionalGeneration",
    "deepseek_v4": "DeepseekV4ForCausalLM", "deepseek_v32": "DeepseekV32ForCausalLM", "hy_v4": "HYV4ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM", "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "inkling2_text": "Inkling2ForCausalLM", "granite_swa": "GraniteSWAForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "longformer": "LongformerForMaskedLM", "doge": "DogeForCausalLM", "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM", "falcon": "FalconForCausalLM", "bloom": "BloomForCausalLM",
    "phi3": "Phi3ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mbart": "MBartForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration", "modernbert": "ModernBertForMaskedLM", "deberta-v2": "DebertaV2ForMaskedLM",
    "electra": "ElectraForMaskedLM", "clip": "CLIPModel", "blip": "BlipForConditionalGeneration",
    "dinov2": "Dinov2Model",
}  # fmt: skip
GENERATE = [
    "bigbird_pegasus", "deepseek_v4", "deepseek_v32", "hy_v4", "glm_moe_dsa", "minimax_m3_vl", "granite_swa",
    "git", "gemma3_text",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def like(own: nn.Module, kind: str, name: str) -> nn.Module:
    """The same model on attnreg."""
    try:
        ours = build(kind, name, "attnreg")
    except KeyError:  # a table of classes by name of implementation, which takes ours once it is built
        ours = copy.deepcopy(own)
        ours.set_attn_implementation("attnreg")
    ours.load_state_dict(own.state_dict())
    return ours


def run(model: nn.Module, said: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(5)
    return model(**said, **more)


def read(out: Any, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of an output for padded tokens what a user reads: the rows of real tokens; of an encoder-decoder, all logits."""
    found = {}
    for name in ("logits", "last_hidden_state"):
        x = out.get(name)
        if x is not None and x.ndim == 3:
            found[name] = x[real] if x.shape[:2] == real.shape else x
    return found


class UnfitError(Exception):
    """The model on its own, without attnreg, is not built, does not run or gives random outputs."""


def differs(kind: str, name: str) -> str:
    """What differs from the reference; empty where nothing does. Raises UnfitError where there is no reference."""
    try:
        own = build(kind, name)
        with torch.no_grad():
            said, want = taken(own, lambda said: run(own, said))
    except Exception as e:
        raise UnfitError(name) from e
    ours = like(own, kind, name)
    with torch.no_grad():
        if any(x.is_floating_point() and x.isnan().any() for _, x in tensors(want)):
            own = build(kind, name, "sdpa")  # eager attention of this model is broken
            own.load_state_dict(ours.state_dict())
            want = run(own, said)
        if apart(want, run(own, said)) > 1e-6:
            raise UnfitError(name)
        if apart(want, run(ours, said)) > 2e-4:
            return "outputs"
        gives = own.config._attn_implementation == "eager" and takes(own, said)
        shown = run(own, said, output_attentions=True) if gives else None
        if shown is not None and apart(shown, run(ours, said, output_attentions=True)) > 2e-4:
            return "attentions"
    if "attention_mask" not in said:
        return ""
    real = said["attention_mask"].bool().clone()
    real[1, 9:] = False
    real[2, :4] = False
    said = said | {"attention_mask": real.long()}
    losses = []
    for model in (own, ours):
        out = read(run(model, said), real)
        losses.append(sum(x.float().square().mean() for x in out.values()))
    if isinstance(losses[0], int):
        return ""
    gradients = [
        torch.autograd.grad(loss, [weight for weight in m.parameters() if weight.requires_grad], allow_unused=True)
        for loss, m in zip(losses, (own, ours), strict=True)
    ]
    if not torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-5):
        return "padded batch"
    for a, b in zip(*gradients, strict=True):
        if (a is None) != (b is None):
            return "gradients"
        if a is not None and b is not None and (a - b).abs().max() > 2e-3 * a.abs().max() + 2e-4:
            return "gradients"
    return ""


def takes(model: nn.Module, said: dict[str, Any]) -> bool:
    try:
        run(model, said, output_attentions=True)
    except Exception:  # the model on its own cannot
        return False
    return True


@pytest.mark.parametrize("kind", FAST)
def test_it_means_the_same(kind: str) -> None:
    assert differs(kind, FAST[kind]) == ""


@pytest.mark.parametrize("kind", GENERATE)
def test_it_generates_the_same(kind: str) -> None:
    own = build(kind, FAST[kind])
    ours = like(own, kind, FAST[kind])
    with torch.no_grad():
        said, _ = taken(own)
    real = said["attention_mask"].clone()
    real[1, :4] = 0
    said = {name: x for name, x in said.items() if name != "decoder_input_ids"} | {"attention_mask": real}
    if own.config.is_encoder_decoder:
        said["decoder_start_token_id"] = 0
    said |= {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(own.generate(**said), ours.generate(**said))


PARTS = 16


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_architecture_that_can_be_built_means_the_same(part: int) -> None:
    """Some minutes in all. What fails on eager attention as well, with these configs and inputs, is not counted."""
    same, wrong = [], {}
    for kind, name in list(classes())[part::PARTS]:
        try:
            found = differs(kind, name)
        except UnfitError:
            continue
        except Exception as e:  # told below, with the others
            found = repr(e)
        if found:
            wrong[name] = found
        else:
            same.append(name)
    assert wrong == {}
    assert len(same) >= 15
