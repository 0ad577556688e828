"""The public table of problems: every feature of the spec, odd lengths, strides, empty rows, adversarial values.

`cases()` is the table that every backend runs; `cases(slow=True)` the larger grid of the same rows. A row is a
feature; the flavours and sizes that it is tried with follow from one rule, `PLAN`. Which residues of sizes it covers
beside that, in pairs, `attnreg.testing.residues` says; which slots hold NaN, `attnreg.testing.unused`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from attnreg import masks as M  # a table reads best with short names
from attnreg import scores, sparsity
from attnreg.problem import DIFFERENTIABLE, Problem, TensorInfo
from attnreg.spec import AttentionSpec, HeadGrouping, Precision
from attnreg.testing.inputs import Flavour, Inputs, make_inputs
from attnreg.testing.residues import Row, residue_problem, residue_rows
from attnreg.testing.unused import has_unused

__all__ = ["Case", "Feature", "cases", "features"]

LENGTHS = (1, 63, 65, 127, 129, 192, 40)


@dataclass(frozen=True)
class Feature:
    """A row of the table: a spec, and what differs from the plain problem.

    sizes: fields of Problem. tensors: dtype and broadcast dimensions of named tensors, where not the defaults.
    tags: cases of "core" rows also run the bucket and configuration tests of the suite; "forward" has no backward pass.
    """

    name: str
    spec: AttentionSpec
    sizes: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorInfo, ...] = ()
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """One problem of the table with the flavour of its inputs. name: unique and stable, feature/what/dtype."""

    name: str
    problem: Problem
    flavour: Flavour = "normal"
    tags: frozenset[str] = frozenset()
    seed: int = 0

    @property
    def spec(self) -> AttentionSpec:
        """What is asked for."""
        return self.problem.spec

    def bare(self) -> Case:
        """The same case with neither gradients nor lse: what a backend that only runs forward can serve."""
        spec = self.spec.model_copy(update={"return_lse": False})
        problem = replace(self.problem, spec=spec, grads=frozenset())
        return replace(self, name=f"{self.name}/bare", problem=problem)

    def inputs(self, device: str | None = None) -> Inputs:
        """The case's tensors: the same at every call."""
        return make_inputs(self.problem, self.flavour, self.seed, device)

    def __str__(self) -> str:
        return self.name


def zigzag(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
    """A mask_mod that no expression says: every third key, shifted by head and batch, within 40 positions."""
    return ((p + j + h + b) % 3 != 0) & (p - j < 40)


def info(name: str, dtype: str, *dims: int) -> TensorInfo:
    """A named tensor; dims: 1 for a broadcast dimension, else 0."""
    return TensorInfo(name, dtype, dims)


def spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**fields)


LSE: dict[str, Any] = {"return_lse": True}
CORE, FORWARD = frozenset({"core"}), frozenset({"forward"})
USED = (info("seqused_k", "int32", 0),)
CAUSAL = M.Causal()


def _masks() -> Iterator[Feature]:
    yield Feature("full", spec(**LSE), tags=CORE)
    yield Feature("causal", spec(mask=CAUSAL, **LSE), tags=CORE)
    yield Feature("window", spec(mask=CAUSAL & M.SlidingWindow(20), **LSE), tags=CORE)
    yield Feature("window_of_one", spec(mask=M.SlidingWindow(0)))
    yield Feature("window_both", spec(mask=M.SlidingWindow(17, 9), **LSE))
    yield Feature("window_right", spec(mask=M.SlidingWindow(0, 33)))
    yield Feature("prefix", spec(mask=M.PrefixLM(37), **LSE))
    yield Feature("prefix_lengths", spec(mask=M.PrefixLM(), **LSE))
    yield Feature("chunked", spec(mask=M.Chunked(24), **LSE))
    yield Feature("chunked_causal", spec(mask=M.Chunked(33) & CAUSAL))
    yield Feature("dilated", spec(mask=M.Dilated(9, 5), **LSE))
    yield Feature("global", spec(mask=M.Global((0, 1, 50)) | M.SlidingWindow(8, 8), **LSE))
    yield Feature("global_mask", spec(mask=M.Global(), **LSE))
    yield Feature("longformer", spec(mask=M.longformer(18, (0, 40))))
    yield Feature("document", spec(mask=M.Document(), **LSE))
    yield Feature("document_causal", spec(mask=M.Document() & CAUSAL, **LSE), tags=CORE)
    yield Feature("padding", spec(mask=M.Padding(), **LSE), tags=CORE)
    yield Feature("padding_causal", spec(mask=M.Padding() & CAUSAL, **LSE))
    yield Feature("padding_top_left", spec(mask=M.Padding() & CAUSAL, align="top_left", **LSE))
    yield Feature("dense", spec(mask=M.Dense(), **LSE))
    yield Feature("dense_heads", spec(mask=M.Dense() & CAUSAL), tensors=(info("attn_mask", "bool", 1, 0, 0, 0),))
    yield Feature("dense_keys", spec(mask=M.Dense()), tensors=(info("attn_mask", "bool", 0, 1, 1, 0),))
    yield Feature("dense_rank_2", spec(mask=M.Dense()), tensors=(info("attn_mask", "bool", 0, 0),))
    yield Feature("custom", spec(mask=M.Custom(zigzag), **LSE))
    yield Feature("not_window", spec(mask=~M.SlidingWindow(12, 12) & CAUSAL, **LSE))
    yield Feature("composed", spec(mask=(CAUSAL & ~M.Dilated(7, 3)) | (M.Global((3,)) & M.Padding()), **LSE))
    yield Feature("band_of_all", spec(mask=CAUSAL & M.SlidingWindow(30) & M.Padding() & M.Document(), **LSE))
    yield Feature("prefix_document", spec(mask=M.PrefixLM() & M.Document() & M.Padding()))


def _sparsity() -> Iterator[Feature]:
    blocks = sparsity.Blocks(16, 32)
    yield Feature("blocks", spec(sparsity=blocks, **LSE))
    yield Feature("blocks_causal", spec(sparsity=sparsity.Blocks(32, 32), mask=CAUSAL, **LSE))
    yield Feature("blocks_batch", spec(sparsity=blocks), tensors=(info("block_mask", "bool", 0, 1, 0, 0),))
    yield Feature("bigbird", spec(sparsity=sparsity.BigBird(16, random_blocks=1, seed=3), **LSE))
    yield Feature("bigbird_causal", spec(sparsity=sparsity.BigBird(8), mask=CAUSAL & M.Padding()))
    yield Feature("strided", spec(sparsity=sparsity.Strided(8, 2, 3), mask=CAUSAL, **LSE))
    yield Feature("strided_full", spec(sparsity=sparsity.Strided(16, 2, 2)))


def _scores() -> Iterator[Feature]:
    general, additive = scores.General(), scores.Additive()
    yield Feature("scale", spec(score=scores.ScaledDot(0.3), mask=CAUSAL))
    yield Feature("scale_negative", spec(score=scores.ScaledDot(-0.2), **LSE))
    yield Feature("scale_zero", spec(score=scores.ScaledDot(0.0), mask=CAUSAL))
    yield Feature("dot", spec(score=scores.Dot(), mask=CAUSAL, **LSE), {"head_dim": 8})
    yield Feature("general", spec(score=general, mask=CAUSAL, **LSE), {"head_dim": 24, "head_dim_k": 40})
    yield Feature("general_shared", spec(score=general), tensors=(info("score_weight", "float32", 1, 0, 0),))
    yield Feature("additive", spec(score=additive, **LSE))
    yield Feature("additive_causal", spec(score=additive, mask=CAUSAL & M.Padding(), **LSE))
    yield Feature("additive_shared", spec(score=additive), tensors=(info("score_weight", "float32", 1, 0),))
    yield Feature("softcap", spec(softcap=15.0, mask=CAUSAL, **LSE))
    yield Feature("bias", spec(bias=True, **LSE))
    for name, dims in {"full": (0, 0, 0, 0), "keys": (1, 1, 1, 0), "batch": (0, 1, 0, 0), "rank_2": (0, 0)}.items():
        yield Feature(f"bias_{name}", spec(bias=True, mask=CAUSAL), tensors=(info("bias", "float32", *dims),))
    yield Feature("alibi", spec(alibi=True, mask=CAUSAL, **LSE))
    yield Feature("alibi_full", spec(alibi=True), tensors=(info("alibi_slopes", "float32", 0, 0),))
    yield Feature("sinks", spec(sinks=True, **LSE), tags=CORE)
    yield Feature("sinks_window", spec(sinks=True, mask=CAUSAL & M.SlidingWindow(16), **LSE))
    yield Feature("everything", spec(sinks=True, alibi=True, bias=True, softcap=20.0, mask=CAUSAL & M.Padding(), **LSE))
    yield Feature("dropout", spec(dropout_p=0.25, mask=CAUSAL), {"batch": 1, "sq": 65, "skv": 65})
    yield Feature("deterministic", spec(mask=CAUSAL, deterministic=True, **LSE))


def _shapes() -> Iterator[Feature]:
    yield Feature("mha", spec(mask=CAUSAL, heads=HeadGrouping(q=3, kv=3)), {"q_heads": 3, "kv_heads": 3})
    yield Feature("mqa", spec(mask=CAUSAL, **LSE), {"batch": 3, "q_heads": 6, "kv_heads": 1}, tags=CORE)
    yield Feature("gqa", spec(mask=CAUSAL, heads=HeadGrouping(q=12, kv=3)), {"q_heads": 12, "kv_heads": 3})
    yield Feature("mla", spec(mask=CAUSAL, **LSE), {"head_dim": 48, "head_dim_v": 32, "kv_heads": 4})
    yield Feature("wide_values", spec(), {"head_dim": 16, "head_dim_v": 72})
    for width in (1, 20, 64, 80, 128, 256):
        yield Feature(f"head_dim_{width}", spec(mask=CAUSAL, **LSE), {"head_dim": width, "sq": 66, "skv": 66})
    for rows in ({"batch": 0}, {"sq": 0}, {"skv": 0}, {"sq": 1, "skv": 1, "batch": 1}):
        name = "_".join(f"{n}_{x}" for n, x in rows.items())
        yield Feature(f"tiny_{name}", spec(**LSE), rows)
    yield Feature("more_queries", spec(mask=CAUSAL, **LSE), {"sq": 130, "skv": 70})
    yield Feature("few_queries", spec(mask=CAUSAL, **LSE), {"batch": 3, "sq": 5, "skv": 200}, tags=CORE)
    yield Feature("top_left", spec(mask=CAUSAL, align="top_left", **LSE))
    yield Feature("offset", spec(mask=CAUSAL & M.SlidingWindow(40), align="offset", **LSE))
    yield Feature("offset_full", spec(align="offset", **LSE))  # positions that nothing reads: to be taken all the same
    for name, mask in {"": M.Full(), "_window": CAUSAL & M.SlidingWindow(50), "_padding": CAUSAL & M.Padding()}.items():
        for skv in (1, 65, 200):
            tags = CORE if skv == 200 and not name else frozenset()
            yield Feature(f"decode{name}_{skv}", spec(mask=mask, **LSE), {"sq": 1, "skv": skv}, tags=tags)
    yield Feature("decode_wide", spec(**LSE), {"sq": 1, "skv": 300, "q_heads": 8, "kv_heads": 1, "head_dim": 64})


def _layouts() -> Iterator[Feature]:
    yield Feature("bshd", spec(layout="bshd", mask=CAUSAL & M.Padding(), **LSE), tags=CORE)
    yield Feature("bshd_bias", spec(layout="bshd", bias=True, sinks=True, **LSE))
    packed = {"batch": 4}
    yield Feature("thd", spec(layout="thd", **LSE), packed)
    yield Feature("thd_causal", spec(layout="thd", mask=CAUSAL, **LSE), packed, tags=CORE)
    yield Feature("thd_window", spec(layout="thd", mask=CAUSAL & M.SlidingWindow(11) & M.Document(), **LSE), packed)
    yield Feature("thd_modified", spec(layout="thd", mask=CAUSAL, alibi=True, softcap=9.0, sinks=True, **LSE), packed)
    yield Feature("thd_bias", spec(layout="thd", bias=True), packed)
    yield Feature("thd_union", spec(layout="thd", mask=M.Global((0,)) | M.SlidingWindow(5), **LSE), packed)
    yield Feature("thd_bigbird", spec(layout="thd", sparsity=sparsity.BigBird(8, random_blocks=1)), packed)
    yield Feature("thd_dense", spec(layout="thd", mask=M.Dense()), packed)
    yield Feature("thd_decode", spec(layout="thd", mask=CAUSAL, **LSE), {"batch": 4, "sq": 1, "skv": 90})
    yield Feature("thd_offset", spec(layout="thd", mask=CAUSAL, align="offset"), packed)
    for layout, size in (("bhsd", 16), ("bshd", 8), ("thd", 16)):
        name = f"paged_{layout}"
        yield Feature(name, spec(layout=layout, page_size=size, mask=CAUSAL, **LSE), tensors=USED, tags=CORE)
        yield Feature(f"{name}_decode", spec(layout=layout, page_size=size, **LSE), {"sq": 1, "skv": 144}, USED)
    yield Feature("paged_all_used", spec(page_size=16, mask=CAUSAL & M.SlidingWindow(30)))
    yield Feature("paged_shared", spec(page_size=32, mask=CAUSAL), {"pages": 5}, USED)
    yield Feature("paged_union", spec(page_size=16, mask=M.Global((0, 9)) | M.SlidingWindow(20)), tensors=USED)
    yield Feature("paged_lengths", spec(page_size=16, mask=M.Padding() & CAUSAL, **LSE))


def _precision() -> Iterator[Feature]:
    for kv in ("int8", "float8_e4m3fn", "float8_e5m2"):
        for scaling in ("tensor", "head", "block"):
            stored = Precision(kv=kv, scaling=scaling)
            sizes = {"kv_dtype": kv}
            yield Feature(f"kv_{kv}_{scaling}", spec(dtype=stored, mask=CAUSAL), sizes, tags=FORWARD)
    paged = Precision(kv="int8", scaling="block")
    yield Feature("kv_paged", spec(dtype=paged, page_size=16, **LSE), {"kv_dtype": "int8"}, USED, FORWARD)
    decode = {"kv_dtype": "float8_e4m3fn", "sq": 1, "skv": 200}
    yield Feature("kv_decode", spec(dtype=Precision(kv="float8_e4m3fn", scaling="head"), **LSE), decode, tags=FORWARD)
    yield Feature("kv_packed", spec(dtype=Precision(kv="int8", scaling="head"), layout="thd"), {"kv_dtype": "int8"},
                  tags=FORWARD)  # fmt: skip
    for compute in ("float8_e4m3fn", "float8_e5m2", "int8"):
        for rotate in (False, True):
            name = f"compute_{compute}{'_rotated' if rotate else ''}"
            yield Feature(name, spec(dtype=Precision(compute=compute, rotate=rotate), mask=CAUSAL))
    for scaling in ("tensor", "head"):
        whole = {"dtype": "float8_e4m3fn", "kv_dtype": "float8_e4m3fn"}
        stored = Precision(scaling=scaling)  # type: ignore[arg-type]  # a loop variable is no literal to mypy
        yield Feature(f"float8_{scaling}", spec(dtype=stored, mask=CAUSAL, **LSE), whole, tags=FORWARD | {"float8"})


@functools.cache
def features() -> tuple[Feature, ...]:
    """Every row."""
    return (*_masks(), *_sparsity(), *_scores(), *_shapes(), *_layouts(), *_precision())


PLAN: tuple[tuple[Flavour, str, int, int], ...] = (
    ("normal", "float32", 129, 129),
    ("empty", "float32", 100, 63),
    ("huge", "float32", 65, 192),
    ("low", "float32", 63, 127),
    ("normal", "bfloat16", 65, 65),
)
"""(flavour, dtype, Sq, Skv) that every feature is tried with."""

GRID: tuple[tuple[Flavour, str, int, int], ...] = (
    ("large", "float32", 127, 127), ("constant", "float32", 64, 257), ("edges", "float32", 65, 65),
    ("expanded", "float32", 33, 65), ("strided", "float32", 65, 129), ("huge", "float16", 130, 192),
    ("normal", "float16", 320, 320), ("large", "bfloat16", 191, 257), ("normal", "float64", 90, 90),
    ("empty", "bfloat16", 192, 65), ("normal", "float32", 513, 777), ("low", "float16", 65, 321),
)  # fmt: skip
"""The larger grid."""


@functools.cache
def cases(*, slow: bool = False) -> tuple[Case, ...]:
    """The table, or with slow=True the larger grid of the same features."""
    plan = GRID if slow else PLAN
    out = [_case(row, flavour, dtype, sq, skv) for row in features() for flavour, dtype, sq, skv in plan]
    if not slow:
        out += _lengths() + _values() + _unused()
        out += [_bare(row) for row in features()]
        out += _residues(residue_rows())
        # Caches are read far more often without gradients than with them.
        paged = [row for row in features() if row.spec.page_size is not None and "forward" not in row.tags]
        more = [replace(_case(row, *how).bare(), tags=row.tags - CORE) for row in paged for how in PLAN]
        # A row that fixes both lengths makes one case of several sizes, which the table may hold already.
        known = {case.name for case in out}
        out += [case for name, case in {case.name: case for case in more}.items() if name not in known]
    names = [case.name for case in out]
    assert len(set(names)) == len(names), "two cases of one name"
    return tuple(out)


def _bare(row: Feature) -> Case:
    """Without gradients other kernels serve; decoding and paging are where it matters most."""
    case = _case(row, "normal", "float32", 67, 130).bare()
    kept = row.name in ("causal", "decode_200", "few_queries", "thd_causal", "paged_bhsd")
    return case if kept else replace(case, tags=case.tags - CORE)


def _lengths() -> list[Case]:
    """Plain and causal attention at every odd length, and a decoding step over it."""
    rows = [row for row in features() if row.name in ("full", "causal", "padding", "thd_causal")]
    out = []
    for row in rows:
        for n, length in enumerate(LENGTHS):
            dtype = ("float32", "float16")[n % 2]
            out.append(_case(row, "normal", dtype, length, length, f"length_{length}"))
            out.append(_case(row, "normal", "float32", 1, length, f"decode_{length}"))
    return out


def _values() -> list[Case]:
    """What adds nothing to most features: values and strides that only some code paths see."""
    plain = ("full", "causal", "window", "bias", "bias_full", "everything", "document_causal", "padding", "mqa", "bshd")
    rows = [
        row for row in features() if row.name in (*plain, "thd_causal", "decode_200", "paged_bhsd", "prefix_lengths")
    ]
    flavours: tuple[Flavour, ...] = ("large", "constant", "edges", "expanded", "strided")
    sizes = {"large": (127, 127), "constant": (64, 130), "edges": (65, 65), "expanded": (33, 65), "strided": (65, 129)}
    out = [_case(row, flavour, "float32", *sizes[flavour]) for row in rows for flavour in flavours]
    out += [_case(row, "normal", "float64", 90, 90) for row in rows]
    out += [_case(row, "huge", "float16", 66, 130) for row in rows]
    return out


def _unused() -> list[Case]:
    """NaN in every slot that is not used, for each feature that can have some."""
    every = [_case(row, "unused", "float32", 67, 130) for row in features()]
    every = [replace(case, tags=case.tags - CORE) for case in every if has_unused(case.problem)]
    inference = ("padding", "decode_padding_65", "paged_bhsd_decode", "paged_lengths", "bshd")
    bare = [case.bare() for case in every if case.name.split("/")[0] in inference]
    half = [_case(row, "unused", "bfloat16", 67, 130) for row in features() if row.name in inference]
    return every + bare + [replace(case, tags=case.tags - CORE) for case in half]


def _residues(rows: tuple[Row, ...]) -> list[Case]:
    """Each row, and as inference those of 8 keys beyond 16 under the head dimensions that are vectors of some kind."""
    out = [Case(_residue_name(row), residue_problem(row), seed=n) for n, row in enumerate(rows)]
    plain = {"page_size": None, "mask": "full", "dtype": "float32", "batch": 2, "group": 2, "sq": 17}
    for n, (skv, width) in enumerate(((40, 8), (24, 16), (57, 19), (72, 64))):
        row = {**plain, "skv": skv, "head_dim": width}
        out.append(Case(f"{_residue_name(row)}/bare", residue_problem(row, frozenset()), seed=n))
    return out


def _residue_name(row: Row) -> str:
    page = "" if row["page_size"] is None else f"_p{row['page_size']}"
    sizes = f"{row['sq']}x{row['skv']}_d{row['head_dim']}_g{row['group']}_b{row['batch']}{page}"
    return f"residue/{row['mask']}_{sizes}/{row['dtype']}"


def _case(row: Feature, flavour: Flavour, dtype: str, sq: int, skv: int, what: str = "") -> Case:
    if "float8" in row.tags:
        dtype = str(row.sizes["dtype"])
    # A length in the case's own name is what it is about; the row's sizes say what the feature needs.
    sizes: dict[str, Any] = {"batch": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 32, "sq": sq, "skv": skv}
    sizes |= {"dtype": dtype, "kv_dtype": dtype} | row.sizes | ({"sq": sq, "skv": skv} if what else {})
    width = sizes["head_dim"]
    sizes = {"head_dim_k": width, "head_dim_v": width} | sizes
    page = row.spec.page_size
    if page is not None:
        sizes["skv"] = -(-sizes["skv"] // page) * page
    leaves: frozenset[str] = frozenset()
    if "forward" not in row.tags:
        leaves = frozenset({"q", "k", "v", *(set(DIFFERENTIABLE) & row.spec.tensors())})
    square = sizes["sq"] == sizes["skv"]
    problem = Problem(row.spec, **sizes, tensors=row.tensors, grads=leaves, square=square)
    name = f"{row.name}/{what or flavour}_{sizes['sq']}x{sizes['skv']}/{dtype}"
    # Every core case is prepared several times over: one dtype is enough, but for the plainest row.
    core = flavour == "normal" and not what and (dtype == "float32" or row.name == "causal")
    return Case(name, problem, flavour, row.tags if core else row.tags - CORE)
