"""The kit catches planted faults, each with its reason, and passes a backend without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import planted_faults as planted
import pytest
import torch
from planted_faults import Planted, prepare_right

from attnreg import AttentionSpec, Hardware, Problem, SearchSpace, StaticReport, TensorInfo, masks
from attnreg.hardware import detect
from attnreg.space import Config
from attnreg.testing import (
    BackendConformance,
    Case,
    GateResult,
    cases,
    check_backend,
    check_inputs,
    make_inputs,
    residues,
)
from attnreg.testing.conformance import listed_refusals
from attnreg.testing.gate import bucket_mates
from attnreg.testing.inputs import Flavour, real_problem
from attnreg.testing.poison import fills_memory
from attnreg.testing.second import other_values

GRADS = frozenset({"q", "k", "v"})
HALF = {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
CAUSAL = AttentionSpec(mask=masks.Causal(), return_lse=True)
PLAIN = Problem(CAUSAL, 2, 4, 2, 129, 129, 32, 32, 32, grads=GRADS, square=True)
NO_LSE = replace(PLAIN, spec=AttentionSpec(mask=masks.Causal()))
PADDED = replace(PLAIN, spec=AttentionSpec(mask=masks.Padding() & masks.Causal(), return_lse=True))
BIASED = Problem(
    AttentionSpec(bias=True), 2, 4, 2, 129, 129, 32, 32, 32, grads=GRADS, square=True,
    tensors=(TensorInfo("bias", "float32", (1, 0, 0, 0)),),
)  # fmt: skip

FAULTS = [
    (planted.wrong_grad, PLAIN, "grad of k: error"),
    (planted.no_grad, PLAIN, "grad of v: error"),
    (planted.nan_below_88, PLAIN, "NaN in grad of q"),
    (planted.wrong_at_half_tile, PLAIN, "out: error"),
    (planted.wrong_at_one_length, PLAIN, "another size of the same bucket: out: error"),
    (planted.changes_inputs, PLAIN, "the input q was changed"),
    (planted.touches_inputs, replace(PLAIN, grads=frozenset()), "the input v was written to in place"),
    (planted.unwritten, PLAIN, "unwritten memory or NaN in out"),
    (planted.wrong_dtype, replace(PLAIN, **HALF), "out: expected dtype torch.bfloat16, got torch.float32"),
    (planted.wrong_shape, PLAIN, "out: expected shape [2, 4, 129, 32]"),
    (planted.forgets_lse, PLAIN, "expected (out, lse), got Tensor"),
    (planted.log2_lse, PLAIN, "lse: error"),
    (planted.leaves_a_trace, PADDED, "NaN in out"),
    (planted.reads_behind_lengths, PADDED, "NaN in slots that are not used: unwritten memory or NaN in out"),
    (planted.unwritten_workspace, PLAIN, "the problem itself: unwritten memory or NaN in out"),
    (planted.empty_rows_average, PADDED, "rows that attend nothing must be exactly 0"),
    (planted.raises, PLAIN, "raised RuntimeError: no kernel image"),
    (planted.returns_input, replace(PLAIN, q_heads=2), "out shares its memory with v"),
    (
        planted.unrepeatable,
        replace(PLAIN, spec=AttentionSpec(mask=masks.Causal(), deterministic=True)),
        "deterministic=True, but out differs",
    ),
    (planted.one_batch, replace(PLAIN, batch=3), "the problem itself: out: error"),
    (planted.dense_grad, PLAIN, "the problem itself: grad of q: error"),
    (planted.dense_grad_of_lse, PLAIN, "the problem itself: grad of q: error"),
    (planted.no_sums, PLAIN, "the gradients of a sum, of stride 0: grad of q: error"),
    (planted.changes_upstream, PLAIN, "the upstream gradient of out was changed"),
    (planted.one_buffer, replace(PLAIN, grads=frozenset()), "out shares its memory with out of the run before"),
    (planted.remembers_keys, PLAIN, "the problem itself: out: error"),
    (planted.rounded_lse, BIASED, "low: grad of q: error"),
]


@pytest.mark.parametrize(("fault", "problem", "reason"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_gate_names_the_fault(fault: planted.Fault, problem: Problem, reason: str) -> None:
    result = check_backend(Planted(fault), problem, {}, detect(), budget="full")
    assert not result.ok
    assert reason in result.reason
    assert result.case


@pytest.mark.parametrize(("fault", "problem", "reason"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_quick_gate_is_enough(fault: planted.Fault, problem: Problem, reason: str) -> None:
    assert not check_backend(Planted(fault), problem, {}, detect()).ok


@pytest.mark.parametrize("problem", sorted({str(p): p for _, p, _ in FAULTS}.items()), ids=lambda x: x[0][:60])
def test_no_fault_no_failure(problem: tuple[str, Problem]) -> None:
    result = check_backend(Planted(planted.none), problem[1], {}, detect(), budget="full")
    assert result.ok, result.reason
    assert result.error <= result.bound
    assert result.grad_error is None or result.grad_bound is None or result.grad_error <= result.grad_bound
    assert result.checked > 30


def test_a_refusal_fails_the_gate_with_its_reason() -> None:
    result = check_backend(Planted(planted.none, ["no such instruction here"]), PLAIN, {}, detect())
    assert result == GateResult(False, "refused: no such instruction here", float("inf"), case=result.case, checked=0)


def test_a_backend_is_asked_about_the_bucket_as_by_a_call() -> None:
    asked: set[Problem] = set()

    class Spy(Planted):
        def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
            asked.add(problem)
            return []

        def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
            asked.add(problem)
            return SearchSpace()

        def prepare(self, problem: Problem, config: Config) -> Callable[..., Any]:
            asked.add(problem)
            return super().prepare(problem, config)

    problem = replace(PLAIN, batch=3, sq=100, skv=100)
    assert check_backend(Spy(planted.none), problem, {}, detect()).ok
    assert problem.bucket() in asked
    assert first_failure(Spy(planted.none), [Case("odd", problem)]) == ""
    assert {p for p in asked if p != p.bucket()} == set()


def test_mates_have_another_batch_of_the_same_bucket() -> None:
    for batch, other in ((3, 4), (4, 3), (5, 8), (8, 5)):
        mates = bucket_mates(replace(PLAIN, batch=batch))
        assert other in {mate.batch for mate in mates}
        assert {mate.bucket() for mate in mates} == {replace(PLAIN, batch=batch).bucket()}
    assert {mate.batch for mate in bucket_mates(PLAIN)} == {2}
    sizes = {"total_q": 260, "total_k": 260, "square": True}
    packed = make_inputs(Problem(AttentionSpec(layout="thd"), 4, 2, 2, 65, 65, 16, 16, 16, **sizes)).problem
    made = [make_inputs(mate).problem for mate in bucket_mates(packed)]
    assert [p.bucket() for p in made] == [packed.bucket()] * len(made)
    assert {p.batch for p in made} == {3, 4}


def test_inputs_hold_what_they_held_after_a_check() -> None:
    inputs = make_inputs(PLAIN, "strided")
    before = [x.detach().clone() for x in (inputs.q, inputs.k, inputs.v)]
    assert check_inputs(prepare_right(PLAIN), inputs).ok
    assert all(torch.equal(x, old) for x, old in zip((inputs.q, inputs.k, inputs.v), before, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("flavour", ["normal", "expanded", "strided"])
def test_the_second_run_finds_other_values_at_the_same_addresses(dtype: str, flavour: Flavour) -> None:
    x = make_inputs(Problem(AttentionSpec(), 2, 2, 2, 5, 7, 16, 16, 16), flavour)
    whole = [t.to(getattr(torch, dtype)) if flavour == "normal" else t for t in (x.q, x.k, x.v)]
    inputs = replace(x, q=whole[0], k=whole[1], v=whole[2])
    before = [t.double() for t in whole]
    with other_values(inputs, ("q", "k", "v")):
        for t, old in zip(whole, before, strict=True):
            assert not torch.equal(t.double(), old)
            assert torch.equal(t.double().sort(-1).values, old.sort(-1).values)
    assert all(torch.equal(t.double(), old) for t, old in zip(whole, before, strict=True))


def test_a_large_problem_is_sampled_and_still_caught() -> None:
    large = replace(PLAIN, batch=1, q_heads=2, kv_heads=1, sq=900, skv=900)
    assert check_backend(Planted(planted.none), large, {}, detect()).ok
    assert not check_backend(Planted(planted.wrong_grad), large, {}, detect()).ok


def first_failure(backend: Planted, chosen: list[Case]) -> str:
    """Run the suite as pytest would, up to the first test that fails; its message, empty if none does."""

    class Suite(BackendConformance):
        pass

    Suite.backend, Suite.cases = backend, chosen
    for case in chosen:
        suite = Suite()
        for test in (suite.test_case, suite.test_configurations, suite.test_bucket, suite.test_gradients_of_a_sum):
            try:
                test(case)
            except (pytest.fail.Exception, AssertionError) as error:
                return str(error) or "failed"
    return ""


FEW = [
    c
    for c in cases()
    if c.name.startswith(
        ("causal/normal", "causal/low", "padding/huge", "padding/empty", "padding/unused", "deterministic/normal")
    )
    or c.name in ("causal/length_192_192x192/float16", "causal/large_127x127/float32")
]


@pytest.mark.parametrize("fault", [f for f, _, _ in FAULTS], ids=lambda f: f.__name__)
def test_the_suite_fails_every_fault(fault: planted.Fault) -> None:
    chosen = FEW
    if fault is planted.returns_input:
        one = Problem(AttentionSpec(), 2, 2, 2, 1, 1, 32, 32, 32, square=True)
        chosen = [Case("one_key", one)]
    elif fault is planted.one_batch:
        chosen = [c for c in cases() if c.name == "mqa/normal_129x129/float32"]
    elif fault is planted.one_buffer:  # it has no gradient, and that is not what it is about
        chosen = [c.bare() for c in FEW]
    assert first_failure(Planted(fault), chosen)


def test_the_suite_passes_a_right_backend() -> None:
    assert not first_failure(Planted(planted.none), FEW)


def test_a_refusal_passes_and_is_listed_but_must_be_a_sentence() -> None:
    assert not first_failure(Planted(planted.wrong_grad, ["the device lacks fused multiply-add"]), FEW[:2])
    assert list(listed_refusals()["planted_wrong_grad"].values()) == [["the device lacks fused multiply-add"]] * 2
    assert first_failure(Planted(planted.none, ["no"]), FEW[:1])
    del_all()


def test_a_backend_that_refuses_everything_fails() -> None:
    class Suite(BackendConformance):
        backend = Planted(planted.none, ["it is Sunday today"])
        cases = FEW[:3]

    with pytest.raises(AssertionError, match="refuses every case"):
        Suite().test_refusals()
    del_all()


def del_all() -> None:
    """Planted refusals have no place in the run's own summary."""
    from attnreg.testing import conformance

    for name in [name for name in conformance._refusals if name.startswith("planted")]:
        del conformance._refusals[name]


def raising(*_: Any) -> Any:
    raise RuntimeError("no such kernel")


def report(**fields: Any) -> Callable[..., StaticReport]:
    return lambda problem, config, target: StaticReport(**{"target": target, **fields})


_counter = iter(range(1 << 30))
TELLING = [
    ("version_for", lambda *_: "2", ""),
    ("version_for", lambda *_: 2, "version_for.* a text that records can name, got 2"),
    ("version_for", lambda *_: "", "version_for.* a text that records can name, got ''"),
    ("version_for", lambda *_: str(next(_counter)), "every record would be stale"),
    ("version_for", raising, "no such kernel"),
    ("estimate", lambda *_: 1e-3, ""),
    ("estimate", lambda *_: "fast", "estimate.* returns seconds, .* got 'fast'"),
    ("estimate", lambda *_: float("nan"), "estimate.* returns seconds, .* got nan"),
    ("estimate", lambda *_: 0.0, r"estimate.* returns seconds, .* got 0\.0"),
    ("estimate", raising, "no such kernel"),
    ("foresee", lambda *_: 1e-3, ""),
    ("foresee", lambda *_: None, "foresee.* returns seconds, .* got None"),
    ("foresee", lambda *_: float("inf"), "foresee.* returns seconds, .* got inf"),
    ("foresee", raising, "no such kernel"),
    ("cross_compile", report(registers=9, seconds=1e-3), ""),
    ("cross_compile", report(refused="spills", culprit={"rows": 16}), ""),
    ("cross_compile", lambda *_: None, ""),
    ("cross_compile", lambda *_: {"registers": 9}, "returns a StaticReport or None, got {'registers': 9}"),
    ("cross_compile", report(target="sm_80"), "for 'sm_90' returns a report of 'sm_80'"),
    ("cross_compile", report(spills=-1), "0 or more, got {'spills': -1}"),
    ("cross_compile", report(seconds=-1.0), "returns seconds, .* got -1.0"),
    ("cross_compile", report(refused="spills", culprit={"rows": 64}), "culprit: .* got {'rows': 64}"),
    ("cross_compile", raising, "no such kernel"),
]


@pytest.mark.parametrize(("method", "told", "reason"), TELLING)
def test_what_optional_methods_return_is_looked_at(
    method: str, told: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = Planted(planted.none)
    backend.space = lambda *_: SearchSpace({"rows": (16, 64)})  # type: ignore[method-assign]  # one with a choice
    asked: list[Problem] = []

    def noted(problem: Problem, *more: Any) -> Any:
        asked.append(problem)
        return told(problem, *more)

    setattr(backend, method, noted)

    class Suite(BackendConformance):
        cases = FEW[:2]

    Suite.backend = backend  # type: ignore[assignment]  # its space is one
    if reason:
        with pytest.raises((AssertionError, RuntimeError), match=reason):
            ask(Suite())
    else:
        ask(Suite())
    assert asked
    assert all(problem == problem.bucket() for problem in asked)
    assert {problem.device for problem in asked} == {"cuda" if method in ("foresee", "cross_compile") else "cpu"}


def ask(suite: BackendConformance) -> None:
    """The suite's tests of optional methods."""
    suite.test_static_methods()
    for case in suite.cases:
        suite.test_version_and_estimate(case)


def test_a_target_that_is_refused_is_not_compiled_for() -> None:
    class Suite(BackendConformance):
        backend = Planted(planted.none, ["no such device here"])
        cases = FEW[:2]

    Suite.backend.cross_compile = raising  # type: ignore[attr-defined]  # optional
    Suite().test_static_methods()


@pytest.mark.parametrize("case", [case for case in cases() if case.flavour == "normal"], ids=str)
def test_the_real_problem_is_that_of_the_inputs(case: Case) -> None:
    assert real_problem(case.problem) == make_inputs(case.problem).problem


def test_positions_that_nothing_reads_are_in_the_table() -> None:
    """align="offset" brings query_offset to a mask that asks for no position: backends that forget it break."""
    given = [case for case in cases() if case.spec == AttentionSpec(align="offset", return_lse=True)]
    assert {"normal", "empty", "huge", "low"} <= {case.flavour for case in given}
    right = prepare_right(given[0].inputs().problem)

    def forgets(q, k, v):  # type: ignore[no-untyped-def]
        raise AssertionError

    assert check_inputs(right, given[0].inputs()).ok
    assert "query_offset" in check_inputs(forgets, given[0].inputs()).reason


def test_dropout_is_read_off_the_candidate() -> None:
    case = next(c for c in cases() if c.name.startswith("dropout/normal_65x65/float32"))
    inputs = case.inputs()
    right = prepare_right(inputs.problem)
    assert check_inputs(right, inputs).ok

    def ignores(q, k, v, generator, **tensors):  # type: ignore[no-untyped-def]
        return right(q, k, v, generator=generator.manual_seed(1), **tensors)

    def never_drops(q, k, v, generator, **tensors):  # type: ignore[no-untyped-def]
        return prepare_right(replace(inputs.problem, spec=AttentionSpec(mask=masks.Causal())))(q, k, v)

    def unseeded(q, k, v, generator, **tensors):  # type: ignore[no-untyped-def]
        generator.seed()
        return right(q, k, v, generator=generator)

    assert "under another generator seed" in check_inputs(ignores, inputs).reason
    assert "expected 0.7500" in check_inputs(never_drops, inputs).reason
    assert "does not repeat" in check_inputs(unseeded, inputs).reason


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (planted.reads_past_operators, "it read past their operators"),
        (planted.forgets_fakes, "of FakeTensors it gave"),
        (planted.reads_bits, "negative bit"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_kinds_of_tensors_taken_wrongly_fail(fault: Any, said: str) -> None:
    suite = type("Suite", (BackendConformance,), {"backend": planted.Kinds(fault)})()
    case = Case("plain", NO_LSE, "normal", frozenset({"core"}))
    with pytest.raises(AssertionError, match=said):
        suite.test_kinds_of_tensors(case)


def test_kinds_of_tensors_taken_rightly_pass() -> None:
    suite = type(
        "Suite", (BackendConformance,), {"backend": planted.Kinds(lambda right, traced, q, k, v: right(q, k, v))}
    )()
    suite.test_kinds_of_tensors(Case("plain", NO_LSE, "normal", frozenset({"core"})))


def test_unwritten_memory_is_found_every_time() -> None:
    """Also in the quick gate, which leaves torch's own filling off, and in buffers of native code."""
    assert fills_memory()
    inputs = make_inputs(replace(PLAIN, sq=20, skv=20))
    for fault in (planted.unwritten, planted.unwritten_workspace):
        run = Planted(fault).prepare(inputs.problem, {})
        for _ in range(20):
            result = check_inputs(run, inputs, poison=False)
            assert not result.ok
            assert "unwritten memory or NaN in out" in result.reason


def test_the_table_covers_every_pair_of_residues() -> None:
    """The claim is read off the problems of the table, not off what made them."""
    made = [case.problem for case in cases() if case.name.startswith("residue/") and case.problem.grads]
    assert {p.skv % 16 for p in made if p.spec.page_size is None} == set(range(16))
    masks_by = {mask: name for name, mask in residues.MASKS.items()}
    rows = []
    for case, p in zip([c for c in cases() if c.name.startswith("residue/") and c.problem.grads], made, strict=True):
        skv = int(case.name.split("x")[1].split("_")[0])  # of a paged cache, how many keys its pages were made for
        size = p.spec.page_size or 1
        assert p.skv == -(-skv // size) * size
        rows.append({
            "skv": skv, "head_dim": p.head_dim, "sq": p.sq, "group": p.group, "page_size": p.spec.page_size,
            "batch": p.batch, "dtype": p.dtype, "mask": masks_by[p.spec.mask],
        })  # fmt: skip
    assert residues.uncovered(rows) == set()
    assert residues.uncovered(rows[:-1]), "a row that adds nothing"


@pytest.mark.parametrize("kind", ["forward", "higher"])
def test_derivatives_that_a_backend_claims_are_checked(kind: str) -> None:
    for fault, fails in ((planted.drops_derivatives, True), (planted.none, False)):
        backend = Planted(fault)
        backend.derivatives = frozenset({kind})

        class Suite(BackendConformance):
            pass

        Suite.backend = backend
        case = Case("causal", replace(PLAIN, sq=9, skv=9, head_dim=8, head_dim_k=8, head_dim_v=8))
        if fails:
            with pytest.raises(pytest.fail.Exception, match=r"tangent|gradient of the gradient"):
                Suite().test_derivatives(case)
        else:
            Suite().test_derivatives(case)
