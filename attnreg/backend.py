"""Backend: what a plugin implements, and what it may report back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from attnreg.hardware import Hardware
from attnreg.problem import Problem
from attnreg.redaction import redact
from attnreg.space import Config, SearchSpace, Value

__all__ = [
    "Backend",
    "Finding",
    "Prepared",
    "StaticReport",
    "error_text",
    "estimate_seconds",
    "safe_repr",
    "versions_for",
]

UNKNOWN_VERSION = "unknown"

Prepared = Callable[..., Any]
"""`run(q, k, v, **tensors)`: the output, or (out, lse) where the spec says return_lse.

It takes the tensors as the user gave them (spec.layout), must serve every call of the problem's bucket, must not
change its inputs, and must be differentiable in what `problem.grads` names.
"""


@runtime_checkable
class Backend(Protocol):
    """One way to compute attention. A plugin returns instances from the `attnreg_backends` hook.

    name: unique, lower case, such as "triton_flash". version: changes when the kernels change; it is part of
    every record's key, so that a stale measurement is seen.

    Optional attribute: `derivatives`, out of "forward" (tangents of forward mode) and "higher" (gradients of
    gradients). What it leaves out is refused, and a second derivative comes from a backend that has it.

    Optional methods: `version_for(problem, hardware) -> str` (of the kernels that serve the problem, where a change to
    some leaves others as they were: records name it in place of `version`),
    `estimate(problem, hardware) -> float` (seconds, ranks what nobody has measured),
    `cross_compile(problem, config, target) -> StaticReport | None` for a target of `attnreg.targets`, and
    `foresee(problem, config, target) -> float` (modelled seconds without compiling, which orders the compiling).
    """

    name: str
    version: str

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason why the problem cannot be computed exactly as said; empty if it can."""
        ...

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """The configurations to choose from; `SearchSpace()` if there is but one."""
        ...

    def prepare(self, problem: Problem, config: Config) -> Prepared:
        """A callable that serves the problem's whole bucket. May compile; is called once a decision."""
        ...


@dataclass(frozen=True)
class Finding:
    """A line of `attnreg doctor`: what was looked at, whether it is well, and what to do if not."""

    subject: str
    ok: bool
    detail: str
    todo: str = ""


@dataclass(frozen=True)
class StaticReport:
    """What a cross-compiled configuration shows without the hardware.

    registers a thread, spilled bytes, shared memory bytes, occupancy (blocks a multiprocessor), tensor-core
    instruction counts by mnemonic, and the static model's time in seconds. `refused` says why it cannot run;
    empty if it can. culprit: the choices of the configuration that the refusal lies in; others that have them too
    are not compiled. Empty: nothing is concluded.
    """

    target: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    occupancy: float = 0.0
    instructions: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    refused: str = ""
    culprit: Mapping[str, Value] = field(default_factory=dict)


def versions_for(backends: Mapping[str, Backend], problem: Problem, hardware: Hardware) -> dict[str, str]:
    """Backend name -> the version that records of the problem name, sorted by name."""
    return {name: _version_for(backend, problem, hardware) for name, backend in sorted(backends.items())}


def _version_for(backend: Backend, problem: Problem, hardware: Hardware) -> str:
    """The version of the kernels that serve the problem, where the backend tells; else that of the whole."""
    try:
        return str(backend.version_for(problem, hardware))  # type: ignore[attr-defined]  # optional
    except (Exception, SystemExit):
        pass  # it has none, or fails at it
    try:
        return str(backend.version)
    except (Exception, SystemExit):
        return UNKNOWN_VERSION  # so what was recorded of a known one is stale


def estimate_seconds(backend: Backend, problem: Problem, hardware: Hardware) -> float | None:
    """The backend's own cost estimate, or None where it makes none or fails at it."""
    try:
        seconds = float(backend.estimate(problem, hardware))  # type: ignore[attr-defined]  # optional
    except (Exception, SystemExit):
        return None
    return seconds if 0 < seconds < math.inf else None


def error_text(error: BaseException) -> str:
    """Any error's kind and message, passwords hidden: a plugin's whose __str__ raises is its kind alone."""
    kind = type(error).__name__
    try:
        text = str(error).strip()
    except (Exception, SystemExit):
        return kind
    return f"{kind}: {redact(text)}" if text else kind


def safe_repr(value: object) -> str:
    """repr() of anything that a plugin gave: a value whose __repr__ raises is its type's name."""
    try:
        return redact(repr(value))
    except (Exception, SystemExit):
        return f"<{type(value).__name__}>"
