"""jax.nn.dot_product_attention decides: outputs, its residual (lse) and its gradients, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from everyone import agree, near, qkv
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, masks, scores
from attnreg.testing import oracle

jax = pytest.importorskip("jax")
jnp = jax.numpy

S, M = AttentionSpec, masks
JAX = 1e-5
"""jax takes the softmax in float32 whatever the dtype."""


@pytest.fixture(autouse=True)
def float64() -> Any:
    jax.config.update("jax_enable_x64", True)  # any jax has this one
    yield
    jax.config.update("jax_enable_x64", False)


def turn(x: Tensor) -> Any:
    """[B, H, S, D] as jax has it, [B, S, H, D]."""
    return jnp.asarray(x.detach().transpose(1, 2).numpy())


def back(x: Any) -> Tensor:
    return torch.from_numpy(np.asarray(x).copy())


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = jax.nn.dot_product_attention(turn(q), turn(k), turn(v), return_residual=True, **options)
    return back(out).transpose(1, 2), back(lse).transpose(1, 2)


LENGTHS = torch.tensor([17, 9], dtype=torch.int32)
BIAS = torch.randn(1, 4, 17, 17, generator=torch.Generator().manual_seed(41), dtype=torch.float64)
KEEP = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(42)) < 0.6
KEEP[..., 0] = True

CASES: dict[str, tuple[AttentionSpec, dict[str, Any], dict[str, Tensor]]] = {
    "full": (S(return_lse=True), {}, {}),
    "causal": (S(mask=M.Causal(), return_lse=True), {"is_causal": True}, {}),
    "scale": (S(score=scores.ScaledDot(0.9), return_lse=True), {"scale": 0.9}, {}),
    "window": (S(mask=M.SlidingWindow(4, 2), return_lse=True), {"local_window_size": (4, 2)}, {}),
    "window causal": (
        S(mask=M.SlidingWindow(5, 5) & M.Causal(), return_lse=True),
        {"local_window_size": 5, "is_causal": True},
        {},
    ),
    "padding": (
        S(mask=M.Padding(), return_lse=True),
        {"key_value_seq_lengths": jnp.asarray(LENGTHS.numpy())},
        {"kv_lengths": LENGTHS},
    ),
    "padding causal": (
        S(mask=M.Padding() & M.Causal(), align="top_left", return_lse=True),
        {"key_value_seq_lengths": jnp.asarray(LENGTHS.numpy()), "is_causal": True},
        {"kv_lengths": LENGTHS},
    ),
    "dense": (S(mask=M.Dense(), return_lse=True), {"mask": KEEP.numpy()}, {"attn_mask": KEEP}),
    "bias": (S(bias=True, return_lse=True), {"bias": BIAS.numpy()}, {"bias": BIAS}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_outputs_and_lse(name: str, kv_heads: int) -> None:
    spec, options, tensors = CASES[name]
    q, k, v = qkv(43, kv_heads=kv_heads, sq=17, skv=17)
    out, lse = run(q, k, v, **options)
    agree(out, spec, q, k, v, lse=lse, tol=JAX, **tensors)


def scored(name: str, q: Any, k: Any) -> Any:
    """jax's logsumexp of the case's scores, [B, S, H]: the residual of its attention passes no gradient."""
    i, j = jnp.arange(17)[:, None], jnp.arange(17)
    keep = {
        "causal": j <= i,
        "window": (i - j <= 4) & (j - i <= 2),
        "window causal": (i - j <= 5) & (j <= i),
        "padding": j < jnp.asarray(LENGTHS.numpy())[:, None, None, None],
        "padding causal": (j < jnp.asarray(LENGTHS.numpy())[:, None, None, None]) & (j <= i),
        "dense": jnp.asarray(KEEP.numpy()),
    }.get(name, j == j)
    scale = 0.9 if name == "scale" else 0.25
    logits = scale * jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2))
    logits = logits + jnp.asarray(BIAS.numpy()) if name == "bias" else logits
    return jax.nn.logsumexp(logits, axis=-1, where=jnp.broadcast_to(keep, logits.shape)).transpose(0, 2, 1)


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_output_and_lse(name: str) -> None:
    spec, options, tensors = CASES[name]
    leaves = [x.requires_grad_() for x in qkv(44, kv_heads=2, sq=17, skv=17)]
    draw = torch.Generator().manual_seed(45)
    weight = torch.randn(2, 4, 17, 16, generator=draw, dtype=torch.float64)
    weight_lse = torch.randn(2, 4, 17, generator=draw, dtype=torch.float64)
    near(back(scored(name, turn(leaves[0]), turn(leaves[1]))), run(*leaves, **options)[1].transpose(1, 2), 1e-6, "lse")

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = jax.nn.dot_product_attention(q, k, v, **options)
        lse = scored(name, q, k)
        return (out * turn(weight)).sum() + (lse * jnp.asarray(weight_lse.transpose(1, 2).numpy())).sum()

    given = jax.grad(loss, argnums=(0, 1, 2))(*(turn(x) for x in leaves))
    wanted = [back(x).transpose(1, 2) for x in given]

    def mine(out: Tensor, lse: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out, lse), inputs, (weight.to(out.dtype), weight_lse.to(lse.dtype)))

    for name_, got, want in zip("qkv", mine(*oracle(spec, *leaves, **tensors), leaves), wanted, strict=True):
        near(got, want, JAX, f"oracle: grad of {name_}")
    asked = 0
    for backend in ("eager", "sdpa", "cpu"):
        dtype = torch.float64 if backend == "eager" else torch.float32
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        lower = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}
        try:
            with attnreg.use_backend(backend):
                out, lse = attnreg.attention(spec, *inputs, **lower)
        except attnreg.errors.UnsupportedError:
            continue
        asked += 1
        for name_, got, want in zip("qkv", mine(out, lse, inputs), wanted, strict=True):
            near(got, want, JAX if backend == "eager" else 3e-5, f"{backend}: grad of {name_}")
    assert asked
