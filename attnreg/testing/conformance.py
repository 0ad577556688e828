"""BackendConformance: the pytest suite that a plugin author runs in three lines.

    from attnreg.testing import BackendConformance

    class TestMine(BackendConformance):
        backend = MyBackend()

Every case of the public table is run and held to the gate's bounds, or refused with reasons; a refusal passes and
is listed: by `pytest -rA`, and by `listed_refusals()` for a terminal summary. pytest is imported here alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from attnreg.backend import Backend
from attnreg.hardware import Hardware, detect
from attnreg.problem import Problem
from attnreg.space import Config
from attnreg.testing.gate import bucket_mates, check_inputs
from attnreg.testing.inputs import Inputs, make_inputs
from attnreg.testing.problems import Case, cases

__all__ = ["BackendConformance", "listed_refusals"]

_refusals: dict[str, dict[str, list[str]]] = {}


def listed_refusals() -> dict[str, dict[str, list[str]]]:
    """What the backends tested in this process refused: backend -> case -> reasons."""
    return {name: dict(sorted(refused.items())) for name, refused in sorted(_refusals.items())}


class BackendConformance:
    """Subclass it in a test module and set `backend`.

    cases: what to run; the table's own unless said otherwise (`cases(slow=True)` is the larger grid). device:
    where the tensors lie. configurations: how many points of the backend's search space, besides its default,
    each core case is run with. poison: fill what torch allocates with NaN in one of the runs; it makes compiled
    backends compile again. Memory that was just freed is filled in any case.
    """

    backend: ClassVar[Backend]
    cases: ClassVar[Sequence[Case]] = ()
    device: ClassVar[str] = "cpu"
    configurations: ClassVar[int] = 2
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
