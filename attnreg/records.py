"""Record: one tuning result as frozen data, what identifies it, and what makes it stale."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from attnreg import metadata
from attnreg.errors import RecordError
from attnreg.hardware import Hardware
from attnreg.problem import SIZES, Problem

__all__ = [
    "Gate",
    "Policy",
    "Quantiles",
    "Record",
    "Rival",
    "choice_text",
    "hardware_facts",
    "problem_class",
    "software",
]

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# Not memory: it differs between machines of one class and decides nothing.
_HARDWARE_KEYS = ("kind", "vendor", "model", "arch", "cores", "isa", "caches")
_STALE_HARDWARE = ("arch", "cores", "isa", "caches")


@dataclass(frozen=True)
class Quantiles:
    """What is kept of a sample of times, in seconds: n, and the quantiles at `LEVELS` (0, .1, .25, .5, .75, .9, 1)."""

    n: int
    values: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[float]) -> Quantiles:
        """Quantiles by linear interpolation. Raises RecordError for an empty sample."""
        if not samples:
            raise RecordError("quantiles: expected at least one sample, got none")
        ordered = sorted(samples)
        out = []
        for level in LEVELS:
            at = level * (len(ordered) - 1)
            low = int(at)
            high = min(low + 1, len(ordered) - 1)
            out.append(float(f"{ordered[low] + (ordered[high] - ordered[low]) * (at - low):.6g}"))
        return Quantiles(len(ordered), tuple(out))

    @property
    def median(self) -> float:
        """The middle of the sample, in seconds."""
        return self.values[3]

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.values[4] - self.values[2]) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Rival:
    """Another candidate of the same run: how its time compares with the winner's.

    ratio: (low, estimate, high) of its time over the winner's, paired by round; above 1 is slower. Empty where
    the two never ran in the same rounds. seconds: its own median.
    """

    backend: str
    version: str
    config: Mapping[str, Any]
    seconds: float
    ratio: tuple[float, ...] = ()


@dataclass(frozen=True)
class Gate:
    """Errors against the float64 oracle, and the bounds they passed under. grad_* are 0 without gradients."""

    error: float
    bound: float
    grad_error: float = 0.0
    grad_bound: float = 0.0


@dataclass(frozen=True)
class Policy:
    """How the times were taken; cache, and grad through the problem, are part of the key.

    cache: "warm" (called again and again) or "cold" (caches flushed before each call). threads: torch's
    intra-op threads. confidence: of every interval. noisy: the probes said that the machine was disturbed.
    """

    cache: Literal["warm", "cold"] = "warm"
    threads: int = 1
    confidence: float = 0.99
    timer: str = "perf_counter"
    rounds: int = 0
    dropped: int = 0
    noisy: bool = False


@dataclass(frozen=True)
class Record:
    """One tuned problem on one class of machine. See docs/tuning.md for the line's fields.

    times: the winner's sample; None for `static` records, whose `static` holds what the binary shows.
    ties: candidates that could not be told from the winner. refused: [backend, how many configurations, the
    first reason]. peak_memory: bytes beyond the inputs. trials: configurations looked at. evidence: what other
    records of the same identity said, oldest first, kept so that a merge drops nothing.
    """

    problem: Problem
    backend: str
    version: str
    config: Mapping[str, Any]
    hardware: Mapping[str, Any]
    software: Mapping[str, Any]
    date: str
    origin: Literal["measured", "static"] = "measured"
    policy: Policy = Policy()
    times: Quantiles | None = None
    gate: Gate | None = None
    runner_up: Rival | None = None
    ties: tuple[Rival, ...] = ()
    refused: tuple[tuple[str, int, str], ...] = ()
    peak_memory: int = 0
    trials: int = 0
    static: Mapping[str, Any] = field(default_factory=dict)
    evidence: tuple[Mapping[str, Any], ...] = ()

    @property
    def slug(self) -> str:
        """The hardware's folder name."""
        return str(self.hardware["slug"])

    @functools.cached_property
    def identity(self) -> str:
        """Records of one identity say something of the same thing in the same circumstances: they can be merged."""
        parts = [self.origin, self.slug, self.policy.cache, self.policy.threads, self.problem.key()]
        return json.dumps([*parts, dict(self.hardware), dict(self.software)], sort_keys=True, separators=(",", ":"))

    @property
    def seconds(self) -> float | None:
        """The median of the times; a static record's modelled time; None where there is neither."""
        if self.times is not None:
            return self.times.median
        modelled = self.static.get("seconds")
        return float(modelled) if isinstance(modelled, (int, float)) else None

    @property
    def error(self) -> float | None:
        """The largest error that the gate saw, against the float64 oracle; None where it did not run."""
        return self.gate.error if self.gate is not None else None

    @property
    def passed(self) -> bool:
        """May it decide: is it static, or did its winner pass the gate? A record without a gate passed none."""
        if self.origin == "static":
            return True
        gate = self.gate
        return gate is not None and gate.error <= gate.bound and gate.grad_error <= gate.grad_bound

    @property
    def choice(self) -> str:
        """What the record chose, as text: backend, version and configuration."""
        return choice_text(self.backend, self.version, self.config)

    def stale(self, hardware: Hardware, versions: Mapping[str, str], threads: int | None = None) -> tuple[str, ...]:
        """What differs between the record's circumstances and today's, one field each; empty if the record is fresh.

        versions: backend name -> version, as loaded now. threads: torch's, now.
        """
        out = _differences(self.hardware, hardware_facts(hardware), _STALE_HARDWARE)
        out += _differences(self.software, software(), sorted(software()))
        measured = {self.backend: self.version}
        if self.runner_up is not None:
            measured.setdefault(self.runner_up.backend, self.runner_up.version)
        for name, then in measured.items():
            today = versions.get(name)
            if today is not None and today != then:
                out.append(f"version of {name} ({then} then, {today} now)")
        if threads is not None and self.origin == "measured" and self.policy.threads != threads:
            out.append(f"threads ({self.policy.threads} then, {threads} now)")
        return tuple(out)

    def stale_when(self) -> str:
        """What would make the record stale, in one line."""
        then = [f"{name} {self.software[name]}" for name in sorted(software()) if name in self.software]
        threads = [f"{self.policy.threads} threads"] if self.origin == "measured" else []
        return ", ".join([f"{self.backend} {self.version}", *then, f"{self.slug}", *threads])


def choice_text(backend: str, version: str, config: Mapping[str, Any]) -> str:
    """Canonical text of a backend, its version and a configuration."""
    return json.dumps([backend, version, dict(config)], sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """What a measurement depends on besides backends: torch, Python, attnreg. Compare field by field."""
    own = metadata.version("attnreg") or "unknown"
    return {"torch": torch.__version__, "python": ".".join(platform.python_version_tuple()[:2]), "attnreg": own}


def hardware_facts(hardware: Hardware) -> dict[str, Any]:
    """The hardware's fingerprint in a record: the slug, and the fields that a choice may depend on."""
    facts: dict[str, Any] = {"slug": hardware.slug}
    for name in _HARDWARE_KEYS:
        value = getattr(hardware, name)
        facts[name] = list(value) if isinstance(value, tuple) else value
    return facts


def problem_class(problem: Problem) -> str:
    """The key without its sizes: problems of one class are compared by distance. A single query stays apart."""
    data = problem.bucket().to_json()
    for name in SIZES:
        data.pop(name, None)
    data["decode"] = problem.sq == 1
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    out = []
    for name in names:
        old, new = then.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list) and name == "isa":
            gone, more = sorted(set(old) - set(new)), sorted(set(new) - set(old))
            out.append(f"{name} ({', '.join([f'-{x}' for x in gone] + [f'+{x}' for x in more])})")
        else:
            out.append(f"{name} ({old} then, {new} now)")
    return out
