"""AttentionSpec is data: frozen, hashable, equal by value, the same after JSON, pickle and in another process."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

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


def refused(**fields: Any) -> str:
    """What is said of the fields: the same however they come."""
    said = set()
    for make in (
        lambda: AttentionSpec(**fields),
        lambda: AttentionSpec.model_validate(fields),
        lambda: AttentionSpec.model_validate_json(json.dumps(fields)),
    ):
        with pytest.raises(SpecError) as caught:
            make()
        said.add(str(caught.value))
    [text] = said
    return text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"softcap": -1.0}, "softcap: expected 0 (off) or 2**-126 .. 1e38, which float32 holds, got -1.0"),
        ({"softcap": True}, "softcap: expected a number, got a bool (got True)"),
        ({"bias": 3}, "bias: expected True or False, got 3"),
        ({"heads": 3}, "heads: Input should be a valid dictionary or instance of HeadGrouping (got 3)"),
        (
            {"heads": {"q": 3, "kv": 2}},
            "heads: HeadGrouping: q=3 query heads do not divide evenly over kv=2 heads (got {'q': 3, 'kv': 2})",
        ),
        (
            {"heads": {"q": 1, "k": 1, "kv": 1}},
            "heads: HeadGrouping: k: no such field; HeadGrouping has q, kv (got {'q': 1, 'k': 1, 'kv': 1})",
        ),
        ({"mask": 3}, "mask: expected a mask expression such as masks.Causal(), got 3"),
        ({"score": {}, "bias": 4}, "score: unknown kind None; known: "),
    ],
    ids=lambda x: str(x)[:24],
)
def test_an_error_names_the_field_and_the_value_once(fields: dict[str, Any], text: str) -> None:
    said = refused(**fields)
    assert said.startswith(f"AttentionSpec: {text}")
    assert said.count("AttentionSpec: ") == 1
    if "score" in fields:
        assert said.endswith("; bias: expected True or False, got 4")
    else:
        assert said == f"AttentionSpec: {text}"


def test_a_part_of_a_spec_names_itself_once() -> None:
    with pytest.raises(SpecError) as caught:
        Precision(rotate=True, kv="int8")
    assert str(caught.value).startswith("Precision: rotate=True rotates q and k")
    assert str(caught.value).endswith("and leave rotate out")
