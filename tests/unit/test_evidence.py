"""combine(): nothing is lost, order does not matter, intervals decide, ties are named."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from records_for_tests import problem, record, rival

from attnreg.errors import RecordError
from attnreg.evidence import combine
from attnreg.records import Policy, Quantiles, Record
from attnreg.records_json import as_evidence, line


def cpu(day: int, ratio: tuple[float, ...], **changes: Any) -> Record:
    """cpu won on that day; sdpa took `ratio` times as long."""
    return record(date=f"2026-11-{day:02}T00:00:00Z", runner_up=rival("sdpa", ratio), **changes)


def sdpa(day: int, ratio: tuple[float, ...], **changes: Any) -> Record:
    """sdpa won on that day; cpu took `ratio` times as long."""
    loser = replace(rival("cpu", ratio), config=record().config)
    base = {"backend": "sdpa", "version": "2.13", "config": {}, "date": f"2026-11-{day:02}T00:00:00Z"}
    return record(**{**base, "runner_up": loser, **changes})


def everything(made: Record) -> set[str]:
    own = as_evidence(replace(made, evidence=()))
    own.pop("ties", None)
    return {json.dumps({k: v for k, v in e.items() if k != "ties"}, sort_keys=True) for e in [own, *made.evidence]}


def test_the_narrow_interval_outweighs_the_wide_one() -> None:
    made = combine([cpu(1, (1.0, 1.02, 1.04)), sdpa(2, (1.08, 1.10, 1.12))])
    assert made.backend == "sdpa"
    made = combine([cpu(1, (1.19, 1.20, 1.21)), sdpa(2, (0.9, 1.02, 1.15))])
    assert made.backend == "cpu"


def test_contradiction_that_no_interval_settles_is_a_tie_broken_by_memory() -> None:
    a, b = cpu(1, (1.0, 1.02, 1.04), peak_memory=100 << 20), sdpa(2, (1.0, 1.02, 1.04), peak_memory=1 << 20)
    made = combine([a, b])
    assert made.backend == "sdpa"
    assert [t.backend for t in made.ties] == ["cpu"]
    made = combine([replace(a, peak_memory=1 << 20), b])
    assert made.backend == "cpu"  # equal memory: by name
    assert [t.backend for t in made.ties] == ["sdpa"]


def test_without_pairs_disjoint_medians_decide() -> None:
    fast, slow = Quantiles.of([1.0e-3, 1.01e-3] * 10), Quantiles.of([1.2e-3, 1.21e-3] * 10)
    made = combine([record(runner_up=None, times=slow), sdpa(2, (), runner_up=None, times=fast)])
    assert made.backend == "sdpa"
    assert made.ties == ()


def test_a_quiet_run_outweighs_a_noisy_one() -> None:
    noisy = Policy(threads=2, noisy=True)
    made = combine([cpu(2, (1.5, 1.6, 1.7), policy=noisy), sdpa(1, (1.02, 1.04, 1.06), policy=Policy(threads=2))])
    assert made.backend == "sdpa"


CASES = [
    cpu(1, (1.05, 1.1, 1.15)),
    sdpa(2, (1.02, 1.04, 1.06)),
    cpu(3, (1.0, 1.01, 1.02), config={"block_q": 128, "pack": False, "kernel": "8x8"}),
    sdpa(4, (0.98, 1.01, 1.04), peak_memory=64 << 20),
]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_order_and_grouping_do_not_matter_and_nothing_is_lost(size: int) -> None:
    for chosen in itertools.combinations(CASES, size):
        want = set().union(*(everything(r) for r in chosen))
        results = set()
        for order in itertools.permutations(chosen):
            at_once = combine(order)
            one_by_one = order[0]
            for other in order[1:]:
                one_by_one = combine([one_by_one, other])
            assert everything(at_once) == everything(one_by_one) == want
            results |= {(at_once.backend, str(at_once.config)), (one_by_one.backend, str(one_by_one.config))}
        assert len(results) == 1


def test_combining_again_changes_nothing() -> None:
    made = combine(CASES)
    assert line(combine([made, made])) == line(made)
    assert line(combine([made, CASES[0]])) == line(made)


def test_records_of_different_things_do_not_combine() -> None:
    for other in (record(problem=problem(sq=513)), record(policy=Policy(cache="cold", threads=2)), record(software={})):
        with pytest.raises(RecordError, match="expected records of one problem"):
            combine([record(), other])


def test_static_records_keep_the_newest_on_top() -> None:
    old, new = (record(origin="static", times=None, static={"registers": n}, date=f"2026-11-0{n}") for n in (1, 2))
    assert combine([new, old]).static == {"registers": 2}
    assert len(combine([new, old]).evidence) == 1
