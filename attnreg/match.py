"""Match: a record that speaks for a problem, how near it is, and what it says for people."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

from attnreg.problem import SIZES, Problem, bucket_size
from attnreg.records import Record, Rival

__all__ = ["Match", "Rung", "distance"]

Rung = Literal["user", "plugin", "shipped", "nearest", "static"]


@dataclass(frozen=True)
class Match:
    """A record that speaks for a problem.

    rung: the layer of an exact match (same bucket), "nearest" for a neighbour, "static" for a record made
    without the hardware. distance: octaves between the buckets' sizes, summed; 0 is exact. stale: the fields
    that differ between the record's circumstances and today's; empty if it is fresh. layer: where it was found.
    """

    rung: Rung
    backend: str
    config: dict[str, Any]
    record: Record
    distance: float = 0.0
    stale: tuple[str, ...] = ()
    layer: Rung = "user"

    def describe(self) -> str:
        """Why this choice, in one line."""
        r = self.record
        if r.origin == "static":
            return f"{r.backend} looks best without the hardware (static record of {r.date[:10]}; nothing was measured)"
        line = f"{r.backend} took {r.seconds or 0.0:.3g} s (median of {r.times.n if r.times else 0}) on {r.date[:10]}"
        if r.runner_up is not None and len(r.runner_up.ratio) == 3:
            low, _, high = r.runner_up.ratio
            line += f"; the runner-up {r.runner_up.backend} takes {low:.3g} to {high:.3g} times as long"
        if self.rung == "nearest":
            line += f"; measured at {_sizes(r.problem)}, {self.distance:.3g} octaves away"
        return line

    def evidence(self) -> list[str]:
        """Lines for `explain`: when, where, by what interval, against whom, what was refused, what would age it."""
        r = self.record
        kind = "noisy " if r.policy.noisy else ""
        out = [f"record    {self.layer}, {r.origin} {r.date} on {r.slug}, {r.policy.cache} cache, {r.trials} trials"]
        if r.times is not None:
            t = r.times
            out.append(
                f"times     median {t.median:.4g} s, {t.values[1]:.4g} to {t.values[5]:.4g} (10% to 90%), n={t.n}"
            )
        if r.runner_up is not None:
            out.append(f"runner-up {_rival_text(r.runner_up)} ({r.policy.confidence:.0%} {kind}interval)")
        out += [f"tie       {_rival_text(tie)}" for tie in r.ties]
        if r.gate is not None:
            g = r.gate
            grads = f"; gradients {g.grad_error:.2g}, bound {g.grad_bound:.2g}" if g.grad_bound else ""
            out.append(f"error     {g.error:.2g}, bound {g.bound:.2g}{grads}")
        for name, count, why in r.refused:
            out.append(f"refused   {name}, {count} configurations: {why}" if count else f"refused   {name}: {why}")
        out += [f"also      {e['backend']} on {e['date'][:10]}, kept as evidence" for e in r.evidence]
        out += [f"stale     {what}" for what in self.stale]
        return [*out, f"holds for {r.stale_when()}"]


@functools.lru_cache(maxsize=4096)
def _octaves(n: int) -> float:
    return math.log2(max(n, 1))


def distance(a: Problem, b: Problem) -> float:
    """Octaves between two problems' sizes, summed over batch, lengths, packed rows and pages."""
    return sum(abs(_octaves(getattr(a, name)) - _octaves(getattr(b, name))) for name in SIZES)


def _sizes(problem: Problem) -> str:
    sizes = {name: bucket_size(getattr(problem, name)) for name in SIZES}
    return " ".join(f"{name}={n}" for name, n in sizes.items() if n or name in ("batch", "sq", "skv"))


def _rival_text(rival: Rival) -> str:
    config = ", ".join(f"{name}={value}" for name, value in rival.config.items())
    ratio = f" at {rival.ratio[1]:.3f}x, {rival.ratio[0]:.3f} to {rival.ratio[2]:.3f}" if rival.ratio else ""
    return f"{rival.backend}{f' ({config})' if config else ''}{ratio}"
