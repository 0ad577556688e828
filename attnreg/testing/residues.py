"""Problems that cover residues by design: sizes modulo tiles and vectors, in every pair of classes.

Kernels go wrong where a size leaves a certain rest: torch's compiled FlexAttention did where head_dim was 8 or 16 and
the keys 8 modulo 16, which no problem of the older table was. `CLASSES` says which classes there are, with a size that
stands for each; `covering` makes few problems in which every two classes of different kinds meet at least once (a
covering array of strength 2, made greedily), and `residue_rows(slow=True)` the product of keys, head dimensions and
dtypes beside it, with every length modulo 64.

Not covered by design, but by the features of the table: masks other than three, scores, stored precision, layouts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnreg import masks
from attnreg.problem import Problem, TensorInfo
from attnreg.spec import AttentionSpec

__all__ = ["CLASSES", "Row", "covering", "residue_problem", "residue_rows", "uncovered"]

Row = Mapping[str, Any]
"""One choice of every kind of CLASSES."""

KEYS = (64, 33, 18, 67, 52, 21, 102, 7, 40, 57, 74, 27, 12, 61, 94, 63, 1, 24, 72)
"""Each residue modulo 8 and 16, in turn in each quarter of 64; 8 modulo 16 in three of them; one key."""

CLASSES: dict[str, tuple[Any, ...]] = {
    "skv": KEYS,
    # Modulo 32: 8, 16, 24, 0, again 8; an odd one of a vector and more, 4 modulo 8, 2 modulo 4, a single column.
    "head_dim": (8, 16, 24, 32, 40, 19, 12, 10, 1, 64),
    # One row, and rests of 1, 7 and 0 modulo 8, of 8 and 0 modulo 16.
    "sq": (1, 2, 7, 8, 17, 40, 64),
    "group": (1, 2, 3, 5, 8),
    "page_size": (None, 4, 16, 48),
    "batch": (1, 2, 3),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "mask": ("full", "causal", "padding"),
}
"""Kinds of size, and what stands for each class of residues."""

MASKS: dict[str, masks.Mask] = {
    "full": masks.Full(), "causal": masks.Causal(), "padding": masks.Padding() & masks.Causal(),
}  # fmt: skip


@functools.cache
def covering() -> tuple[Row, ...]:
    """Rows in which every two classes of different kinds meet. The same at every call."""
    missing = set(_pairs(CLASSES))
    kinds = list(CLASSES)
    rows: list[Row] = []
    while missing:
        # The pair that is first in order starts a row; the other kinds take what adds most.
        (a, x), (b, y) = min(missing, key=_order)
        row: dict[str, Any] = {a: x, b: y}
        for kind in kinds:
            if kind not in row:
                turn = len(rows)
                choices = [*CLASSES[kind][turn % len(CLASSES[kind]) :], *CLASSES[kind][: turn % len(CLASSES[kind])]]
                row[kind] = max(choices, key=lambda c: sum(_pair(kind, c, k, v) in missing for k, v in row.items()))
        missing -= _met(row)
        rows.append({kind: row[kind] for kind in kinds})
    return tuple(rows)


def uncovered(rows: Sequence[Row]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of classes that meet in none of the rows."""
    met = set().union(*(_met(row) for row in rows)) if rows else set()
    return set(_pairs(CLASSES)) - met


def residue_rows(*, slow: bool = False) -> tuple[Row, ...]:
    """The covering rows; with slow=True the product of all keys modulo 64, head dimensions and dtypes."""
    if not slow:
        return covering()
    lengths = range(1, 65)
    product = itertools.product(lengths, CLASSES["head_dim"], CLASSES["dtype"][:3])
    rest = {kind: CLASSES[kind] for kind in ("sq", "group", "page_size", "batch", "mask")}
    return tuple(
        {"skv": skv, "head_dim": dim, "dtype": dtype, **{kind: of[n % len(of)] for kind, of in rest.items()}}
        for n, (skv, dim, dtype) in enumerate(product)
    )


def residue_problem(row: Row, grads: frozenset[str] = frozenset({"q", "k", "v"})) -> Problem:
    """The Problem of a row. A paged cache has the pages that its keys need; `seqused_k` says how many are used."""
    page, dim = row["page_size"], row["head_dim"]
    spec = AttentionSpec(mask=MASKS[row["mask"]], page_size=page, return_lse=bool(grads))
    skv = row["skv"] if page is None else -(-row["skv"] // page) * page
    kv_heads = 2 if row["group"] < 5 else 1
    return Problem(
        spec, row["batch"], kv_heads * row["group"], kv_heads, row["sq"], skv, dim, dim, dim,
        dtype=row["dtype"], kv_dtype=row["dtype"], grads=grads, square=row["sq"] == skv,
        tensors=(TensorInfo("seqused_k", "int32", (0,)),) if page is not None else (),
    )  # fmt: skip


def _pairs(classes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    for a, b in itertools.combinations(classes, 2):
        for x, y in itertools.product(classes[a], classes[b]):
            yield (a, x), (b, y)


def _pair(a: str, x: Any, b: str, y: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    kinds = list(CLASSES)
    return ((a, x), (b, y)) if kinds.index(a) < kinds.index(b) else ((b, y), (a, x))


def _met(row: Row) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return {_pair(a, row[a], b, row[b]) for a, b in itertools.combinations(CLASSES, 2)}


def _order(pair: tuple[tuple[str, Any], tuple[str, Any]]) -> tuple[int, ...]:
    kinds = list(CLASSES)
    return tuple(n for kind, choice in pair for n in (kinds.index(kind), CLASSES[kind].index(choice)))
