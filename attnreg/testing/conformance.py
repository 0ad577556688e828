"""BackendConformance: the pytest suite that a plugin author runs in three lines.

    from attnreg.testing import BackendConformance

    class TestMine(BackendConformance):
        backend = MyBackend()

Every case of the public table is run and held to the gate's bounds, or refused with reasons; a refusal passes and
is listed: by `pytest -rA`, and by `listed_refusals()` for a terminal summary. pytest is imported here alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar

import pytest

from attnreg import registry, targets
from attnreg.backend import Backend, StaticReport, safe_repr
from attnreg.hardware import Hardware, detect
from attnreg.problem import Problem
from attnreg.space import Config
from attnreg.testing.gate import bucket_mates, check_inputs
from attnreg.testing.inputs import Inputs, make_inputs, real_problem
from attnreg.testing.kinds import traced_fault, traced_problem, upstream_fault
from attnreg.testing.problems import Case, cases
from attnreg.testing.tangents import asking, check_forward, check_higher

__all__ = ["BackendConformance", "listed_refusals"]

FEW = 2
"""Problems that are compiled for each target: each takes a compiler seconds."""

_refusals: dict[str, dict[str, list[str]]] = {}


def listed_refusals() -> dict[str, dict[str, list[str]]]:
    """What the backends tested in this process refused: backend -> case -> reasons."""
    return {name: dict(sorted(refused.items())) for name, refused in sorted(_refusals.items())}


class BackendConformance:
    """Subclass it in a test module and set `backend`.

    cases: what to run; the table's own unless said otherwise (`cases(slow=True)` is the larger grid). device:
    where the tensors lie. configurations: how many points of the backend's search space, besides its default,
    each core case is run with. targets: what `foresee` and `cross_compile`, where the backend has them, are asked
    about. poison: fill what torch allocates with NaN in one of the runs; it makes compiled backends compile again.
    Memory that was just freed is filled in any case.
    """

    backend: ClassVar[Backend]
    cases: ClassVar[Sequence[Case]] = ()
    device: ClassVar[str] = "cpu"
    configurations: ClassVar[int] = 2
    targets: ClassVar[Sequence[str]] = ("sm_90", "gfx942")
    poison: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Parametrise each test by the cases that it is about."""
        if "case" in metafunc.fixturenames:
            core = metafunc.function.__name__ != "test_case"
            everything = list(self._cases())
            # Cases of which none is core stand for themselves: an empty choice would pass unseen, as a skip.
            chosen = [c for c in everything if not core or "core" in c.tags] or everything
            metafunc.parametrize("case", chosen, ids=str)

    @classmethod
    def _cases(cls) -> Sequence[Case]:
        return cls.cases or cases()

    @property
    def hardware(self) -> Hardware:
        """The hardware under test."""
        return detect(self.device)

    def test_case(self, case: Case) -> None:
        """The default configuration is right on the case, or the backend says why it will not run it."""
        inputs = case.inputs(self.device)
        if self._refused(case.name, inputs.problem):
            return
        self._check(self._prepare(inputs.problem), inputs)

    def test_gradients_of_a_sum(self, case: Case) -> None:
        """`out.sum().backward()` gives a gradient of stride 0, and the backend's own are right under it."""
        inputs = case.inputs(self.device)
        if inputs.leaves and not self._refused(case.name, inputs.problem):
            self._check(self._prepare(inputs.problem), inputs, "the gradients of a sum, of stride 0", summed=True)

    def test_configurations(self, case: Case) -> None:
        """Other points of the search space are right too."""
        inputs = case.inputs(self.device)
        if self._refused(case.name, inputs.problem):
            return
        space = self.backend.space(inputs.problem.bucket(), self.hardware)
        assert not space.reasons(space.default), "the default configuration is not in the space"
        draw = random.Random(case.name)
        tried = [dict(space.default)]
        others = [*space.seeds[:1], *(space.sample(draw) for _ in range(self.configurations))]
        for config in others[: self.configurations]:
            if dict(config) not in tried:
                tried.append(dict(config))
                self._check(self._prepare(inputs.problem, config), inputs, f"configuration {dict(config)}")

    def test_bucket(self, case: Case) -> None:
        """One prepared callable serves other sizes of its bucket, in batch and lengths."""
        inputs = case.inputs(self.device)
        if self._refused(case.name, inputs.problem):
            return
        run = self._prepare(inputs.problem)
        bucket = inputs.problem.bucket()
        served = 0
        for n, other in enumerate(bucket_mates(inputs.problem)):
            mate = make_inputs(other, case.flavour, n + 1, self.device)
            if mate.problem.bucket() == bucket:
                served += 1
                self._check(run, mate, "prepared for another size of the same bucket")
        assert served or bucket.sq <= 2, "no other size of the bucket could be made"

    def test_kinds_of_tensors(self, case: Case) -> None:
        """Tensors without memory of their own run through operators; lazy upstream gradients mean what they show."""
        inputs = case.inputs(self.device)
        if self._refused(case.name, inputs.problem):
            return
        fault = upstream_fault(self._prepare(inputs.problem), inputs)
        assert not fault, fault
        traced = traced_problem(inputs.problem)
        if not self.backend.supports(traced.bucket(), self.hardware):
            with self._registered():
                fault = traced_fault(self._prepare(replace(traced, traced=False)), self._prepare(traced), inputs)
            assert not fault, fault

    @contextlib.contextmanager
    def _registered(self) -> Iterator[None]:
        """The backend under its name in the registry, where an operator of attnreg's looks for it."""
        now = registry.current()
        entry = registry.Entry(self.backend, "kit", "attnreg.testing")
        with registry.using(replace(now, entries={**now.entries, self.backend.name: entry})):
            yield

    def test_derivatives(self, case: Case) -> None:
        """Tangents and gradients of gradients are right where the backend says by `derivatives` that it has them."""
        inputs = case.inputs(self.device)
        for kind, check in (("forward", check_forward), ("higher", check_higher)):
            problem = asking(inputs.problem, kind)
            if kind not in getattr(self.backend, "derivatives", ()) or problem.spec.dropout_p or problem.sq > 256:
                continue
            if (kind == "higher" and not problem.grads) or self._refused(case.name, problem):
                continue
            reason = check(self._prepare(problem), inputs)
            if reason:
                pytest.fail(f"{reason}\nderivatives: {kind!r}; {inputs}", pytrace=False)

    def test_version_and_estimate(self, case: Case) -> None:
        """`version_for` and `estimate`, where the backend has them, keep to what they promise."""
        problem = case.inputs(self.device).problem
        if self._refused(case.name, problem):
            return
        asked = problem.bucket(), self.hardware
        version_for, estimate = self._optional("version_for"), self._optional("estimate")
        if version_for is not None:
            version = version_for(*asked)
            text = isinstance(version, str) and version
            assert text, f"version_for() returns a text that records can name, got {safe_repr(version)}"
            again = version_for(*asked)
            assert again == version, f"version_for() returns {version!r}, then {again!r}: every record would be stale"
        if estimate is not None:
            _check_seconds("estimate", estimate(*asked))

    def test_static_methods(self) -> None:
        """`foresee` and `cross_compile`, where the backend has them, keep to what they promise of the default."""
        foresee, cross_compile = self._optional("foresee"), self._optional("cross_compile")
        if os.environ.get("TRITON_INTERPRET") == "1":
            cross_compile = None  # Triton loaded every kernel for its interpreter: none compiles in this process
        if foresee is None and cross_compile is None:
            return
        for target in self.targets:
            for problem in self._served_on(target):
                config = self.backend.space(problem, targets.target(target)).default
                if foresee is not None:
                    _check_seconds("foresee", foresee(problem, dict(config), target))
                if cross_compile is not None:
                    _check_report(cross_compile(problem, dict(config), target), config, target)

    def _optional(self, name: str) -> Callable[..., Any] | None:
        return getattr(self.backend, name, None)

    def _served_on(self, target: str) -> list[Problem]:
        """The first FEW problems that the backend takes on a target: of core cases, else the first of each feature."""
        core = [case for case in self._cases() if "core" in case.tags]
        first = {(case.name.split("/")[0], case.name.endswith("/bare")): case for case in reversed(self._cases())}
        out: list[Problem] = []
        for case in (*core, *reversed(first.values())):
            problem = real_problem(replace(case.problem, device="cuda")).bucket()  # what torch calls HIP devices too
            if not self.backend.supports(problem, targets.target(target)):
                out.append(problem)
            if len(out) == FEW:
                break
        return out

    def test_refusals(self) -> None:
        """Refusals are sentences, and something is not refused."""
        served = 0
        for case in self._cases():
            served += not self._refused(case.name, case.inputs(self.device).problem)
        assert served, f"{self.backend.name} refuses every case of the table: nothing was tested"

    def _refused(self, name: str, problem: Problem) -> bool:
        reasons = self.backend.supports(problem.bucket(), self.hardware)
        assert isinstance(reasons, list), f"supports() returns a list of reasons, got {reasons!r}"
        for reason in reasons:
            sentence = isinstance(reason, str) and len(reason.split()) > 1
            assert sentence, f"a refusal is a sentence that says why, got {reason!r}"
        if reasons:
            _refusals.setdefault(self.backend.name, {})[name] = reasons
            print(f"{self.backend.name} refuses {name}: {'; '.join(reasons)}")
        return bool(reasons)

    def _prepare(self, problem: Problem, config: Config | None = None) -> Callable[..., Any]:
        """As a call would: the backend is asked about the bucket."""
        bucket = problem.bucket()
        chosen = self.backend.space(bucket, self.hardware).default if config is None else config
        return self.backend.prepare(bucket, chosen)

    def _check(self, run: Callable[..., Any], inputs: Inputs, what: str = "", summed: bool = False) -> None:
        result = check_inputs(run, inputs, poison=self.poison, summed=summed)
        if not result.ok:
            pytest.fail(f"{result.reason}\n{what or 'default configuration'}; {inputs}", pytrace=False)


def _check_seconds(method: str, said: Any) -> None:
    number = isinstance(said, Real) and not isinstance(said, bool) and 0 < float(said) < math.inf
    assert number, f"{method}() returns seconds, a finite number above 0, got {safe_repr(said)}"


def _check_report(report: Any, config: Config, target: str) -> None:
    """What static tuning relies on; None says that there is nothing to tell."""
    if report is None:
        return
    assert isinstance(report, StaticReport), f"cross_compile() returns a StaticReport or None, got {safe_repr(report)}"
    assert report.target == target, f"cross_compile() for {target!r} returns a report of {report.target!r}"
    assert isinstance(report.refused, str), f"refused: expected why it cannot run as text, got {report.refused!r}"
    strange = {name: value for name, value in report.culprit.items() if name not in config or config[name] != value}
    assert not strange, f"culprit: expected choices of the configuration, got {strange}"
    sizes = {name: getattr(report, name) for name in ("registers", "spills", "shared", "occupancy")}
    wrong = {name: size for name, size in {**sizes, **report.instructions}.items() if not size >= 0}
    assert not wrong, f"cross_compile() counts what is there, 0 or more, got {wrong}"
    if report.seconds is not None:
        _check_seconds("cross_compile", report.seconds)
