"""Keras' AdditiveAttention (Bahdanau) and Attention (Luong dot and concat) decide what additive and dot scores mean."""

from __future__ import annotations

import os

import pytest
import torch
from everyone import agree
from torch import Tensor

from attnreg import AttentionSpec, masks, scores

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

S, M = AttentionSpec, masks


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numpy(x: Tensor) -> object:
    return x.detach().numpy()


def plain(x: object) -> Tensor:
    return torch.as_tensor(keras.ops.convert_to_numpy(x)).double()


@pytest.fixture(autouse=True)
def float64() -> object:
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_additive_attention(causal: bool, padded: bool) -> None:
    q, k, v = draw(1, 2, 9, 12), draw(2, 2, 9, 12), draw(3, 2, 9, 7)
    layer = keras.layers.AdditiveAttention(use_scale=True, dtype="float64")
    layer.build([q.shape, v.shape, k.shape])
    weight = draw(4, 12)
    layer.scale.assign(numpy(weight))
    keep = torch.arange(9) < torch.tensor([9, 6])[:, None]
    options = {"mask": [None, numpy(keep)]} if padded else {}
    wanted = plain(layer([numpy(q), numpy(v), numpy(k)], use_causal_mask=causal, **options))
    mask = M.Causal() if causal else M.Full()
    tensors = {"score_weight": weight[None]}
    if padded:
        mask = mask & M.Padding()
        tensors["kv_lengths"] = torch.tensor([9, 6], dtype=torch.int32)
    # Keras counts rows from the left, padding or not.
    spec = S(score=scores.Additive(), mask=mask, align="top_left")
    agree(wanted[:, None], spec, q[:, None], k[:, None], v[:, None], tol=1e-6, **tensors)


def test_additive_attention_without_scale_is_a_weight_of_ones() -> None:
    q, k, v = draw(5, 2, 4, 6), draw(6, 2, 8, 6), draw(7, 2, 8, 6)
    wanted = plain(keras.layers.AdditiveAttention(use_scale=False, dtype="float64")([numpy(q), numpy(v), numpy(k)]))
    weight = torch.ones(1, 6, dtype=torch.float64)
    agree(
        wanted[:, None], S(score=scores.Additive()), q[:, None], k[:, None], v[:, None], tol=1e-6, score_weight=weight
    )


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("causal", [False, True])
def test_dot_attention(scale: float | None, causal: bool) -> None:
    q, k, v = draw(8, 2, 9, 12), draw(9, 2, 9, 12), draw(10, 2, 9, 12)
    layer = keras.layers.Attention(use_scale=scale is not None, score_mode="dot", dtype="float64")
    layer.build([q.shape, v.shape, k.shape])
    if scale is not None:
        layer.scale.assign(scale)
    wanted = plain(layer([numpy(q), numpy(v), numpy(k)], use_causal_mask=causal))
    score = scores.Dot() if scale is None else scores.ScaledDot(scale)
    mask = M.Causal() if causal else M.Full()
    agree(wanted[:, None], S(score=score, mask=mask), q[:, None], k[:, None], v[:, None], tol=1e-6)


def test_concat_attention_is_additive_with_one_weight() -> None:
    """Luong's concat as Keras has it: weight * sum(tanh(scale * (q + k)))."""
    q, k, v = draw(11, 2, 5, 6), draw(12, 2, 9, 6), draw(13, 2, 9, 6)
    layer = keras.layers.Attention(use_scale=True, score_mode="concat", dtype="float64")
    layer.build([q.shape, v.shape, k.shape])
    layer.scale.assign(0.6)
    layer.concat_score_weight.assign(1.7)
    wanted = plain(layer([numpy(q), numpy(v), numpy(k)]))
    weight = torch.full((1, 6), 1.7, dtype=torch.float64)
    pair = 0.6 * q[:, None], 0.6 * k[:, None]
    agree(wanted[:, None], S(score=scores.Additive()), *pair, v[:, None], tol=1e-6, score_weight=weight)


def test_grouped_query_attention_layer() -> None:
    layer = keras.layers.GroupQueryAttention(8, 4, 2, dtype="float64")
    x = draw(14, 2, 11, 32)
    wanted = plain(layer(numpy(x), numpy(x), use_causal_mask=True))

    def project(dense: object) -> Tensor:
        return plain(dense(numpy(x))).transpose(1, 2)  # type: ignore[operator]  # a Keras layer

    q, k, v = (project(getattr(layer, f"_{name}_dense")) for name in ("query", "key", "value"))
    kernel, bias = (plain(w) for w in layer._output_dense.weights)
    flat = torch.linalg.lstsq(kernel.reshape(32, 32).mT, (wanted - bias).reshape(-1, 32).mT).solution.mT
    out = flat.reshape(2, 11, 4, 8).transpose(1, 2)
    agree(out, S(mask=M.Causal()), q, k, v, tol=1e-6)
