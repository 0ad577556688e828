"""explain(): what was decided for a call, on what evidence, and why each other backend was not taken."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from attnreg import dispatch, registry
from attnreg.decide import Candidate, Decision
from attnreg.masks import Custom, walk
from attnreg.problem import Problem
from attnreg.spec import AttentionSpec

__all__ = ["Explanation", "Row", "explain", "explain_problem"]


@dataclass(frozen=True)
class Row:
    """One backend in the explanation. verdict: "chosen", "able" or "refused"; time and error as text, "" if unknown."""

    backend: str
    plugin: str
    verdict: str
    time: str
    error: str
    why: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """A decision for people and programs: `print` it, read `.decision`, or take `.to_json()`."""

    problem: Problem
    decision: Decision

    @property
    def backend(self) -> str:
        """The backend that the call uses."""
        return self.decision.backend

    @property
    def source(self) -> str:
        """The rung of the ladder that decided: forced, a record, an estimate, the written order."""
        return self.decision.source

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Each refusing backend's reasons."""
        return {c.name: list(c.reasons) for c in self.decision.candidates if c.reasons}

    def rows(self) -> list[Row]:
        """One row a backend: the chosen one, then those that could, then those that refused."""
        order = {"chosen": 0, "able": 1, "refused": 2}
        return sorted((self._row(c) for c in self.decision.candidates), key=lambda row: order[row.verdict])

    def _row(self, c: Candidate) -> Row:
        chosen = c.name == self.decision.backend
        verdict = "chosen" if chosen else "refused" if c.reasons else "able"
        why = c.reasons or tuple(filter(None, [c.note]))
        if chosen:
            why = (self.decision.why, *why)
        time = "" if c.seconds is None else f"{_seconds(c.seconds)} ({c.origin})"
        return Row(c.name, c.plugin, verdict, time, "" if c.error is None else f"{c.error:.2g}", why)

    def evidence(self) -> list[str]:
        """Lines on the record behind the decision, if there is one."""
        return self.decision.match.evidence() if self.decision.match is not None else []

    def __str__(self) -> str:
        d = self.decision
        config = ", ".join(f"{name}={value}" for name, value in d.config.items()) or "no parameters"
        lines = [
            f"problem   {self.problem}",
            f"bucket    {_sizes(d.problem)}",
            f"hardware  {d.hardware.slug}",
            f"chosen    {d.backend} ({config})",
            f"source    {d.source}: {d.why}",
            *(f"          {line}" for line in self.evidence()),
            "",
        ]
        rows = self.rows()
        wide = max(len(row.backend) for row in rows)
        timed = max(len(row.time) for row in rows)
        for row in rows:
            head = f"  {row.backend:<{wide}}  {row.verdict:<7}  {row.time:<{timed}}"
            why = row.why[1:] if row.verdict == "chosen" else row.why
            lines.append(f"{head}  {why[0]}".rstrip() if why else head.rstrip())
            lines += [f"{'':<{len(head)}}  {line}" for line in why[1:]]
        for failure in registry.current().failures:
            lines.append(f"  plugin {failure.plugin} was set aside at {failure.step}: {failure.reason}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data: problem, decision, one row a backend, plugins that failed."""
        problem: object = str(self.problem)
        if not _has_code(self.problem):
            problem = self.problem.to_json()
        return {
            "problem": problem,
            "hardware": self.decision.hardware.slug,
            "backend": self.decision.backend,
            "config": dict(self.decision.config),
            "source": self.decision.source,
            "why": self.decision.why,
            "evidence": self.evidence(),
            "backends": [asdict(c) for c in self.decision.candidates],
            "failures": [
                {"plugin": f.plugin, "origin": f.origin, "step": f.step, "reason": f.reason}
                for f in registry.current().failures
            ],
        }


def explain(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Explanation:
    """What `attention(spec, q, k, v, **tensors)` runs on, and why; nothing is run. Raises what the call would raise."""
    return Explanation(*dispatch.decision(spec, q, k, v, **tensors))


def explain_problem(problem: Problem) -> Explanation:
    """The same for a problem without its tensors, such as a recorded one."""
    return Explanation(problem, dispatch.decision_of(problem))


def _has_code(problem: Problem) -> bool:
    return any(isinstance(part, Custom) for part in walk(problem.spec.mask))


def _sizes(p: Problem) -> str:
    text = f"B{p.batch} Sq{p.sq} Skv{p.skv}"
    return text + (f" T{p.total_q}/{p.total_k}" if p.total_q or p.total_k else "")


def _seconds(s: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if s >= size:
            return f"{s / size:.3g} {unit}"
    return f"{s * 1e9:.3g} ns"
