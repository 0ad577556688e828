"""Check a call against its spec: names, ranks, sizes, dtypes, devices; and values where that needs no sync."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.errors import (
    DeviceError,
    DtypeError,
    MissingTensorError,
    ShapeError,
    UnexpectedTensorError,
)
from attnreg.scores import General
from attnreg.sparsity import Blocks
from attnreg.spec import AttentionSpec

__all__ = ["FLOAT8", "NAMES", "Sizes", "block_of", "check", "check_blocks", "readable"]

NAMES = (
    "attn_mask", "bias", "alibi_slopes", "sinks", "score_weight", "prefix_lengths", "global_mask", "document_ids",
    "kv_lengths", "query_offset", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "block_table", "seqused_k", "q_descale", "k_descale", "v_descale", "generator",
)  # fmt: skip
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_ROWS = 2**45
MAX_ELEMENTS = 2**47  # beyond the addresses of a process


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call. sq and skv are the longest sequence's bound under thd; totals are 0 elsewhere."""

    batch: int
    q_heads: int
    kv_heads: int
    sq: int
    skv: int
    head_dim: int
    head_dim_k: int
    head_dim_v: int
    total_q: int = 0
    total_k: int = 0
    pages: int = 0


def check(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Sizes:
    """Raise the error that fits, naming the argument, what was expected and what came; or return the sizes."""
    if not isinstance(spec, AttentionSpec):
        raise DtypeError("spec", f"expected an AttentionSpec, got {_said(spec)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _tensor(name, x)
    _check_names(spec, q, tensors)
    _check_dtypes(spec, q, k, v)
    sizes = _sizes(spec, q, k, v, tensors)
    _check_heads(spec, sizes)
    for name, value in tensors.items():
        if value is None or name in ("max_seqlen_q", "max_seqlen_k"):
            continue
        if name == "generator":
            if not isinstance(value, torch.Generator):
                raise DtypeError(name, f"expected a torch.Generator, got {_said(value)}")
            continue
        _check_one(spec, sizes, name, _tensor(name, value), q)
    if not _only_bounded(spec, tensors):
        check_blocks(spec, sizes.skv, tensors)
    for name, x in (("k", k), ("v", v), *tensors.items()):
        # A generator may differ: torch wants it on the device of the drawn tensor, which the backend owns.
        if isinstance(x, Tensor) and x.device != q.device:
            raise DeviceError(name, f"expected device {q.device} like q, got {x.device}")
    return sizes


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise DtypeError(name, f"expected a torch.Tensor, got {_said(value)}")
    if value.layout != torch.strided:
        raise DtypeError(name, f"expected a strided tensor, got layout {value.layout}")
    return value


def _said(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _check_names(spec: AttentionSpec, q: Tensor, tensors: Mapping[str, Any]) -> None:
    needed = set(spec.tensors())
    optional: set[str] = set()
    if spec.layout == "thd":
        optional |= {"max_seqlen_q", "max_seqlen_k"}
    if spec.page_size is not None:
        optional |= {"seqused_k"}
    if spec.dropout_p:
        optional |= {"generator"}
    if q.dtype in FLOAT8:
        needed |= {"q_descale", "k_descale", "v_descale"}
    given = {name for name, value in tensors.items() if value is not None}
    for name in tensors:
        if name not in NAMES:
            raise UnexpectedTensorError(name, f"no such tensor; the names are {', '.join(NAMES)}")
    for name in sorted(needed - given):
        raise MissingTensorError(
            name, f"the spec asks for it and the call lacks it; pass {name}= ({_asker(spec, name)})"
        )
    for name in sorted(given - needed - optional):
        raise UnexpectedTensorError(
            name, f"given at the call, but the spec does not ask for it; {_how(name)}, or leave it out"
        )


def _asker(spec: AttentionSpec, name: str) -> str:
    if name in spec.mask.tensors():
        return f"mask={spec.mask!r}"
    if name in spec.sparsity.tensors():
        return f"sparsity={spec.sparsity!r}"
    if name in spec.score.tensors():
        return f"score={spec.score!r}"
    return {
        "bias": "bias=True", "alibi_slopes": "alibi=True", "sinks": "sinks=True", "query_offset": "align='offset'",
        "block_table": f"page_size={spec.page_size}", "cu_seqlens_q": "layout='thd'", "cu_seqlens_k": "layout='thd'",
    }.get(name, "k and v are stored quantised" if spec.dtype.kv != "same" else "q is float8")  # fmt: skip


def _how(name: str) -> str:
    return {
        "attn_mask": "say masks.Dense()", "bias": "say bias=True", "alibi_slopes": "say alibi=True",
        "sinks": "say sinks=True", "score_weight": "say score=General() or Additive()",
        "prefix_lengths": "say masks.PrefixLM()", "global_mask": "say masks.Global()",
        "document_ids": "say masks.Document() in a layout other than thd", "kv_lengths": "say masks.Padding()",
        "query_offset": "say align='offset'", "block_mask": "say sparsity.Blocks(block_q, block_kv)",
        "block_table": "say page_size=", "seqused_k": "say page_size=", "generator": "say dropout_p=",
        "cu_seqlens_k": "say layout='thd' without page_size",
    }.get(name, "say layout='thd'" if "seqlen" in name else "say dtype=Precision(kv=...)")  # fmt: skip


def _check_dtypes(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in (*FLOATS, *FLOAT8):
        raise DtypeError("q", f"expected a floating dtype (float16, bfloat16, float32, float64, float8), got {q.dtype}")
    kv = spec.dtype.kv
    want = q.dtype if kv == "same" else getattr(torch, kv)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != want:
            why = "like q, since spec.dtype.kv is 'same'" if kv == "same" else f"since spec.dtype.kv is {kv!r}"
            raise DtypeError(name, f"expected {want} {why}, got {x.dtype}")
    if q.dtype in FLOAT8 and spec.dtype.compute == "int8":
        raise DtypeError("q", f"compute='int8' takes 16- or 32-bit q and quantises it, got {q.dtype}")


def _shape(name: str, x: Tensor, dims: str) -> tuple[int, ...]:
    rank = dims.count(",") + 1
    if x.dim() != rank:
        raise ShapeError(name, f"expected {rank} dimensions {dims}, got shape {list(x.shape)}")
    return tuple(x.shape)


def _equal(name: str, dims: str, x: Tensor, want: tuple[int, ...], like: str) -> None:
    if tuple(x.shape) != want:
        raise ShapeError(name, f"expected {dims} = {list(want)} to match {like}, got {list(x.shape)}")


def _sizes(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> Sizes:
    dims = {"bhsd": "[B, Hq, Sq, D]", "bshd": "[B, Sq, Hq, D]", "thd": "[T, Hq, D]"}[spec.layout]
    shape = _shape("q", q, dims)
    total_q = total_k = pages = 0
    if spec.layout == "thd":
        total_q, q_heads, head_dim = shape
        cu = _integers("cu_seqlens_q", tensors["cu_seqlens_q"], "[B + 1]")
        batch, sq = cu.shape[0] - 1, _longest("q", cu, tensors.get("max_seqlen_q"), total_q)
    elif spec.layout == "bhsd":
        batch, q_heads, sq, head_dim = shape
    else:
        batch, sq, q_heads, head_dim = shape
    kv_dims = "[pages, Hkv, page_size, D]" if spec.page_size is not None else dims.replace("q", "kv")
    shape_k, shape_v = _shape("k", k, kv_dims), _shape("v", v, kv_dims)
    if spec.page_size is not None:
        pages, kv_heads, size, head_dim_k = shape_k
        if size != spec.page_size:
            raise ShapeError("k", f"expected {kv_dims} with page_size={spec.page_size}, got {list(shape_k)}")
        table = _integers("block_table", tensors["block_table"], "[B, pages of a sequence]")
        skv = table.shape[1] * size
    elif spec.layout == "thd":
        total_k, kv_heads, head_dim_k = shape_k
        cu = _integers("cu_seqlens_k", tensors["cu_seqlens_k"], "[B + 1]")
        skv = _longest("k", cu, tensors.get("max_seqlen_k"), total_k)
    else:
        batch_k, kv_heads, skv, head_dim_k = (
            shape_k[n] for n in ((0, 1, 2, 3) if spec.layout == "bhsd" else (0, 2, 1, 3))
        )
        if batch_k != batch:
            raise ShapeError("k", f"expected batch {batch} like q, got {batch_k} in {list(shape_k)}")
    _equal("v", kv_dims, v, (*shape_k[:-1], shape_v[-1]), f"k {list(shape_k)} but for the last dimension")
    if head_dim != head_dim_k and not isinstance(spec.score, General):
        raise ShapeError(
            "k", f"expected head_dim {head_dim} like q, got {head_dim_k}; only score=General() takes Dq != Dk"
        )
    for name, size in (("q", head_dim), ("k", head_dim_k), ("v", shape_v[-1])):
        if size < 1:
            raise ShapeError(name, f"expected head_dim >= 1, got shape {list({'q': q, 'k': k, 'v': v}[name].shape)}")
    # Of packed rows the sequences' bound says nothing: it may be T for each of many.
    rows_q = total_q if spec.layout == "thd" else batch * sq
    rows_k = total_k if spec.layout == "thd" and spec.page_size is None else batch * skv
    for name, what, count in (
        ("q", "rows", q_heads * rows_q), ("k", "rows", q_heads * rows_k),
        ("k", "rows in pages", q_heads * pages * (spec.page_size or 0)),
        ("q", "columns", head_dim), ("k", "columns", head_dim_k), ("v", "columns", shape_v[-1]),
    ):  # fmt: skip
        if count >= MAX_ROWS:
            raise ShapeError(name, f"expected fewer than 2**45 {what}, got {count}; no machine holds them")
    elements = q_heads * rows_q * shape_v[-1]
    if elements >= MAX_ELEMENTS:
        raise ShapeError("q", f"expected an output of fewer than 2**47 elements, got {elements}; no machine holds it")
    return Sizes(batch, q_heads, kv_heads, sq, skv, head_dim, head_dim_k, shape_v[-1], total_q, total_k, pages)


def _longest(side: str, cu: Tensor, given: object, total: int) -> int:
    """Longest sequence of one side: as given, else read where that needs no sync, else the bound T."""
    name = f"max_seqlen_{side}"
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
            raise DtypeError(name, f"expected an int, got {_said(given)}")
        if given < 0:
            raise ShapeError(name, f"expected a length >= 0, got {given}")
        if given >= MAX_ROWS:
            raise ShapeError(name, f"expected a length below 2**45, got {given}")
        return given  # type: ignore[return-value]  # a SymInt stands for an int under tracing
    if readable(cu) and cu.numel() > 1:
        return max(int((cu[1:] - cu[:-1]).max()), 0)
    return total


def readable(x: Tensor) -> bool:
    """May the values be read without a device synchronisation and without breaking a trace?"""
    plain = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def _check_heads(spec: AttentionSpec, sizes: Sizes) -> None:
    if sizes.q_heads < 1 or sizes.kv_heads < 1 or sizes.q_heads % sizes.kv_heads:
        raise ShapeError(
            "k",
            "expected Hkv that divides Hq: query head h reads KV head h // (Hq / Hkv); "
            f"got Hq={sizes.q_heads}, Hkv={sizes.kv_heads}",
        )
    said = spec.heads
    if said is not None and (said.q, said.kv) != (sizes.q_heads, sizes.kv_heads):
        raise ShapeError("heads", f"the spec says {said!r}, the tensors have Hq={sizes.q_heads}, Hkv={sizes.kv_heads}")


def _integers(name: str, value: object, dims: str) -> Tensor:
    x = _tensor(name, value)
    if x.dtype not in INTEGERS:
        raise DtypeError(name, f"expected int32 or int64 {dims}, got {x.dtype}")
    _shape(name, x, dims)
    if name.startswith("cu_") and x.shape[0] < 1:
        raise ShapeError(name, f"expected {dims} with at least one entry, got {list(x.shape)}")
    return x


def _broadcast(name: str, x: Tensor, dims: str, want: tuple[int, ...]) -> None:
    """Right-aligned broadcast of x to `want`; fewer dimensions are fine."""
    fits = x.dim() <= len(want) and all(
        have in (1, size) for have, size in zip(reversed(x.shape), reversed(want), strict=False)
    )
    if not fits:
        raise ShapeError(name, f"expected a shape that broadcasts to {dims} = {list(want)}, got {list(x.shape)}")


def _check_one(spec: AttentionSpec, s: Sizes, name: str, x: Tensor, q: Tensor) -> None:
    """Dtype and shape of one named tensor."""
    batch = (s.batch,)
    if name in ("kv_lengths", "prefix_lengths", "query_offset", "seqused_k"):
        _equal(name, "[B]", _integers(name, x, "[B]"), batch, "the batch")
    elif name in ("cu_seqlens_q", "cu_seqlens_k"):
        _equal(name, "[B + 1]", x, (s.batch + 1,), "the batch of cu_seqlens_q")
    elif name == "block_table":
        _equal(name, "[B, pages of a sequence]", x, (s.batch, x.shape[1]), "the batch")
    elif name in ("attn_mask", "global_mask", "block_mask"):
        if x.dtype != torch.bool:
            hint = "; an additive mask is bias=" if name == "attn_mask" and x.dtype.is_floating_point else ""
            raise DtypeError(name, f"expected bool (True = may attend), got {x.dtype}{hint}")
        if name == "attn_mask":
            _broadcast(name, x, "[B, Hq, Sq, Skv]", (s.batch, s.q_heads, s.sq, s.skv))
        elif name == "global_mask":
            _shape(name, x, "[B, Skv]")
            _equal(name, "[B, Skv]", x, (s.batch, s.skv), "k")
        else:
            assert isinstance(spec.sparsity, Blocks)
            blocks = (-(-s.sq // spec.sparsity.block_q), -(-s.skv // spec.sparsity.block_kv))
            _shape(name, x, "[B or 1, Hq or 1, nQ, nKV]")
            if tuple(x.shape[2:]) != blocks:
                raise ShapeError(
                    name,
                    f"expected [B or 1, Hq or 1, nQ, nKV] with nQ, nKV = {list(blocks)}, got {list(x.shape)}",
                )
            _broadcast(name, x, "[B, Hq, nQ, nKV]", (s.batch, s.q_heads, *blocks))
    elif name == "document_ids":
        if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
            raise DtypeError(name, f"expected an integer dtype, got {x.dtype}")
        _shape(name, x, "[B, Skv]")
        _equal(name, "[B, Skv]", x, (s.batch, s.skv), "k")
    else:
        _check_float(spec, s, name, x, q)


def _check_float(spec: AttentionSpec, s: Sizes, name: str, x: Tensor, q: Tensor) -> None:
    exact = name in ("bias", "score_weight") and q.dtype not in FLOAT8
    allowed = (q.dtype, torch.float32) if exact else (q.dtype, *FLOATS)
    if x.dtype not in allowed or x.dtype in FLOAT8:
        want = " or ".join(sorted({str(d) for d in allowed if d not in FLOAT8}))
        raise DtypeError(name, f"expected {want}, got {x.dtype}")
    if name == "bias":
        _broadcast(name, x, "[B, Hq, Sq, Skv]", (s.batch, s.q_heads, s.sq, s.skv))
    elif name == "sinks":
        _shape(name, x, "[Hq]")
        _equal(name, "[Hq]", x, (s.q_heads,), "q")
    elif name == "alibi_slopes":
        if x.dim() not in (1, 2) or tuple(x.shape) not in (
            (s.q_heads,),
            (s.batch, s.q_heads),
            (1, s.q_heads),
        ):
            raise ShapeError(
                name,
                f"expected [Hq] = [{s.q_heads}] or [B, Hq] = [{s.batch}, {s.q_heads}], got {list(x.shape)}",
            )
    elif name == "score_weight":
        tail = (s.head_dim, s.head_dim_k) if isinstance(spec.score, General) else (s.head_dim,)
        dims = "[Hq or 1, Dq, Dk]" if len(tail) == 2 else "[Hq or 1, D]"
        _shape(name, x, dims)
        if x.shape[0] not in (1, s.q_heads) or tuple(x.shape[1:]) != tail:
            raise ShapeError(
                name,
                f"expected {dims} = [{s.q_heads} or 1, {', '.join(map(str, tail))}], got {list(x.shape)}",
            )
    else:
        _check_descale(spec, s, name, x)


def _check_descale(spec: AttentionSpec, s: Sizes, name: str, x: Tensor) -> None:
    scaling = spec.dtype.scaling
    if scaling == "tensor":
        if x.numel() != 1 or x.dim() > 3:
            raise ShapeError(name, f"scaling='tensor' expects one value, got {list(x.shape)}")
    elif scaling == "head" or name == "q_descale":
        _broadcast(name, x, "[B, Hkv]", (s.batch, s.kv_heads))
        _shape(name, x, "[B, Hkv]")
    else:
        _shape(name, x, "[B, Hkv, N]")
        _broadcast(name, x, "[B, Hkv, N]", (s.batch, s.kv_heads, x.shape[-1]))


def _only_bounded(spec: AttentionSpec, tensors: Mapping[str, Any]) -> bool:
    """Is skv but the bound T, since the longest packed sequence is neither said nor readable?"""
    if spec.layout != "thd" or spec.page_size is not None or tensors.get("max_seqlen_k") is not None:
        return False
    return not readable(tensors["cu_seqlens_k"])


def check_blocks(spec: AttentionSpec, skv: int, tensors: Mapping[str, Any]) -> None:
    """Raise ShapeError where descales of scaling="block", of checked rank, do not cut skv keys into blocks."""
    if spec.dtype.scaling != "block":
        return
    for name in ("k_descale", "v_descale"):
        if tensors.get(name) is None:
            continue
        count = tensors[name].shape[-1]
        block = spec.page_size or block_of(skv, count)
        if -(-skv // block) != count:
            raise ShapeError(
                name,
                "expected N = ceil(Skv / block) scales, where a block is a page or a power of two keys; "
                f"N={count} cuts Skv={skv} into no such blocks",
            )


def block_of(skv: int, count: int) -> int:
    """Keys a scale under scaling='block': the smallest power of two that covers `skv` with `count` blocks."""
    return 1 << max(-(-skv // max(count, 1)) - 1, 0).bit_length()
