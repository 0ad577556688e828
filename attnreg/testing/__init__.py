"""The kit that proves a backend right: oracle, inputs, gate, the public table of problems, a conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnreg.testing.candidate import GateResult, check_candidate
from attnreg.testing.gate import check_backend, check_inputs
from attnreg.testing.inputs import FLAVOURS, Inputs, make_inputs
from attnreg.testing.oracle import oracle
from attnreg.testing.problems import Case, cases

if TYPE_CHECKING:
    from attnreg.testing.conformance import BackendConformance

__all__ = [
    "FLAVOURS",
    "BackendConformance",
    "Case",
    "GateResult",
    "Inputs",
    "cases",
    "check_backend",
    "check_candidate",
    "check_inputs",
    "make_inputs",
    "oracle",
]


def __getattr__(name: str) -> Any:
    # pytest is no dependency of attnreg: only whoever asks for the suite needs it.
    if name == "BackendConformance":
        from attnreg.testing.conformance import BackendConformance

        return BackendConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
