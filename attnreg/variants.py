"""Variants: every kind of attention that the spec can say, how it says it, and which backends run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attnreg import masks, registry, scores, sparsity
from attnreg.decide import WRITTEN_ORDER, reasons_of
from attnreg.hardware import Hardware
from attnreg.problem import Problem
from attnreg.spec import AttentionSpec, Precision
from attnreg.testing import make_inputs

__all__ = ["VARIANTS", "Variant", "markdown", "runners"]


@dataclass(frozen=True)
class Variant:
    """One variant. code: Python that makes `spec`; sizes: what the tensors must be like, as Problem's fields."""

    name: str
    code: str
    spec: AttentionSpec
    sizes: Mapping[str, object]


def _v(name: str, code: str, spec: AttentionSpec, **sizes: object) -> Variant:
    return Variant(name, code, spec, sizes)


_S, _M = AttentionSpec, masks
VARIANTS: tuple[Variant, ...] = (
    _v("Scaled dot-product", "AttentionSpec()", _S()),
    _v("Bahdanau additive", "AttentionSpec(score=scores.Additive())", _S(score=scores.Additive())),
    _v("Luong dot", "AttentionSpec(score=scores.Dot())", _S(score=scores.Dot())),
    _v("Luong general", "AttentionSpec(score=scores.General())", _S(score=scores.General())),
    _v("Causal", "AttentionSpec(mask=masks.Causal())", _S(mask=_M.Causal())),
    _v("Prefix-LM", "AttentionSpec(mask=masks.PrefixLM(128))", _S(mask=_M.PrefixLM(128))),
    _v("Prefix-LM, a prefix a row", "AttentionSpec(mask=masks.PrefixLM())", _S(mask=_M.PrefixLM())),
    _v(
        "Sliding window, causal",
        "AttentionSpec(mask=masks.Causal() & masks.SlidingWindow(63))",
        _S(mask=_M.Causal() & _M.SlidingWindow(63)),
    ),
    _v(
        "Sliding window, both sides",
        "AttentionSpec(mask=masks.SlidingWindow(32, 32))",
        _S(mask=_M.SlidingWindow(32, 32)),
    ),
    _v(
        "Chunked, causal",
        "AttentionSpec(mask=masks.Causal() & masks.Chunked(64))",
        _S(mask=_M.Causal() & _M.Chunked(64)),
    ),
    _v("Dilated", "AttentionSpec(mask=masks.Dilated(window=9, dilation=4))", _S(mask=_M.Dilated(9, 4))),
    _v("Global tokens", "AttentionSpec(mask=masks.Global((0, 1)))", _S(mask=_M.Global((0, 1)))),
    _v("Global tokens at the call", "AttentionSpec(mask=masks.Global())", _S(mask=_M.Global())),
    _v("Longformer", "AttentionSpec(mask=masks.longformer(64, (0,)))", _S(mask=_M.longformer(64, (0,)))),
    _v("BigBird", "AttentionSpec(sparsity=sparsity.BigBird(16))", _S(sparsity=sparsity.BigBird(16))),
    _v("Strided", "AttentionSpec(sparsity=sparsity.Strided(16, 4, 8))", _S(sparsity=sparsity.Strided(16, 4, 8))),
    _v(
        "Block mask at the call",
        "AttentionSpec(sparsity=sparsity.Blocks(32, 32))",
        _S(sparsity=sparsity.Blocks(32, 32)),
    ),
    _v(
        "Document, causal",
        "AttentionSpec(mask=masks.Causal() & masks.Document())",
        _S(mask=_M.Causal() & _M.Document()),
    ),
    _v("Padding", 'AttentionSpec(mask=masks.Padding(), align="top_left")', _S(mask=_M.Padding(), align="top_left")),
    _v("Dense mask", "AttentionSpec(mask=masks.Dense())", _S(mask=_M.Dense())),
    _v("Custom mask", "AttentionSpec(mask=masks.Custom(mask_mod))", _S(mask=_M.Custom(lambda b, h, p, j: j <= p + h))),
    _v(
        "Any union or complement",
        "AttentionSpec(mask=masks.Causal() & ~masks.Dilated(9, 4) | masks.Global((0,)))",
        _S(mask=_M.Causal() & ~_M.Dilated(9, 4) | _M.Global((0,))),
    ),
    _v("GQA", "AttentionSpec(heads=HeadGrouping(q=8, kv=2))", _S(), kv_heads=2),
    _v("MQA", "AttentionSpec(heads=HeadGrouping(q=8, kv=1))", _S(), kv_heads=1),
    _v("MLA shapes, Dv != Dqk", "AttentionSpec(mask=masks.Causal())", _S(mask=_M.Causal()), head_dim_v=32),
    _v("Soft cap", "AttentionSpec(softcap=30.0)", _S(softcap=30.0)),
    _v("Bias", "AttentionSpec(bias=True)", _S(bias=True)),
    _v("ALiBi", "AttentionSpec(mask=masks.Causal(), alibi=True)", _S(mask=_M.Causal(), alibi=True)),
    _v("Attention sinks", "AttentionSpec(mask=masks.Causal(), sinks=True)", _S(mask=_M.Causal(), sinks=True)),
    _v("Dropout", "AttentionSpec(dropout_p=0.1)", _S(dropout_p=0.1)),
    _v("Log-sum-exp", "AttentionSpec(return_lse=True)", _S(return_lse=True)),
    _v(
        "Packed sequences",
        'AttentionSpec(mask=masks.Causal(), layout="thd")',
        _S(mask=_M.Causal(), layout="thd"),
        total_q=300,
        total_k=300,
    ),
    _v("Decode a token", "AttentionSpec(mask=masks.Causal())", _S(mask=_M.Causal()), sq=1),
    _v("Paged KV cache", "AttentionSpec(mask=masks.Causal(), page_size=16)", _S(mask=_M.Causal(), page_size=16), sq=1),
    _v(
        "Query offset",
        'AttentionSpec(mask=masks.Causal(), align="offset")',
        _S(mask=_M.Causal(), align="offset"),
        sq=64,
    ),
    _v(
        "FP8 KV cache",
        'AttentionSpec(mask=masks.Causal(), dtype=Precision(kv="float8_e4m3fn", scaling="head"))',
        _S(mask=_M.Causal(), dtype=Precision(kv="float8_e4m3fn", scaling="head")),
        sq=1,
        kv_dtype="float8_e4m3fn",
    ),
    _v(
        "INT8 KV cache",
        'AttentionSpec(mask=masks.Causal(), dtype=Precision(kv="int8", scaling="head"))',
        _S(mask=_M.Causal(), dtype=Precision(kv="int8", scaling="head")),
        sq=1,
        kv_dtype="int8",
    ),
    _v(
        "FP8 products",
        'AttentionSpec(dtype=Precision(compute="float8_e4m3fn", scaling="block", rotate=True))',
        _S(dtype=Precision(compute="float8_e4m3fn", scaling="block", rotate=True)),
    ),
)


def runners(variant: Variant, hardware: Hardware, *, grad: bool = False) -> list[str]:
    """Backends that run the variant on the hardware, forward or with gradients, at a size that stands for others.

    A CPU computes in float32 here, a GPU in bfloat16.
    """
    problem = _problem(variant, grad)
    if hardware.kind != "cpu":
        kv = problem.kv_dtype if problem.kv_dtype != problem.dtype else "bfloat16"
        problem = replace(problem, device="cuda", dtype="bfloat16", kv_dtype=kv)
    rank = {name: n for n, name in enumerate(WRITTEN_ORDER)}
    entries = registry.current().entries
    able = [n for n, e in entries.items() if not reasons_of(e.backend, problem.bucket(), hardware)]
    return sorted(able, key=lambda n: (rank.get(n, len(rank)), n))


def _problem(variant: Variant, grad: bool) -> Problem:
    """The problem that real tensors of the variant make."""
    sizes: dict[str, object] = {"sq": 256, "kv_heads": 8, "head_dim_v": 64, **variant.sizes}
    sq = sizes.pop("sq")
    told: dict[str, object] = {
        "batch": 2, "q_heads": 8, "sq": sq, "skv": 256, "head_dim": 64, "head_dim_k": 64, "square": sq == 256,
        "grads": frozenset("qkv") if grad and sq != 1 else frozenset(), **sizes,
    }  # fmt: skip
    return make_inputs(Problem(variant.spec, **told)).problem  # type: ignore[arg-type]  # fields by name


def markdown(cpu: Hardware, gpu: Hardware | None) -> str:
    """The README's table: a row a variant; backends of the CPU, and of a GPU target that need not be here."""
    lines = [
        f"| variant | spec | CPU | GPU ({gpu.arch}) |" if gpu else "| variant | spec | CPU |",
        "|---|---|---|---|" if gpu else "|---|---|---|",
    ]
    for variant in VARIANTS:
        cells = [variant.name, f"`{variant.code}`".replace("|", "\\|")]
        cells += [", ".join(runners(variant, hardware)) for hardware in ((cpu, gpu) if gpu else (cpu,))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
