"""Which cases of the public table the interpreted kernels run: few in CI, for each feature; all of them when slow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from attnreg import Backend
from attnreg.hardware import detect
from attnreg.testing import Case

ROTATED = ("empty", "huge", "low")
LENGTHS = ("length_1_", "length_63", "decode_127")
VALUES = ("edges", "strided", "expanded", "large")


def without_gradients(case: Case) -> Case:
    """The case as inference: only so does a backend take it that has no backward pass."""
    return replace(case, problem=replace(case.problem, grads=frozenset()))


def taken(backend: Backend, chosen: Iterable[Case]) -> tuple[Case, ...]:
    """The cases that the backend takes."""
    hardware = detect("cpu")
    return tuple(case for case in chosen if not backend.supports(case.problem, hardware))


def in_float16(case: Case) -> Case:
    """The case in float16, where k and v have q's dtype."""
    problem = case.problem
    if problem.kv_dtype != problem.dtype:
        return case
    name = case.name.replace("/bfloat16", "/float16")
    return replace(case, name=name, problem=replace(problem, dtype="float16", kv_dtype="float16"))


def with_one_kv_head(case: Case) -> Case:
    """The plain case of 4 query heads on 2 KV heads cut to 2 on 1: interpreted kernels take a program a KV head."""
    problem = case.problem
    if (problem.q_heads, problem.kv_heads) != (4, 2) or problem.spec.heads is not None:
        return case
    return replace(case, problem=replace(problem, q_heads=2, kv_heads=1))


def core(chosen: Iterable[Case], *features: str) -> tuple[Case, ...]:
    """The cases, those of `features` in half precision also under other configurations and sizes of their bucket."""
    return tuple(
        replace(case, tags=case.tags | {"core"})
        if case.name.split("/")[0] in features and case.flavour == "normal" and case.problem.dtype != "float32"
        else case
        for case in chosen
    )


def quick(chosen: Iterable[Case]) -> tuple[Case, ...]:
    """Each feature in half precision (bfloat16 and float16 in turn) and, in float32, with one flavour that breaks weak
    kernels; a few odd lengths and strides; and every 16th of the residue classes."""
    out, features, residues = [], [], 0
    for case in chosen:
        feature, what, dtype, *bare = case.name.split("/")
        if bare and feature != "causal":
            continue
        if feature == "residue":
            residues += 1
            if residues % 16 == 1:
                out.append(case)
            continue
        if feature not in features:
            features.append(feature)
        rotated = what.startswith(ROTATED[len(features) % len(ROTATED)]) and dtype == "float32"
        plain = what.startswith("normal") and dtype == "bfloat16"
        length = feature in ("causal", "thd_causal") and what.startswith(LENGTHS)
        values = feature in ("everything", "bias_full") and what.startswith(VALUES)
        if plain:
            out.append(in_float16(case) if feature != "causal" and len(features) % 2 else case)
        elif rotated or length or values:
            # The longer ones; the plain ones tell one KV head from another.
            out.append(with_one_kv_head(case))
    return tuple(out)


def inference(case: Case) -> bool:
    """Paged caches and few queries: what decoding is about."""
    return case.spec.page_size is not None or case.problem.sq <= 8
