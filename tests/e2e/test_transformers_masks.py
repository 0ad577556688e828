"""Law: a mask answers a model as the tensor that it stands for, and a layer reads what the model made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from test_transformers import STRUCTURED
from torch import nn
from transformers import masking_utils as hf

from attnreg import errors
from attnreg.integrations.transformers import StructuredMask, attention_forward, attention_mask


class _FloatsConfig(transformers.LongformerConfig):
    """Of the module of a model without SDPA, which has only ever been given floats."""


_FloatsConfig.__module__ = transformers.LongformerConfig.__module__
assert not transformers.LongformerModel._supports_sdpa  # which also loads the module that says it


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_model_without_sdpa_finds_the_floats_of_eager_attention(name: str) -> None:
    sq, skv, offset, kv_offset, function, real = STRUCTURED[name]
    made = attention_mask(2, sq, skv, offset, kv_offset, function, real, config=_FloatsConfig(), dtype=torch.float16)
    assert isinstance(made, StructuredMask)
    want = hf.eager_mask(2, sq, skv, offset, kv_offset, function, real, dtype=torch.float16)
    scores = torch.randn(2, 3, sq, skv)
    assert (made.dtype, tuple(made.shape)) == (want.dtype, tuple(want.shape))
    for got, floats in (
        (scores + made, scores + want),
        (made + scores, want + scores),
        (1.0 - made, 1.0 - want),
        (made * 2, want * 2),
        (made < 0, want < 0),
        (made > 0, want > 0),
        (made == 0, want == 0),
        (made.float(), want.float()),
        (made[:, 0, 0, :], want[:, 0, 0, :]),
        (made.to(torch.float32), want.to(torch.float32)),
        (torch.softmax(made, -1), torch.softmax(want, -1)),
        (made.masked_fill(made < 0, 7.0), want.masked_fill(want < 0, 7.0)),
    ):
        assert torch.equal(got, floats)


@pytest.mark.parametrize("floats", [False, True])
def test_a_mask_that_the_model_writes_to_is_what_the_layers_read(floats: bool) -> None:
    made = attention_mask(
        2, 4, 4, mask_function=hf.bidirectional_mask_function, config=_FloatsConfig() if floats else None
    )
    assert isinstance(made, StructuredMask)
    if floats:
        made[:, :, :, 2:] = torch.finfo(torch.float32).min
    else:
        made.handed = torch.ones(2, 1, 4, 4, dtype=torch.bool)  # as one that the model's own code holds and writes to
        made.handed[:, :, :, 2:] = False
    q = torch.randn(2, 2, 4, 8)
    got = attention_forward(nn.Module(), q, q, q, made)[0].transpose(1, 2)
    want = nn.functional.scaled_dot_product_attention(q, q[:, :, :2], q[:, :, :2])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: torch.zeros(4, 4) + mask[:, :, :, :4],
        lambda mask: mask[:, 0] * 2,
        lambda mask: mask.expand(2, 1, 4, 4) < 0,
        lambda mask: mask[:, :, -1:].to(torch.float32),
        lambda mask: torch.unsqueeze(mask, 0) + 1,
    ],
)
def test_slices_and_views_of_bools_are_as_careful(use: Callable[[Any], Any]) -> None:
    with pytest.raises(errors.InputError, match="attention_mask: the model uses"):
        use(attention_mask(1, 4, 4))


def test_slices_and_views_are_masks_to_a_layer() -> None:
    made = attention_mask(2, 4, 4)
    q = torch.randn(2, 2, 2, 8)
    k = torch.randn(2, 2, 4, 8)
    got = attention_forward(nn.Module(), q, k, k, made[:, :, -2:, :].expand(2, 1, 2, 4))[0]
    allowed = torch.ones(2, 4, dtype=torch.bool).tril(2)
    torch.testing.assert_close(got.transpose(1, 2), nn.functional.scaled_dot_product_attention(q, k, k, allowed))


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (2, 4, 6, 1)])
def test_sinks_of_either_name_and_shape_join_the_denominator(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k = torch.randn(2, 2, 6, 8, requires_grad=True)
    sink = torch.randn(shape, requires_grad=True)
    out, _ = attention_forward(nn.Module(), q, k, k, attention_mask(2, 6, 6), **{name: sink})
    keys = k.repeat_interleave(2, 1)
    scores = (q @ keys.mT * 8**-0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    last = (sink.reshape(1, 4, 1, 1) if len(shape) == 1 else sink).expand(2, 4, 6, 1)
    want = torch.cat([scores, last], -1).softmax(-1)[..., :-1] @ keys
    torch.testing.assert_close(out.transpose(1, 2), want, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(want)
    ours = torch.autograd.grad((out.transpose(1, 2) * weight).sum(), (q, k, sink))
    theirs = torch.autograd.grad((want * weight).sum(), (q, k, sink))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"sinks": torch.ones(1, 3, 1, 1)}, r"sinks: expected \[4\] or"),
        ({"sinks": torch.ones(2, 4)}, r"sinks: expected \[4\] or"),
        ({"sinks": torch.ones(4), "s_aux": torch.ones(4)}, "sinks: given beside s_aux"),
        ({"indices": torch.zeros(2, 5, 3, dtype=torch.long)}, r"indices: expected the chosen keys.*\[2, 6, any\]"),
        ({"block_indices": torch.zeros(2, 1, 6, 3, dtype=torch.long)}, "block_indices: Module has no indexer"),
    ],
)
def test_sinks_and_chosen_keys_of_other_sizes_are_refused(extra: dict[str, Any], named: str) -> None:
    q = torch.randn(2, 4, 6, 8)
    with pytest.raises(errors.InputError, match=named):
        attention_forward(nn.Module(), q, q, q, attention_mask(2, 6, 6), **extra)


@pytest.mark.parametrize("kind", ["made", "none", "bools", "floats"])
def test_a_layer_that_chose_its_keys_reads_those_alone(kind: str) -> None:
    torch.manual_seed(3)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    chosen = torch.stack([torch.stack([torch.randperm(6)[:3] for _ in range(6)]) for _ in range(2)])
    chosen[0, 1, 2] = -1
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    masks = {
        "made": attention_mask(2, 6, 6),
        "none": None,
        "bools": causal[None, None],
        "floats": torch.zeros(1, 1, 6, 6).masked_fill(~causal, -torch.inf),
    }
    out, weights = attention_forward(
        nn.Module(), q, k, k, masks[kind], is_causal=True, indices=chosen.int(), output_attentions=True
    )
    picked = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    for b, i in ((b, i) for b in range(2) for i in range(6)):
        picked[b, 0, i, [int(j) for j in chosen[b, i] if j >= 0]] = True
    keys = k.repeat_interleave(2, 1)
    want = (q @ keys.mT * 8**-0.5).masked_fill(~(picked & causal), -torch.inf).softmax(-1).nan_to_num()
    assert weights is not None
    torch.testing.assert_close(weights, want)
    torch.testing.assert_close(out.transpose(1, 2), want @ keys)
