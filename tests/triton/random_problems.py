"""Random problems for a backend: each field of the spec drawn by itself, then sizes, tensors and kinds of values."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from attnreg import AttentionSpec, Backend, Precision, Problem, TensorInfo, masks, scores, sparsity
from attnreg.hardware import detect
from attnreg.testing import FLAVOURS, Inputs, make_inputs

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
MOST_TRIES = 200


@dataclass(frozen=True)
class Kind:
    """What a backend is for. band: masks that bounds say. decode: few queries. precision: how it comes to be 8-bit."""

    band: bool = True
    decode: bool = False
    precision: tuple[str, ...] = ()


KINDS = {
    "triton_flash": Kind(),
    "triton_decode": Kind(decode=True),
    "triton_block_sparse": Kind(band=False),
    "triton_fp8": Kind(precision=("compute", "cache", "stored")),
}


def _band(draw: Random) -> masks.Mask:
    return draw.choice([
        masks.Full(), masks.Causal(), masks.Causal(),
        masks.SlidingWindow(draw.choice([0, 1, 5, 17, 40]), draw.choice([0, 3, 20])),
        masks.PrefixLM(), masks.PrefixLM(draw.randrange(90)), masks.Document(), masks.Padding(),
    ])  # fmt: skip


def _any_mask(draw: Random) -> masks.Mask:
    tokens = tuple(sorted(draw.sample(range(80), draw.randrange(4))))
    return draw.choice([
        _band(draw), masks.Chunked(draw.randrange(1, 50)), masks.Dilated(draw.randrange(1, 12), draw.randrange(1, 6)),
        masks.Global(tokens), masks.Global(), masks.Dense(), masks.longformer(draw.randrange(2, 30), (0, 7)),
    ])  # fmt: skip


def mask(draw: Random, band: bool) -> masks.Mask:
    """One to three masks, joined by & where only bounds are wanted, else by any operator."""
    out = _band(draw) if band else _any_mask(draw)
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        if band:
            out = out & _band(draw)
        else:
            other = _any_mask(draw)
            out = draw.choice([out & other, out | other, out & ~other])
    return out


def _pattern(draw: Random) -> Any:
    return draw.choice([
        sparsity.Dense(), sparsity.Dense(), sparsity.Blocks(draw.randrange(1, 40), draw.randrange(1, 40)),
        sparsity.BigBird(draw.randrange(1, 20), random_blocks=draw.randrange(3), seed=draw.randrange(9)),
        sparsity.Strided(draw.randrange(1, 20), draw.randrange(1, 4), draw.randrange(1, 5)),
    ])  # fmt: skip


def spec(draw: Random, kind: Kind, dtype: Precision) -> AttentionSpec:
    """Any spec of the kind."""
    return AttentionSpec(
        mask=mask(draw, kind.band or draw.random() < 0.2),
        sparsity=sparsity.Dense() if kind.band else _pattern(draw),
        score=draw.choice([*[scores.ScaledDot()] * 3, scores.Dot(), scores.ScaledDot(-0.1), scores.ScaledDot(0.0)]),
        layout=draw.choice(["bhsd", "bhsd", "bshd", "thd"]),
        page_size=draw.choice([*[None] * (1 if kind.decode else 3), 1, 8, 16, 24, 32]),
        align=draw.choice([*["bottom_right"] * 3, "top_left", "offset"]),
        softcap=draw.choice([0.0, 0.0, 5.0, 30.0]),
        bias=draw.random() < 0.3,
        alibi=draw.random() < 0.25,
        sinks=draw.random() < 0.3,
        dropout_p=draw.choice([*[0.0] * 8, 0.1, 0.5]),
        return_lse=draw.random() < 0.6,
        deterministic=draw.random() < 0.15,
        dtype=dtype,
    )


def _dtypes(draw: Random, kind: Kind) -> tuple[str, str, Precision]:
    """(dtype of q, dtype of k and v, precision)."""
    wide = draw.choice(["float32", "float16", "bfloat16"])
    if not kind.precision:
        return wide, wide, Precision()
    small, scaling, how = draw.choice(FLOAT8), draw.choice(["tensor", "head", "block"]), draw.choice(kind.precision)
    if how == "compute":
        return wide, wide, Precision(compute=small, scaling=scaling, rotate=draw.random() < 0.5)  # type: ignore[arg-type]
    if how == "cache":
        return wide, small, Precision(kv=small, scaling=scaling)  # type: ignore[arg-type]  # drawn from the choices
    return small, small, Precision(scaling=scaling)  # type: ignore[arg-type]  # drawn from the choices


def _tensors(draw: Random, asked: AttentionSpec, dtype: str) -> tuple[TensorInfo, ...]:
    out = []
    if asked.bias:
        rank = draw.choice([4, 4, 4, 3, 2, 1])
        kind = draw.choice(["float32", "bfloat16" if dtype in FLOAT8 else dtype])
        out.append(TensorInfo("bias", kind, tuple(draw.choice([0, 0, 1]) for _ in range(rank))))
    if asked.page_size is not None and draw.random() < 0.6:
        out.append(TensorInfo("seqused_k", draw.choice(["int32", "int64"]), (0,)))
    if asked.alibi and draw.random() < 0.4:
        out.append(TensorInfo("alibi_slopes", "float32", (0, 0)))
    return tuple(out)


def problem(draw: Random, kind: Kind) -> Problem:
    """Any problem of the kind, whether a backend takes it or not."""
    dtype, stored, precision = _dtypes(draw, kind)
    asked = spec(draw, kind, precision)
    kv_heads, group = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3, 4])
    sq = draw.choice([0, 1, 1, 1, 2, 3, 8, 20] if kind.decode else [0, 1, 1, 2, 5, 17, 33, 64, 65, 70])
    skv = draw.choice([0, 1, 2, 16, 31, 33, 64, 65, 90, 130, *([200, 260] if kind.decode else [])])
    if draw.random() < 0.3:
        skv = sq
    if asked.page_size is not None:
        skv = max(1, -(-skv // asked.page_size)) * asked.page_size
    widths = [1, 8, 16, 20, 24, 32, 64, 64, 80, 96, 128]
    width = draw.choice(widths)
    value = width if draw.random() < 0.6 else draw.choice(widths)
    grads: set[str] = set()
    if not (kind.decode or kind.precision or asked.page_size) and draw.random() < 0.6:
        grads = set("qkv") if draw.random() < 0.7 else set(draw.sample("qkv", draw.randrange(1, 3)))
        grads |= {
            name for name, given in (("bias", asked.bias), ("sinks", asked.sinks)) if given and draw.random() < 0.7
        }
    return Problem(
        asked, draw.choice([1, 2, 2, 3]), kv_heads * group, kv_heads, sq, skv, width, width, value, dtype=dtype,
        kv_dtype=stored, tensors=_tensors(draw, asked, dtype), grads=frozenset(grads), square=sq == skv,
    )  # fmt: skip


def inputs(backend: Backend, draw: Random) -> Inputs:
    """Inputs of the first problem drawn that the backend takes."""
    kind, hardware = KINDS[backend.name], detect("cpu")
    for _ in range(MOST_TRIES):
        try:
            made = make_inputs(problem(draw, kind), draw.choice(FLAVOURS), draw.randrange(1000))
        except ValueError:
            continue  # fields that contradict one another
        if not backend.supports(made.problem, hardware):
            return made
    raise AssertionError(f"{backend.name} takes none of {MOST_TRIES} random problems")
