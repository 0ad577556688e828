"""The block-sparse backend against the oracle: every mask and pattern, forward and backward, at small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flash_cases import core, quick, taken, without_gradients

from attnreg import AttentionSpec, Problem, TensorInfo, errors, masks, scores, sparsity
from attnreg.hardware import detect
from attnreg.testing import BackendConformance, cases, make_inputs
from attnreg.testing.candidate import check_candidate
from attnreg.testing.dropout import check_dropout
from attnreg_triton.block_sparse import TritonBlockSparse

HARDWARE = detect("cpu")
SPARSE = TritonBlockSparse()
TAKEN = taken(SPARSE, cases())
PAGED = [without_gradients(case) for case in cases() if case.spec.page_size is not None]
# What the flash backend refuses, which is what this one is for.
OWN = (
    "chunked", "chunked_causal", "dilated", "global", "global_mask", "longformer", "dense", "dense_heads", "dense_keys",
    "dense_rank_2", "custom", "not_window", "composed", "blocks", "blocks_causal", "blocks_batch", "bigbird",
    "bigbird_causal", "strided", "strided_full", "thd_union", "thd_bigbird", "thd_dense", "everything",
    "padding_causal",
)  # fmt: skip


def problem(spec: AttentionSpec, **sizes: object) -> Problem:
    """A small float32 problem of the spec; sizes override."""
    plain = {"batch": 2, "q_heads": 4, "kv_heads": 2, "sq": 50, "skv": 70, "head_dim": 16, "dtype": "float32"}
    merged = plain | sizes
    width = merged["head_dim"]
    merged = {"head_dim_k": width, "head_dim_v": width, "kv_dtype": merged["dtype"]} | merged
    merged["square"] = merged["sq"] == merged["skv"]
    return Problem(spec=spec, **merged)  # type: ignore[arg-type]  # sizes come by name


def judge(asked: Problem, **config: int) -> None:
    """The backend's result under a configuration passes the gate's rule."""
    inputs = make_inputs(asked)
    assert SPARSE.supports(inputs.problem, HARDWARE) == []
    chosen = SPARSE.space(inputs.problem, HARDWARE).check(config)
    result = check_candidate(SPARSE.prepare(inputs.problem, chosen), inputs)
    assert result.ok, result.reason


class TestTritonBlockSparse(BackendConformance):
    backend = SPARSE
    cases = core((case for case in quick(TAKEN) if case.name.split("/")[0] in OWN), "composed", "bigbird")
    configurations = 2


class TestTritonBlockSparsePaged(BackendConformance):
    backend = SPARSE
    cases = core(
        (case for case in quick(taken(SPARSE, PAGED)) if "union" in case.name or "lengths" in case.name), "paged_union"
    )
    configurations = 2


@pytest.mark.slow
class TestTritonBlockSparseWhole(BackendConformance):
    backend = SPARSE
    cases = (*TAKEN, *taken(SPARSE, PAGED))


@pytest.mark.slow
class TestTritonBlockSparseLarger(BackendConformance):
    backend = SPARSE
    cases = taken(SPARSE, cases(slow=True))


@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 16), (32, 128), (128, 32)])
def test_every_block_size(tile: tuple[int, int]) -> None:
    """Blocks longer and shorter than the pattern's own, than a word of bits and than the sequence say the same."""
    spec = AttentionSpec(
        mask=masks.Global((0, 33)) | masks.SlidingWindow(9, 4),
        sparsity=sparsity.BigBird(8, random_blocks=2, seed=5),
        return_lse=True,
    )
    sizes = {"batch": 1, "q_heads": 2, "kv_heads": 1, "sq": 70, "skv": 90}
    judge(problem(spec, **sizes, grads=frozenset("qkv")), block_m=tile[0], block_n=tile[1])


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 0, 0), (1, 1, 1, 1), (0, 0)])
def test_bias_gradient_of_every_broadcast(dims: tuple[int, ...]) -> None:
    """The bias's gradient is zero in blocks that are not live and sums over what it broadcasts over."""
    spec = AttentionSpec(mask=masks.Chunked(24), bias=True, softcap=8.0)
    tensors = (TensorInfo("bias", "float32", dims),)
    judge(problem(spec, tensors=tensors, grads=frozenset({"q", "bias"})), block_m=32, block_n=16)


@pytest.mark.parametrize("width", [(24, 16), (80, 40), (192, 128)])
def test_head_in_pieces(width: tuple[int, int]) -> None:
    """A head that is no power of two is padded or cut into a block and a tail, with the same result."""
    spec = AttentionSpec(mask=masks.Dilated(9, 3), sinks=True, alibi=True)
    sizes = {"head_dim": width[0], "head_dim_v": width[1], "batch": 1, "q_heads": 2, "kv_heads": 1}
    judge(problem(spec, **sizes, grads=frozenset({"q", "k", "v", "sinks"})))


def test_dropout_is_one_mask_forward_and_backward() -> None:
    """Which weights stay is read off the forward pass; out and gradients are the oracle's for exactly those."""
    spec = AttentionSpec(mask=masks.Causal(), sparsity=sparsity.Strided(8, 2, 3), dropout_p=0.3)
    inputs = make_inputs(problem(spec, batch=1, sq=40, skv=40, grads=frozenset("qkv")))
    config = SPARSE.space(inputs.problem, HARDWARE).check({"block_m": 32, "block_n": 16})
    result = check_dropout(SPARSE.prepare(inputs.problem, config), inputs)
    assert result.ok, result.reason


def test_a_full_block_is_bounded_by_what_exists() -> None:
    """Keys behind `seqused_k` and behind a packed sequence's end lie in full blocks and still leave no trace."""
    used = (TensorInfo("seqused_k", "int32", (0,)),)
    paged = {"skv": 96, "pages": 14, "tensors": used}
    judge(problem(AttentionSpec(page_size=16, return_lse=True), **paged), block_m=16, block_n=32)
    packed = {"batch": 3, "total_q": 70, "total_k": 90}
    judge(problem(AttentionSpec(layout="thd", return_lse=True), **packed, grads=frozenset("qkv")), block_m=32)


def test_bias_gradient_of_packed_sequences() -> None:
    """The bias spans the longest sequence's keys, not all the packed ones."""
    spec = AttentionSpec(layout="thd", bias=True, mask=masks.Chunked(24))
    tensors = (TensorInfo("bias", "float32", (1, 1, 0)),)
    packed = {"batch": 2, "sq": 40, "skv": 33, "total_q": 50, "total_k": 41, "tensors": tensors}
    judge(problem(spec, **packed, grads=frozenset({"q", "bias"})), block_m=32, block_n=32)


def test_padding_beside_used_pages_places_the_queries() -> None:
    """Bottom right counts from the shorter of kv_lengths and seqused_k, in the layout as in ALiBi."""
    spec = AttentionSpec(mask=masks.Padding() & ~masks.Dilated(5, 3), alibi=True, page_size=16, return_lse=True)
    asked = problem(spec, batch=3, sq=9, skv=48, tensors=(TensorInfo("seqused_k", "int32", (0,)),))
    inputs = make_inputs(asked)
    inputs.tensors["seqused_k"].copy_(torch.tensor([20, 40, 9]))
    inputs.tensors["kv_lengths"].copy_(torch.tensor([48, 30, 9]))
    result = check_candidate(SPARSE.prepare(asked, SPARSE.space(asked, HARDWARE).default), inputs)
    assert result.ok, result.reason


def test_one_gradient_alone() -> None:
    """Asking for dv alone, or dq alone, gives what asking for all gives."""
    spec = AttentionSpec(mask=masks.Chunked(13))
    inputs = make_inputs(problem(spec, grads=frozenset("qkv")))
    config = SPARSE.space(inputs.problem, HARDWARE).default
    run = SPARSE.prepare(inputs.problem, config)
    named = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    whole = torch.autograd.grad(run(**named).sum(), list(named.values()))
    for n, name in enumerate(named):
        given = {x: value.detach().requires_grad_(x == name) for x, value in named.items()}
        alone = SPARSE.prepare(replace(inputs.problem, grads=frozenset(name)), config)
        torch.testing.assert_close(torch.autograd.grad(alone(**given).sum(), given[name])[0], whole[n], rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    """Kernels compute a gradient outside autograd: differentiating it raises, and is never just 0."""
    asked = problem(AttentionSpec(mask=masks.Chunked(13)), sq=9, skv=9, grads=frozenset("qkv"))
    inputs = make_inputs(asked)
    out = SPARSE.prepare(asked, SPARSE.space(asked, HARDWARE).default)(inputs.q, inputs.k, inputs.v)
    for name in "qkv":
        (grad,) = torch.autograd.grad(out.pow(2).sum(), getattr(inputs, name), create_graph=True)
        with pytest.raises(errors.BackendError, match="triton_block_sparse: no second derivative"):
            torch.autograd.grad(grad.pow(2).sum(), inputs.q)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "query_offset"])
def test_a_tensor_overwritten_before_the_backward_pass_is_told(name: str) -> None:
    """The backward pass reads every tensor of the call again: torch raises where one has changed since."""
    sizes = {"total_q": 70, "total_k": 90} if name.startswith("cu") else {}
    spec = AttentionSpec(alibi=True, layout="thd" if sizes else "bhsd", align="top_left" if sizes else "offset")
    inputs = make_inputs(problem(spec, sq=50, skv=70, grads=frozenset("qkv"), **sizes))
    run = SPARSE.prepare(inputs.problem, SPARSE.space(inputs.problem, HARDWARE).default)
    out = run(inputs.q, inputs.k, inputs.v, **inputs.tensors)
    inputs.tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float64", "kv_dtype": "float64"}, "float64"),
        ({"kv_dtype": "int8"}, "int8"),
        ({"head_dim": 300, "head_dim_k": 300}, "300"),
        ({"traced": True}, "traced"),
        ({"spec": AttentionSpec(score=scores.Additive())}, "Additive"),
        ({"spec": AttentionSpec(page_size=16), "grads": frozenset("q"), "pages": 8}, "gradient"),
        ({"spec": AttentionSpec(alibi=True), "grads": frozenset({"alibi_slopes"})}, "gradient of alibi_slopes"),
    ],
)
def test_refusals_name_the_reason(change: dict[str, object], words: str) -> None:
    reasons = SPARSE.supports(replace(problem(AttentionSpec()), **change), HARDWARE)  # type: ignore[arg-type]  # by name
    assert any(words in reason for reason in reasons), reasons


def test_masked_keys_leave_no_trace_under_a_softcap() -> None:
    """Logits of masked keys overflow to inf and inf - inf, whose tanh has no gradient: gradients stay finite."""
    spec = AttentionSpec(mask=masks.Dilated(5, 2), softcap=10.0, bias=True)
    asked = problem(spec, sq=17, skv=40, dtype="bfloat16", grads=frozenset({"q", "k", "v", "bias"}))
    inputs = make_inputs(asked, "huge")
    k = inputs.k.detach().clone()
    k[..., ::2] = torch.where(k.abs() > 1e30, -k, k)[..., ::2]  # both signs in a row: their sum is inf - inf
    inputs = replace(inputs, k=k.requires_grad_())
    result = check_candidate(SPARSE.prepare(asked, SPARSE.space(asked, HARDWARE).default), inputs)
    assert result.ok, result.reason


@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 20), (20, 0)])
def test_block_mask_of_nothing(sq: int, skv: int) -> None:
    judge(problem(AttentionSpec(sparsity=sparsity.Blocks(8, 16), return_lse=True), sq=sq, skv=skv))
