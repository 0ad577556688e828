"""transformers' attention functions and modules decide: Llama, Gemma 2, T5, Bloom, gpt-oss, BigBird, Longformer."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from everyone import agree, qkv
from torch import Tensor

from attnreg import AttentionSpec, masks, scores, sparsity

S, M = AttentionSpec, masks
MODELS = "transformers.models"


def model(name: str) -> Any:
    """A modeling module of transformers."""
    return pytest.importorskip(f"{MODELS}.{name}.modeling_{name}")


def additive(allowed: Tensor) -> Tensor:
    """A mask as transformers' eager functions take it: 0 or the lowest number."""
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float32).min)


def causal(sq: int, skv: int) -> Tensor:
    return torch.ones(sq, skv, dtype=torch.bool).tril(skv - sq)


def module(**fields: Any) -> Any:
    return SimpleNamespace(training=False, **fields)


def test_llama_grouped_causal() -> None:
    llama = model("llama")
    q, k, v = qkv(31, q_heads=6, kv_heads=2, sq=9, skv=21)
    out, _ = llama.eager_attention_forward(
        module(num_key_value_groups=3), q, k, v, additive(causal(9, 21))[None, None], scaling=16**-0.5
    )
    # It takes the softmax in float32 whatever the dtype.
    agree(out.transpose(1, 2), S(mask=M.Causal()), q, k, v, tol=1e-6)


def test_llama_left_padding() -> None:
    llama = model("llama")
    q, k, v = qkv(32, q_heads=4, kv_heads=4, sq=12, skv=12)
    padded = torch.tensor([0, 5])
    keep = (torch.arange(12) >= padded[:, None])[:, None, None] & causal(12, 12)
    out, _ = llama.eager_attention_forward(module(num_key_value_groups=1), q, k, v, additive(keep), scaling=16**-0.5)
    live = keep.any(-1).expand(-1, 4, -1)[..., None]  # transformers averages where nothing is allowed; we give 0
    agree(out.transpose(1, 2) * live, S(mask=M.Causal() & M.Dense()), q, k, v, tol=1e-6,
          attn_mask=(torch.arange(12) >= padded[:, None])[:, None, None])  # fmt: skip


def test_gemma2_softcap_and_window() -> None:
    gemma = model("gemma2")
    q, k, v = qkv(33, q_heads=4, kv_heads=2, sq=17, skv=17)
    q = 4 * q
    rows = torch.arange(17)
    keep = causal(17, 17) & (rows[:, None] - rows < 6)  # sliding_window=6 keeps the query and five before it
    out, _ = gemma.eager_attention_forward(
        module(num_key_value_groups=2, head_dim=16), q, k, v, additive(keep)[None, None], scaling=0.2, softcap=7.0
    )
    spec = S(score=scores.ScaledDot(0.2), softcap=7.0, mask=M.Causal() & M.SlidingWindow(5))
    agree(out.transpose(1, 2), spec, q, k, v, tol=1e-6)


def test_gemma2_builds_the_window_that_we_mean() -> None:
    """Off by one is what peers disagree on: transformers' own mask of sliding_window=W is SlidingWindow(W - 1)."""
    transformers = pytest.importorskip("transformers")
    from transformers.masking_utils import sliding_window_causal_mask_function

    assert transformers
    window = sliding_window_causal_mask_function(6)
    i, j = torch.arange(17)[:, None], torch.arange(17)[None, :]
    q, k, v = qkv(34, sq=17, skv=17)
    logits = (q @ k.mT / 4).masked_fill(~window(0, 0, i, j), -torch.inf)
    agree(logits.softmax(-1) @ v, S(mask=M.Causal() & M.SlidingWindow(5)), q, k, v)


def test_t5_relative_bias_without_scale() -> None:
    t5, config = model("t5"), pytest.importorskip("transformers").T5Config
    torch.manual_seed(35)
    small = config(d_model=24, d_kv=6, num_heads=4, dropout_rate=0.0, num_layers=1, vocab_size=8, d_ff=8)
    small._attn_implementation = "eager"
    layer = t5.T5Attention(small, has_relative_attention_bias=True, layer_idx=0).double().eval()
    hidden = torch.randn(2, 15, 24, dtype=torch.float64)
    wanted = layer(hidden)[0]
    q, k, v = (project(hidden).view(2, 15, 4, 6).transpose(1, 2).detach() for project in (layer.q, layer.k, layer.v))
    bias = layer.compute_bias(15, 15).detach()
    out = through(wanted, layer.o)
    agree(out.view(2, 15, 4, 6).transpose(1, 2), S(score=scores.Dot(), bias=True), q, k, v, tol=1e-6, bias=bias)


def through(wanted: Tensor, projection: torch.nn.Linear) -> Tensor:
    """What went into an output projection, whose square weight is undone."""
    shift = projection.bias.double() if projection.bias is not None else 0
    return torch.linalg.solve(projection.weight.double(), (wanted.detach().double() - shift).mT).mT


def test_bloom_alibi() -> None:
    """Bloom adds slope * key position; less the query's own, which softmax does not see, that is -slope * distance."""
    bloom, config = model("bloom"), pytest.importorskip("transformers").BloomConfig
    torch.manual_seed(36)
    small = config(hidden_size=24, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, vocab_size=8, n_layer=1)
    layer = bloom.BloomAttention(small, layer_idx=0).double().eval()
    hidden = torch.randn(2, 13, 24, dtype=torch.float64)
    alibi = bloom.build_alibi_tensor(torch.ones(2, 13), 4, torch.float64)
    mask = additive(causal(13, 13))[None, None]
    wanted = layer(hidden, torch.zeros_like(hidden), alibi, mask)[0]
    q, k, v = (x.detach() for x in layer._reshape(layer.query_key_value(hidden)))
    slopes = alibi.view(2, 4, 13)[0, :, 1]
    out = through(wanted, layer.dense).view(2, 13, 4, 6).transpose(1, 2)
    agree(out, S(mask=M.Causal(), alibi=True), q, k, v, tol=1e-6, alibi_slopes=slopes)


@pytest.mark.parametrize("window", [None, 4])
def test_gpt_oss_sinks(window: int | None) -> None:
    oss = model("gpt_oss")
    q, k, v = qkv(37, q_heads=4, kv_heads=2, sq=8, skv=14)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)
    i, j = torch.arange(8)[:, None] + 6, torch.arange(14)
    keep = (j <= i) & (i - j < (window or 99))
    out, _ = oss.eager_attention_forward(
        module(num_key_value_groups=2, sinks=sinks), q, k, v, additive(keep)[None, None], scaling=0.25
    )
    mask = M.Causal() if window is None else M.Causal() & M.SlidingWindow(window - 1)
    agree(out.transpose(1, 2), S(mask=mask, sinks=True), q, k, v, sinks=sinks)


def bigbird(
    blocks: int, random_blocks: int, *, masked: bool = False, heads: int = 2, block: int = 8
) -> tuple[Any, Tensor, Tensor, list[Any]]:
    """(module, its output as [B, heads, S, D], hidden states, random block columns a head) of BigBird in training.

    masked: its own mask for the random blocks forbids all of them.
    """
    bird, config = model("big_bird"), pytest.importorskip("transformers").BigBirdConfig
    torch.manual_seed(38)
    small = config(
        hidden_size=heads * 8, num_attention_heads=heads, block_size=block, num_random_blocks=random_blocks,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, max_position_embeddings=1024, use_bias=True,
        vocab_size=8, num_hidden_layers=1, intermediate_size=8,
    )  # fmt: skip
    layer = bird.BigBirdBlockSparseAttention(small, seed=5).double().train()
    drawn: list[Any] = []
    own = layer._bigbird_block_rand_mask_with_head

    def watched(**options: Any) -> Any:
        plan = own(**options)
        drawn.extend(np.array(head) for head in plan)
        return plan

    layer._bigbird_block_rand_mask_with_head = watched
    if masked:
        create = layer._create_rand_mask_from_inputs
        layer._create_rand_mask_from_inputs = lambda *arguments: torch.zeros_like(create(*arguments))
    size = blocks * block
    hidden = torch.randn(2, size, heads * 8, dtype=torch.float64)
    ones = torch.ones(2, size, dtype=torch.float64)
    blocked, band, from_mask, to_mask = bird.BigBirdModel.create_masks_for_block_sparse_attn(ones, block)
    out = layer(hidden, band, from_mask, to_mask, blocked, blocked)[0]
    return layer, out.view(2, size, heads, 8).transpose(1, 2), hidden, drawn


def projections(layer: Any, hidden: Tensor, heads: int) -> list[Tensor]:
    shape = (*hidden.shape[:2], heads, -1)
    return [p(hidden).view(shape).transpose(1, 2).detach() for p in (layer.query, layer.key, layer.value)]


def test_bigbird_without_random_blocks_is_our_pattern() -> None:
    layer, wanted, hidden, _ = bigbird(9, 1, masked=True)
    q, k, v = projections(layer, hidden, 2)
    agree(wanted, S(sparsity=sparsity.BigBird(8, random_blocks=0)), q, k, v, tol=1e-6)


@pytest.mark.parametrize(("blocks", "count"), [(10, 1), (13, 2), (12, 3)])
def test_bigbird_with_its_own_random_blocks(blocks: int, count: int) -> None:
    """The plan that BigBird drew, given as a block mask next to the window and global blocks of our pattern."""
    layer, wanted, hidden, drawn = bigbird(blocks, count)
    r, c = torch.arange(blocks)[:, None], torch.arange(blocks)
    outer = (r == 0) | (r == blocks - 1) | (c == 0) | (c == blocks - 1)
    live = ((r - c).abs() <= 1) | outer
    plan = live.expand(2, -1, -1).clone()
    for h, rows in enumerate(drawn):
        for row, columns in enumerate(rows):
            assert not plan[h, row + 1, columns].any(), "a random block inside window or globals would count twice"
            plan[h, row + 1, columns] = True
    assert (plan.sum(-1)[:, 1:-1] - live.sum(-1)[1:-1] == count).all()
    q, k, v = projections(layer, hidden, 2)
    agree(wanted, S(sparsity=sparsity.Blocks(8, 8)), q, k, v, tol=1e-6, block_mask=plan[None])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_our_random_blocks_obey_bigbirds_rules(count: int) -> None:
    """Distinct, outside the window, the first and the last block, as many as there is room for."""
    pattern, columns = sparsity.BigBird(16, random_blocks=count, seed=4), 14
    drawn = pattern.random_columns(5, columns)
    for rows in drawn:
        for row in range(1, columns - 1):
            picked = [int(x) for x in rows[row] if x >= 0]
            assert len(set(picked)) == len(picked) == count
            assert all(abs(x - row) > 1 and 0 < x < columns - 1 for x in picked)
    assert len({rows.tobytes() for rows in drawn}) > 1, "heads draw their own"


@pytest.mark.parametrize("tokens", [(), (0,), (0, 7, 30)])
def test_longformer_module(tokens: tuple[int, ...]) -> None:
    """transformers projects global tokens by weights of their own; those are made equal here."""
    former, config = model("longformer"), pytest.importorskip("transformers").LongformerConfig
    torch.manual_seed(39)
    small = config(
        hidden_size=16, num_attention_heads=2, attention_window=[8], attention_probs_dropout_prob=0.0,
        num_hidden_layers=1, intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    layer = former.LongformerSelfAttention(small, 0).double().eval()
    for name in ("query", "key", "value"):
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    hidden = torch.randn(2, 40, 16, dtype=torch.float64)
    flags = torch.zeros(2, 40, dtype=torch.float64)
    flags[:, list(tokens)] = 10000.0
    wanted = layer(hidden, flags, flags < 0, flags > 0, bool(tokens))[0]
    q, k, v = projections(layer, hidden, 2)
    out = wanted.view(2, 40, 2, 8).transpose(1, 2)
    agree(out, S(mask=M.longformer(8, tokens)), q, k, v, tol=1e-6)
    agree(out, S(mask=M.longformer(8)), q, k, v, tol=1e-6, global_mask=flags > 0)


def with_a_function_of_its_own(*names: str) -> list[str]:
    """Those whose modelling code has the function, which not all have in older releases of transformers."""
    found = []
    for name in names:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            found += [name] if hasattr(module, "eager_attention_forward") else []
    return found


WITH_WEIGHTS = with_a_function_of_its_own("llama", "opt", "bert", "gemma2", "t5", "gpt_oss", "granite_swa", "inkling2")


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_the_adapters_weights_and_output_are_those_of_the_models_own_function(name: str) -> None:
    from attnreg.integrations.transformers import attention_forward, attention_mask

    torch.manual_seed(40)
    q, k, v = qkv(40, q_heads=4, kv_heads=4, sq=7, skv=11)
    sinks = torch.randn(4, dtype=torch.float64)
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.head_dim, layer.sinks = 1, 16, sinks
    layer.config = SimpleNamespace(model_type=name)
    layer.eval()
    extra: dict[str, Any] = {"scaling": 0.3}
    if name == "gemma2":
        extra["softcap"] = 1.5
    if name in ("t5", "inkling2"):
        extra["position_bias"] = torch.randn(1, 4, 7, 11, dtype=torch.float64)
    if name == "inkling2":
        extra["sinks"] = torch.randn(2, 4, 7, 1, dtype=torch.float64)
    wanted, shown = model(name).eager_attention_forward(layer, q, k, v, additive(causal(7, 11))[None, None], **extra)
    if name in ("gpt_oss", "granite_swa"):
        extra["s_aux"] = sinks
    out, weights = attention_forward(layer, q, k, v, attention_mask(2, 7, 11, 4), output_attentions=True, **extra)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)  # some take their softmax in float32
    torch.testing.assert_close(weights, shown, rtol=1e-5, atol=1e-6)
