"""Wrong calls: each raises the error of the tree that fits, naming the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnreg
from attnreg import AttentionSpec, HeadGrouping, Precision, masks, scores, sparsity
from attnreg.errors import (
    AttnregError,
    DeviceError,
    DtypeError,
    InputError,
    MissingTensorError,
    ShapeError,
    SpecError,
    UnexpectedTensorError,
)
from attnreg.validate import check
from attnreg.values import check_values

B, HQ, HKV, SQ, SKV, D = 2, 4, 2, 6, 8, 16
INT32 = {"dtype": torch.int32}


def call(**tensors: Any) -> dict[str, Any]:
    """A right call in layout bhsd, with what is given put in its place."""
    shapes = {"q": (B, HQ, SQ, D), "k": (B, HKV, SKV, D), "v": (B, HKV, SKV, D)}
    return {**{name: torch.randn(shape) for name, shape in shapes.items()}, **tensors}


def packed(**tensors: Any) -> dict[str, Any]:
    """A right packed call: sequences of 2 and 4 queries, 3 and 5 keys."""
    right = {
        "q": torch.randn(6, HQ, D),
        "k": torch.randn(8, HKV, D),
        "v": torch.randn(8, HKV, D),
        "cu_seqlens_q": torch.tensor([0, 2, 6], **INT32),
        "cu_seqlens_k": torch.tensor([0, 3, 8], **INT32),
    }
    return {**right, **tensors}


def paged(**tensors: Any) -> dict[str, Any]:
    """A right paged call: five pages of four keys, two a sequence."""
    right = {
        "q": torch.randn(B, HQ, SQ, D),
        "k": torch.randn(5, HKV, 4, D),
        "v": torch.randn(5, HKV, 4, D),
        "block_table": torch.tensor([[3, 1], [0, 4]], **INT32),
    }
    return {**right, **tensors}


def stored(**tensors: Any) -> dict[str, Any]:
    """A right call with int8 keys and values."""
    k, v = (torch.randint(-90, 90, (B, HKV, SKV, D), dtype=torch.int8) for _ in range(2))
    scale = torch.full((B, HKV), 0.01)
    return call(**{"k": k, "v": v, "k_descale": scale, "v_descale": scale, **tensors})


def lengths(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


S = AttentionSpec
PLAIN, DENSE, BIAS, PADDING = S(), S(mask=masks.Dense()), S(bias=True), S(mask=masks.Padding())
THD, PAGED = S(layout="thd"), S(page_size=4)
INT8 = S(dtype=Precision(kv="int8", scaling="head"))
GENERAL, ADDITIVE = S(score=scores.General()), S(score=scores.Additive())
BLOCKS = S(sparsity=sparsity.Blocks(2, 4))
randn, ones = torch.randn, torch.ones
half, double = torch.float16, torch.float64
ONE = randn(1, 1, 1, 1)

Row = tuple[str, AttentionSpec, Callable[[], dict[str, Any]], type[AttnregError], str, str]

TABLE: list[Row] = [
    # rank
    ("q of rank 3", PLAIN, lambda: call(q=randn(HQ, SQ, D)), ShapeError, "q", "4 dimensions [B, Hq, Sq, D]"),
    ("k of rank 5", PLAIN, lambda: call(k=randn(1, B, HKV, SKV, D)), ShapeError, "k", "4 dimensions"),
    ("v of rank 2", PLAIN, lambda: call(v=randn(SKV, D)), ShapeError, "v", "got shape [8, 16]"),
    ("packed q of rank 4", THD, lambda: packed(q=randn(1, 6, HQ, D)), ShapeError, "q", "[T, Hq, D]"),
    ("scalar q", PLAIN, lambda: call(q=torch.tensor(1.0)), ShapeError, "q", "got shape []"),
    # size
    ("other batch in k", PLAIN, lambda: call(k=randn(3, HKV, SKV, D)), ShapeError, "k", "batch 2"),
    ("other batch in v", PLAIN, lambda: call(v=randn(3, HKV, SKV, D)), ShapeError, "v", "[2, 2, 8"),
    ("other heads in v", PLAIN, lambda: call(v=randn(B, HQ, SKV, D)), ShapeError, "v", "[2, 4, 8"),
    ("other length of v", PLAIN, lambda: call(v=randn(B, HKV, SKV - 1, D)), ShapeError, "v", "got [2, 2, 7"),
    ("other head_dim in k", PLAIN, lambda: call(k=randn(B, HKV, SKV, D + 1)), ShapeError, "k", "head_dim 16"),
    ("head_dim of 0", PLAIN, lambda: call(q=randn(B, HQ, SQ, 0), k=randn(B, HKV, SKV, 0)), ShapeError, "q", ">= 1"),
    ("Dv of 0", PLAIN, lambda: call(v=randn(B, HKV, SKV, 0)), ShapeError, "v", ">= 1"),
    ("heads that do not divide", PLAIN, lambda: call(q=randn(B, 3, SQ, D)), ShapeError, "k", "Hq=3, Hkv=2"),
    ("no query heads", PLAIN, lambda: call(q=randn(B, 0, SQ, D)), ShapeError, "k", "Hq=0"),
    ("no KV heads", PLAIN, lambda: call(k=randn(B, 0, 8, D), v=randn(B, 0, 8, D)), ShapeError, "k", "Hkv=0"),
    ("other heads than said", S(heads=HeadGrouping(q=8, kv=2)), call, ShapeError, "heads", "Hq=4"),
    (
        "more rows than can be",
        PLAIN,
        lambda: call(q=meta(1, 1, 1, 1).expand(1, 2**23, 2**23, 1), k=meta(1, 1, 8, 1), v=meta(1, 1, 8, 1)),
        ShapeError,
        "q",
        "2**45",
    ),
    (
        "more keys than can be",
        PLAIN,
        lambda: call(q=randn(1, 1, 1, 1), k=randn(1).expand(1, 1, 2**46, 1), v=randn(1).expand(1, 1, 2**46, 1)),
        ShapeError,
        "k",
        "2**45",
    ),
    ("2**45 rows, one too many", PLAIN, lambda: call(q=randn(1).expand(1, 8, 2**42, 1), k=ONE, v=ONE), ShapeError, "q",
     "fewer than 2**45 rows"),
    ("2**45 keys", PLAIN, lambda: call(q=ONE, k=randn(1).expand(1, 1, 2**45, 1), v=randn(1).expand(1, 1, 2**45, 1)),
     ShapeError, "k", "fewer than 2**45 rows"),
    ("2**45 packed rows", THD,
     lambda: packed(q=randn(1).expand(2**44, 2, 1), k=ONE[0], v=ONE[0], cu_seqlens_q=torch.tensor([0, 2**43, 2**44]),
                    cu_seqlens_k=lengths(0, 1, 1)), ShapeError, "q", "fewer than 2**45 rows"),
    ("2**45 packed keys", THD,
     lambda: packed(q=ONE[0], k=randn(1).expand(2**45, 1, 1), v=randn(1).expand(2**45, 1, 1),
                    cu_seqlens_q=lengths(0, 1, 1), cu_seqlens_k=torch.tensor([0, 2**44, 2**45])), ShapeError, "k",
     "fewer than 2**45 rows"),
    ("2**45 keys in pages", PAGED,
     lambda: paged(k=randn(1).expand(2**43, HKV, 4, D), v=randn(1).expand(2**43, HKV, 4, D)), ShapeError, "k",
     "fewer than 2**45 rows in pages"),
    ("2**45 keys by the table", PAGED, lambda: paged(block_table=lengths(0).expand(B, 2**43)), ShapeError, "k",
     "fewer than 2**45 rows"),
    ("head_dim of 2**45", PLAIN, lambda: call(q=ONE.expand(1, 1, 1, 2**45), k=ONE.expand(1, 1, 1, 2**45), v=ONE),
     ShapeError, "q", "fewer than 2**45 columns"),
    ("Dv of 2**45", PLAIN, lambda: call(q=ONE, k=ONE, v=ONE.expand(1, 1, 1, 2**45)), ShapeError, "v",
     "fewer than 2**45 columns"),
    ("max_seqlen of 2**45", THD, lambda: packed(max_seqlen_k=2**45), ShapeError, "max_seqlen_k", "below 2**45"),
    # layout: what is right in one is wrong in another
    ("bshd heads", S(layout="bshd"), lambda: call(q=randn(B, SQ, 3, D)), ShapeError, "k", "divides Hq"),
    (
        "bhsd given as bshd",
        S(layout="bshd"),
        lambda: call(v=randn(B, SKV, HKV, D), k=randn(B, HKV, SKV, D)),
        ShapeError,
        "v",
        "to match k",
    ),
    # dtype
    ("integer q", PLAIN, lambda: call(q=ones(B, HQ, SQ, D).long()), DtypeError, "q", "torch.int64"),
    ("complex q", PLAIN, lambda: call(q=randn(B, HQ, SQ, D).cfloat()), DtypeError, "q", "complex64"),
    ("half k beside float q", PLAIN, lambda: call(k=randn(B, HKV, SKV, D).half()), DtypeError, "k", "torch.float32"),
    ("double v beside float q", PLAIN, lambda: call(v=randn(B, HKV, SKV, D).double()), DtypeError, "v", "float64"),
    ("int8 k not said", PLAIN, lambda: call(k=ones(B, HKV, SKV, D).to(torch.int8)), DtypeError, "k", "'same'"),
    ("float k said int8", INT8, lambda: stored(k=randn(B, HKV, SKV, D)), DtypeError, "k", "torch.int8"),
    ("list for q", PLAIN, lambda: call(q=[[1.0]]), DtypeError, "q", "torch.Tensor, got list"),
    ("None for v", PLAIN, lambda: call(v=None), DtypeError, "v", "NoneType"),
    ("sparse k", PLAIN, lambda: call(k=randn(B, HKV, SKV, D).to_sparse()), DtypeError, "k", "strided"),
    ("float attn_mask", DENSE, lambda: call(attn_mask=randn(SQ, SKV)), DtypeError, "attn_mask", "bias="),
    ("integer attn_mask", DENSE, lambda: call(attn_mask=ones(SQ, SKV).int()), DtypeError, "attn_mask", "bool"),
    ("bool bias", BIAS, lambda: call(bias=ones(SQ, SKV).bool()), DtypeError, "bias", "torch.float32"),
    ("double bias beside float q", BIAS, lambda: call(bias=randn(SQ, SKV).double()), DtypeError, "bias", "float64"),
    ("float kv_lengths", PADDING, lambda: call(kv_lengths=ones(B)), DtypeError, "kv_lengths", "int32 or int64"),
    ("short kv_lengths", PADDING, lambda: call(kv_lengths=ones(B).short()), DtypeError, "kv_lengths", "int16"),
    (
        "float document_ids",
        S(mask=masks.Document()),
        lambda: call(document_ids=ones(B, SKV)),
        DtypeError,
        "document_ids",
        "integer",
    ),
    ("integer sinks", S(sinks=True), lambda: call(sinks=ones(HQ).long()), DtypeError, "sinks", "int64"),
    ("number for scale weight", GENERAL, lambda: call(score_weight=2.0), DtypeError, "score_weight", "float 2.0"),
    ("list for kv_lengths", PADDING, lambda: call(kv_lengths=[3, 4]), DtypeError, "kv_lengths", "list [3, 4]"),
    ("float max_seqlen_q", THD, lambda: packed(max_seqlen_q=4.0), DtypeError, "max_seqlen_q", "int"),
    ("bool max_seqlen_k", THD, lambda: packed(max_seqlen_k=True), DtypeError, "max_seqlen_k", "int"),
    ("half descale of integers", INT8, lambda: stored(k_descale=ones(B, HKV).long()), DtypeError, "k_descale", "int64"),
    # device
    ("k elsewhere", PLAIN, lambda: call(k=meta(B, HKV, SKV, D)), DeviceError, "k", "cpu"),
    ("v elsewhere", PLAIN, lambda: call(v=meta(B, HKV, SKV, D)), DeviceError, "v", "meta"),
    ("bias elsewhere", BIAS, lambda: call(bias=meta(SQ, SKV)), DeviceError, "bias", "meta"),
    (
        "table elsewhere",
        PAGED,
        lambda: paged(block_table=meta(B, 2, dtype=torch.int32)),
        DeviceError,
        "block_table",
        "meta",
    ),
    # names
    ("attn_mask missing", DENSE, call, MissingTensorError, "attn_mask", "Dense()"),
    ("bias missing", BIAS, call, MissingTensorError, "bias", "bias=True"),
    ("bias given as None", BIAS, lambda: call(bias=None), MissingTensorError, "bias", "lacks it"),
    ("kv_lengths missing", PADDING, call, MissingTensorError, "kv_lengths", "Padding()"),
    ("prefix_lengths missing", S(mask=masks.PrefixLM()), call, MissingTensorError, "prefix_lengths", "PrefixLM"),
    ("slopes missing", S(alibi=True), call, MissingTensorError, "alibi_slopes", "alibi=True"),
    ("sinks missing", S(sinks=True), call, MissingTensorError, "sinks", "sinks=True"),
    ("weight missing", ADDITIVE, call, MissingTensorError, "score_weight", "Additive()"),
    ("offset missing", S(align="offset"), call, MissingTensorError, "query_offset", "align='offset'"),
    ("block_mask missing", BLOCKS, call, MissingTensorError, "block_mask", "Blocks"),
    ("table missing", PAGED, lambda: paged(block_table=None), MissingTensorError, "block_table", "page_size=4"),
    ("cu_seqlens_k missing", THD, lambda: packed(cu_seqlens_k=None), MissingTensorError, "cu_seqlens_k", "'thd'"),
    ("descale missing", INT8, lambda: stored(v_descale=None), MissingTensorError, "v_descale", "quantised"),
    ("mask not asked for", PLAIN, lambda: call(attn_mask=ones(SQ, SKV).bool()), UnexpectedTensorError, "attn_mask",
     "masks.Dense()"),
    ("bias not asked for", PLAIN, lambda: call(bias=randn(SQ, SKV)), UnexpectedTensorError, "bias", "bias=True"),
    ("sinks not asked for", PLAIN, lambda: call(sinks=randn(HQ)), UnexpectedTensorError, "sinks", "sinks=True"),
    ("lengths not asked for", PLAIN, lambda: call(kv_lengths=lengths(1, 2)), UnexpectedTensorError, "kv_lengths",
     "masks.Padding()"),
    ("seqused_k without pages", PLAIN, lambda: call(seqused_k=lengths(1, 2)), UnexpectedTensorError, "seqused_k",
     "page_size"),
    ("cu_seqlens in bhsd", PLAIN, lambda: call(cu_seqlens_q=lengths(0, 1, 2)), UnexpectedTensorError, "cu_seqlens_q",
     "layout='thd'"),
    ("ids of packed documents", S(mask=masks.Document(), layout="thd"),
     lambda: packed(document_ids=ones(2, 5).long()), UnexpectedTensorError, "document_ids", "other than thd"),
    ("generator without dropout", PLAIN, lambda: call(generator=torch.Generator()), UnexpectedTensorError, "generator",
     "dropout_p"),
    ("descale of floats", PLAIN, lambda: call(k_descale=ones(1)), UnexpectedTensorError, "k_descale", "Precision"),
    ("unknown name", PLAIN, lambda: call(mask=ones(SQ, SKV)), UnexpectedTensorError, "mask", "the names are attn_mask"),
    ("unknown name of nothing", PLAIN, lambda: call(is_causal=None), UnexpectedTensorError, "is_causal", "no such"),
    ("misspelt name", PADDING, lambda: call(kv_length=lengths(3, 4)), UnexpectedTensorError, "kv_length", "no such"),
    # shapes of named tensors
    ("mask of other length", DENSE, lambda: call(attn_mask=ones(SQ, 7).bool()), ShapeError, "attn_mask", "got [6, 7]"),
    ("mask of rank 5", DENSE, lambda: call(attn_mask=ones(1, B, HQ, SQ, SKV).bool()), ShapeError, "attn_mask",
     "broadcasts to"),
    ("bias of KV heads", BIAS, lambda: call(bias=randn(1, HKV, SQ, SKV)), ShapeError, "bias", "[2, 4, 6, 8]"),
    ("sinks of KV heads", S(sinks=True), lambda: call(sinks=randn(HKV)), ShapeError, "sinks", "[4]"),
    ("sinks of rank 2", S(sinks=True), lambda: call(sinks=randn(1, HQ)), ShapeError, "sinks", "[Hq]"),
    ("slopes of one head", S(alibi=True), lambda: call(alibi_slopes=ones(1)), ShapeError, "alibi_slopes", "[Hq]"),
    ("slopes of rank 3", S(alibi=True), lambda: call(alibi_slopes=ones(1, 1, HQ)), ShapeError, "alibi_slopes", "[Hq]"),
    ("lengths of other batch", PADDING, lambda: call(kv_lengths=lengths(1, 2, 3)), ShapeError, "kv_lengths", "[B]"),
    ("lengths of rank 2", PADDING, lambda: call(kv_lengths=ones(B, 1).int()), ShapeError, "kv_lengths", "[B]"),
    ("ids of other length", S(mask=masks.Document()), lambda: call(document_ids=ones(B, 7).long()), ShapeError,
     "document_ids", "[2, 8]"),
    ("global_mask of rank 1", S(mask=masks.Global()), lambda: call(global_mask=ones(SKV).bool()), ShapeError,
     "global_mask", "[B, Skv]"),
    ("weight of other dim", ADDITIVE, lambda: call(score_weight=randn(HQ, D + 1)), ShapeError, "score_weight",
     "[Hq or 1, D]"),
    ("weight of KV heads", GENERAL, lambda: call(score_weight=randn(HKV, D, D)), ShapeError, "score_weight",
     "[Hq or 1, Dq, Dk]"),
    ("block_mask of other blocks", BLOCKS, lambda: call(block_mask=ones(1, 1, 3, 3).bool()), ShapeError, "block_mask",
     "[3, 2]"),
    ("block_mask of rank 2", BLOCKS, lambda: call(block_mask=ones(3, 2).bool()), ShapeError, "block_mask", "nKV"),
    ("block_mask of KV heads", BLOCKS, lambda: call(block_mask=ones(1, HKV, 3, 2).bool()), ShapeError, "block_mask",
     "broadcasts"),
    ("offset of rank 0", S(align="offset"), lambda: call(query_offset=torch.tensor(3)), ShapeError, "query_offset",
     "[B]"),
    ("pages of other size", PAGED, lambda: paged(k=randn(5, HKV, 8, D), v=randn(5, HKV, 8, D)), ShapeError, "k",
     "page_size=4"),
    ("table of other batch", PAGED, lambda: paged(block_table=ones(3, 2).int()), ShapeError, "block_table", "[2, 2]"),
    ("cu_seqlens of two sides", THD, lambda: packed(cu_seqlens_k=lengths(0, 3, 5, 8)), ShapeError, "cu_seqlens_k",
     "[B + 1]"),
    ("empty cu_seqlens", THD, lambda: packed(cu_seqlens_q=lengths()), ShapeError, "cu_seqlens_q", "at least one"),
    ("descale of query heads", INT8, lambda: stored(k_descale=ones(B, HQ)), ShapeError, "k_descale", "[B, Hkv]"),
    ("descales for a tensor", S(dtype=Precision(kv="int8")), lambda: stored(), ShapeError, "k_descale", "one value"),
    ("scales that cut no blocks", S(dtype=Precision(kv="int8", scaling="block")),
     lambda: stored(k_descale=ones(B, HKV, 3), v_descale=ones(B, HKV, 3)), ShapeError, "k_descale", "Skv=8"),
    # values
    ("kv_lengths above Skv", PADDING, lambda: call(kv_lengths=lengths(3, 9)), InputError, "kv_lengths", "got 9"),
    ("negative kv_lengths", PADDING, lambda: call(kv_lengths=lengths(-1, 2)), InputError, "kv_lengths", "got -1"),
    ("negative prefix", S(mask=masks.PrefixLM()), lambda: call(prefix_lengths=lengths(0, -2)), InputError,
     "prefix_lengths", "got -2"),
    ("falling cu_seqlens", THD, lambda: packed(cu_seqlens_q=lengths(0, 7, 6)), InputError, "cu_seqlens_q",
     "never fall"),
    ("cu_seqlens from 1", THD, lambda: packed(cu_seqlens_q=lengths(1, 2, 6)), InputError, "cu_seqlens_q", "start at 0"),
    ("cu_seqlens beyond T", THD, lambda: packed(cu_seqlens_k=lengths(0, 3, 9)), InputError, "cu_seqlens_k", "8"),
    ("cu_seqlens short of T", THD, lambda: packed(cu_seqlens_q=lengths(0, 2, 5)), InputError, "cu_seqlens_q", "6"),
    ("max_seqlen too small", THD, lambda: packed(max_seqlen_q=3), InputError, "max_seqlen_q", "4"),
    ("negative max_seqlen", THD, lambda: packed(max_seqlen_k=-1), InputError, "max_seqlen_k", "-1"),
    ("page that does not exist", PAGED, lambda: paged(block_table=lengths(0, 5, 1, 2).view(2, 2)), InputError,
     "block_table", "got 5"),
    ("used page of -1", PAGED, lambda: paged(block_table=lengths(0, -1, 1, 2).view(2, 2)), InputError, "block_table",
     "got -1"),
    ("used page of -1 under seqused_k", PAGED,
     lambda: paged(block_table=lengths(0, -1, 1, 2).view(2, 2), seqused_k=lengths(5, 8)), InputError, "block_table",
     "got -1"),
    ("page below -1", PAGED, lambda: paged(block_table=lengths(0, -7, 1, 2).view(2, 2), seqused_k=lengths(4, 8)),
     InputError, "block_table", "got -7"),
    ("seqused_k above the table", PAGED, lambda: paged(seqused_k=lengths(9, 2)), InputError, "seqused_k", "got 9"),
    ("negative seqused_k", PAGED, lambda: paged(seqused_k=lengths(2, -3)), InputError, "seqused_k", "got -3"),
    ("offset off the time line", S(align="offset"), lambda: call(query_offset=torch.tensor([0, 2**60])), InputError,
     "query_offset", "2**45"),
]  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(TABLE) >= 60
    assert len({row[0] for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("spec", "make", "error", "argument", "said"), [row[1:] for row in TABLE],
                         ids=[row[0] for row in TABLE])  # fmt: skip
def test_a_wrong_call_is_named(
    spec: AttentionSpec, make: Callable[[], dict[str, Any]], error: type[InputError], argument: str, said: str
) -> None:
    arguments = make()
    with pytest.raises(AttnregError) as caught:
        attnreg.attention(spec, **arguments)
    assert isinstance(caught.value, error), f"expected {error.__name__}, got {caught.value!r}"
    assert isinstance(caught.value, InputError)
    assert caught.value.argument == argument
    text = str(caught.value)
    assert text.startswith(f"{argument}: ")
    assert said in text


@pytest.mark.parametrize("make", [call, packed, paged, stored], ids=lambda make: make.__name__)
def test_the_right_calls_that_the_table_spoils_are_right(make: Callable[[], dict[str, Any]]) -> None:
    spec = {call: PLAIN, packed: THD, paged: PAGED, stored: INT8}[make]
    arguments = make()
    assert attnreg.attention(spec, **arguments).shape == arguments["q"].shape


def test_a_positional_argument_that_is_no_spec() -> None:
    with pytest.raises(DtypeError, match="spec: expected an AttentionSpec, got dict"):
        attnreg.attention({"mask": "causal"}, **call())  # type: ignore[arg-type]  # that is the point


def test_a_missing_tensor_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        attnreg.attention(PLAIN, torch.randn(B, HQ, SQ, D))  # type: ignore[call-arg]  # that is the point


def test_a_second_call_checks_values_again() -> None:
    """The hot table remembers shapes, and must not remember that values were right."""
    right = call(kv_lengths=lengths(3, 8))
    attnreg.attention(PADDING, **right)
    with pytest.raises(InputError, match=r"kv_lengths: .*got 9"):
        attnreg.attention(PADDING, **{**right, "kv_lengths": lengths(3, 9)})


@pytest.mark.parametrize("entry", [attnreg.attention, attnreg.prepare, attnreg.explain])
def test_an_unknown_name_is_refused_whatever_it_holds(entry: Callable[..., Any]) -> None:
    for value in (None, 1):
        with pytest.raises(UnexpectedTensorError, match="nonsense: no such tensor"):
            entry(PLAIN, **call(nonsense=value))
    entry(PLAIN, **call(bias=None))  # a known name may be left out in this way


def test_many_packed_sequences_are_no_more_rows_than_they_hold() -> None:
    """Where lengths cannot be read, the bound on each sequence is T; their number times it counts nothing."""
    x, cu = meta(2**20, 64, 8), meta(2**20, dtype=torch.int32)
    check(THD, x, x, x, {"cu_seqlens_q": cu, "cu_seqlens_k": cu})


def test_block_scales_of_packed_keys_whose_lengths_cannot_be_read() -> None:
    """Neither right nor wrong numbers of scales are judged by T, which bounds the longest; reading it, they are."""
    spec = S(layout="thd", dtype=Precision(kv="int8", scaling="block"))
    cu = lengths(0, 96, 192, 288, 300)

    def sizes(device: str, count: int, **more: Any) -> Any:
        stored, scale = torch.empty(300, 2, 8, dtype=torch.int8, device=device), torch.ones(4, 2, count, device=device)
        named = {f"cu_seqlens_{side}": cu.to(device) for side in "qk"}
        q = torch.empty(300, 2, 8, device=device)
        return check(spec, q, stored, stored, {**named, "k_descale": scale, "v_descale": scale, **more})

    def read(count: int) -> None:
        scale = torch.ones(4, 2, count)
        check_values(spec, sizes("meta", count), {"cu_seqlens_k": cu, "k_descale": scale, "v_descale": scale})

    for count in (3, 6):
        sizes("cpu", count)
        read(count)
    sizes("meta", 7)
    for wrong in (lambda: sizes("cpu", 7), lambda: sizes("meta", 7, max_seqlen_k=96), lambda: read(7)):
        with pytest.raises(ShapeError, match=r"k_descale.*cuts Skv=96"):
            wrong()


BAD_SPECS: list[tuple[str, Callable[[], Any], str]] = [
    ("dropout_p of 1", lambda: S(dropout_p=1.0), "dropout_p"),
    ("negative dropout_p", lambda: S(dropout_p=-0.1), "dropout_p"),
    ("NaN dropout_p", lambda: S(dropout_p=float("nan")), "dropout_p"),
    ("NaN softcap", lambda: S(softcap=float("nan")), "softcap"),
    ("negative softcap", lambda: S(softcap=-1.0), "softcap"),
    ("infinite softcap", lambda: S(softcap=float("inf")), "softcap"),
    ("softcap that float32 rounds to 0", lambda: S(softcap=1e-50), "softcap"),
    ("softcap that float32 has not", lambda: S(softcap=1e39), "softcap"),
    ("scale that float32 has not", lambda: S(score=scores.ScaledDot(-1e39)), "scale"),
    ("bool for softcap", lambda: S(softcap=True), "softcap"),
    ("NaN scale", lambda: scores.ScaledDot(float("nan")), "scale"),
    ("infinite scale", lambda: scores.ScaledDot(float("-inf")), "scale"),
    ("text for scale", lambda: scores.ScaledDot("0.5"), "scale"),  # type: ignore[arg-type]
    ("page_size of 0", lambda: S(page_size=0), "page_size"),
    ("negative page_size", lambda: S(page_size=-16), "page_size"),
    ("unknown layout", lambda: S(layout="sbhd"), "layout"),
    ("unknown align", lambda: S(align="middle"), "align"),
    ("unknown field", lambda: S(causal=True), "causal"),
    ("text for a mask", lambda: S(mask="causal"), "mask"),
    ("class for a mask", lambda: S(mask=masks.Causal), "mask"),
    ("number for bias", lambda: S(bias=1), "bias"),
    ("text for return_lse", lambda: S(return_lse="yes"), "return_lse"),
    ("negative window", lambda: masks.SlidingWindow(-1), "left"),
    ("negative right", lambda: masks.SlidingWindow(1, -1), "right"),
    ("fraction of a window", lambda: masks.SlidingWindow(1.5), "left"),  # type: ignore[arg-type]
    ("chunk of 0", lambda: masks.Chunked(0), "size"),
    ("dilation of 0", lambda: masks.Dilated(3, 0), "dilation"),
    ("dilated window of 0", lambda: masks.Dilated(0, 2), "window"),
    ("negative prefix", lambda: masks.PrefixLM(-3), "length"),
    ("negative global", lambda: masks.Global((-1,)), "tokens"),
    ("number for globals", lambda: masks.Global(3), "tokens"),  # type: ignore[arg-type]
    ("mask_mod that is none", lambda: masks.Custom(3), "mask_mod"),  # type: ignore[arg-type]
    ("mask and number", lambda: masks.Causal() & 3, "mask"),  # type: ignore[operator]
    ("block of 0", lambda: sparsity.Blocks(0, 64), "block_q"),
    ("bigbird block of -1", lambda: sparsity.BigBird(-1), "block"),
    ("bigbird window of 0", lambda: sparsity.BigBird(16, window=0), "window"),
    ("negative random blocks", lambda: sparsity.BigBird(16, random_blocks=-1), "random_blocks"),
    ("stride of 0", lambda: sparsity.Strided(16, 1, 0), "stride"),
    ("heads that do not divide", lambda: HeadGrouping(q=6, kv=4), "q=6"),
    ("no heads", lambda: HeadGrouping(q=0, kv=0), "q >= 1"),
    ("unknown precision", lambda: Precision(compute="int4"), "compute"),
    ("rotation of a stored cache", lambda: Precision(kv="int8", rotate=True), "rotate q and k before storing k"),
    (
        "the same beside fp8 products",
        lambda: Precision(compute="float8_e4m3fn", kv="float8_e4m3fn", rotate=True),
        "kv='float8_e4m3fn'",
    ),
    ("window without a width", lambda: S.model_validate({"mask": {"kind": "sliding_window"}}), "['left']"),
    ("dilation without a step", lambda: S.model_validate({"mask": {"kind": "dilated", "window": 3}}), "['dilation']"),
    ("bigbird without a block", lambda: S.model_validate({"sparsity": {"kind": "bigbird"}}), "['block']"),
    ("complement of nothing", lambda: S.model_validate_json('{"mask": {"kind": "not"}}'), "['of']"),
    ("window past int64", lambda: masks.SlidingWindow(2**62), "int64"),
    ("bigbird of more blocks than positions", lambda: sparsity.BigBird(4, global_blocks=2**31), "global_blocks"),
    ("more random blocks than a table holds", lambda: sparsity.BigBird(4, random_blocks=2**16), "below 65536"),
    ("local blocks past int64", lambda: sparsity.Strided(4, 2**31, 1), "local"),
    ("unknown scaling", lambda: Precision(scaling="row"), "scaling"),
    ("mask of unknown kind", lambda: S.model_validate({"mask": {"kind": "spiral"}}), "spiral"),
    ("custom mask from data", lambda: S.model_validate({"mask": {"kind": "custom", "mask_mod": "x"}}), "custom"),
]


@pytest.mark.parametrize(("make", "said"), [row[1:] for row in BAD_SPECS], ids=[row[0] for row in BAD_SPECS])
def test_a_spec_that_cannot_be_meant(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert said in str(caught.value)
