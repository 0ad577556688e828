"""What the tuner measures, and what measuring says: plain data that crosses the process boundary as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

from attnreg.problem import Problem
from attnreg.records import choice_text

__all__ = ["About", "Bench", "Candidate", "Died", "Opened", "Plan", "Refusal", "Round", "Verdict"]


@dataclass(frozen=True)
class Candidate:
    """A backend with a configuration."""

    backend: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Canonical text; equal candidates have equal keys."""
        return choice_text(self.backend, "", self.config)

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        config = ", ".join(f"{name}={value}" for name, value in self.config.items())
        return f"{self.backend}({config})" if config else self.backend


@dataclass(frozen=True)
class Plan:
    """What to measure, and how.

    cache: "warm": called again and again; "cold": caches flushed before every call. threads: torch's intra-op
    threads, 0 for what the process has. sample_seconds: a sample repeats the call until it takes that long.
    time_limit: seconds that one step (a gate, a preparation) may run before it counts as a hang. memory_limit:
    bytes that the worker may hold, 0 for most of what the machine has free. leak_seconds: how long to call a
    candidate in search of a leak. seed: of inputs and of the order within rounds.
    """

    problem: Problem
    cache: Literal["warm", "cold"] = "warm"
    threads: int = 0
    sample_seconds: float = 2e-3
    time_limit: float = 120.0
    memory_limit: int = 0
    leak_seconds: float = 0.5
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for the worker."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "problem": self.problem.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` described."""
        return Plan(**{**data, "problem": Problem.from_json(data["problem"])})


@dataclass(frozen=True)
class Verdict:
    """The gate's word on a candidate, and whether it could be told at all."""

    ok: bool
    reason: str = ""
    error: float = 0.0
    bound: float = 0.0
    grad_error: float = 0.0
    grad_bound: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Opened:
    """A candidate made ready. seconds: of a call, roughly.

    peak_memory: bytes beyond the inputs while it ran. leak: bytes that each call leaves behind, 0 if it does not.
    given_up: its calls take too long for it to be worth timing; it is not kept ready.
    """

    seconds: float
    peak_memory: int
    leak: int
    given_up: bool = False


@dataclass(frozen=True)
class Round:
    """One sample of each candidate, in seconds a call, taken one right after another.

    quiet: for each, whether the probes around its sample ran at their usual speed.
    """

    seconds: tuple[float, ...]
    quiet: tuple[bool, ...]


@dataclass(frozen=True)
class About:
    """A bench on itself. versions: of the backends it loaded, for its problem. timer: "perf_counter", "cuda_graphs"."""

    versions: Mapping[str, str]
    timer: str


class Refusal(Exception):  # noqa: N818  # a result about a candidate, not an error of this program
    """A candidate raised, or broke the contract; the bench goes on. `candidate`: which one, where it is known."""

    def __init__(self, reason: str, candidate: Candidate | None = None) -> None:
        super().__init__(reason)
        self.candidate = candidate


class Died(Refusal):
    """A candidate took its process with it. kind: "crash", "hang" or "memory"."""

    def __init__(self, kind: str, reason: str, candidate: Candidate | None = None) -> None:
        super().__init__(reason, candidate)
        self.kind = kind


class Bench(Protocol):
    """Gate and clock for the candidates of one plan; in this process or in a worker. A context manager."""

    def __enter__(self) -> Bench: ...

    def __exit__(self, *_: object) -> None: ...

    def about(self) -> About:
        """Which backends it knows, and by what it times."""
        ...

    def gate(self, candidate: Candidate, budget: Literal["quick", "full"]) -> Verdict:
        """Check against the oracle. Raises Refusal (Died in a worker) where the candidate breaks."""
        ...

    def open(self, candidate: Candidate, give_up: float = 0.0) -> Opened:
        """Prepare, run and watch its memory; no more where calls take over `give_up` seconds. Raises Refusal."""
        ...

    def rounds(self, candidates: list[Candidate], count: int) -> list[Round]:
        """`count` rounds of one sample each, interleaved, order shuffled. Raises Refusal naming the candidate."""
        ...

    def close(self, candidate: Candidate) -> None:
        """Forget a candidate and what it holds."""
        ...
