"""AttentionSpec is data: frozen, hashable, equal by value, the same after JSON, pickle and in another process."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from pydantic import ValidationError

from attnreg import AttentionSpec, HeadGrouping, Precision, masks
from attnreg.errors import SpecError
from attnreg.testing.problems import features

SPECS = {row.name: row.spec for row in features() if row.name != "custom"}


@pytest.mark.parametrize("name", SPECS)
def test_json_round_trip(name: str) -> None:
    spec = SPECS[name]
    again = AttentionSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest() == spec.digest()
    short = json.dumps(spec.model_dump(mode="json", exclude_defaults=True))
    assert AttentionSpec.model_validate_json(short) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_different_meanings_differ() -> None:
    distinct = set(SPECS.values())
    assert len({spec.digest() for spec in distinct}) == len(distinct)


def test_a_digest_is_the_same_in_another_process() -> None:
    """Strings hash differently in each process; records and keys must not."""
    spec = SPECS["everything"]
    code = (
        "import sys; from attnreg import AttentionSpec; "
        "print(AttentionSpec.model_validate_json(sys.stdin.read()).digest())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], input=spec.model_dump_json(), capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == spec.digest()


@pytest.mark.parametrize(
    "spec", [AttentionSpec(), HeadGrouping(q=4, kv=2), Precision()], ids=lambda s: type(s).__name__
)
def test_frozen(spec: object) -> None:
    field = next(iter(type(spec).model_fields))  # type: ignore[attr-defined]  # all three are pydantic models
    with pytest.raises((ValidationError, SpecError)):
        setattr(spec, field, None)


def test_a_copy_is_checked() -> None:
    assert AttentionSpec().model_copy(update={"softcap": 3.0}) == AttentionSpec(softcap=3.0)
    with pytest.raises(SpecError, match="softcap"):
        AttentionSpec().model_copy(update={"softcap": -3.0})


def test_a_custom_mask_has_no_json_and_says_so() -> None:
    spec = AttentionSpec(mask=masks.Custom(lambda b, h, p, j: j <= p) & masks.Padding())
    for dump in (spec.model_dump, spec.model_dump_json, spec.digest):
        with pytest.raises(SpecError, match="Python code"):
            dump()


@pytest.mark.parametrize(("q", "kv", "kind"), [(8, 8, "mha"), (8, 2, "gqa"), (8, 1, "mqa"), (1, 1, "mha")])
def test_head_grouping_kind(q: int, kv: int, kind: str) -> None:
    assert HeadGrouping(q=q, kv=kv).kind == kind


def test_composition_flattens_and_forgets_repeats() -> None:
    a, b, c = masks.Causal(), masks.SlidingWindow(3), masks.Padding()
    assert a & (b & c) == (a & b) & c
    assert a & b & a == a & b
    assert (a | a) == a
    assert ~~a == a


def test_names_of_the_tensors_that_a_spec_asks_for() -> None:
    spec = AttentionSpec(mask=masks.Padding() | masks.Global(), bias=True, sinks=True, page_size=16, align="offset")
    assert spec.tensors() == {"kv_lengths", "global_mask", "bias", "sinks", "block_table", "query_offset"}
    packed = AttentionSpec(mask=masks.Document(), layout="thd")
    assert packed.tensors() == {"cu_seqlens_q", "cu_seqlens_k"}


def test_the_repr_is_the_code_that_makes_it() -> None:
    spec = AttentionSpec(mask=masks.Causal() & masks.SlidingWindow(left=4095), softcap=30.0)
    assert repr(spec) == "AttentionSpec(mask=Causal() & SlidingWindow(left=4095, right=0), softcap=30.0)"
