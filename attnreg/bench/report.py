"""Show results: claims held against what was measured, as rows for the terminal, markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnreg.bench.claims import CLAIMS, Claim
from attnreg.bench.run import OURS, CaseResult
from attnreg.tuning.stats import Interval

__all__ = ["Held", "hold", "markdown", "milliseconds", "ratio_text", "shares_text", "to_json"]


@dataclass(frozen=True)
class Held:
    """A claim beside what was measured. met is None where there is nothing to hold it against."""

    case: str
    claim: Claim
    measured: float | None
    text: str
    met: bool | None


def hold(results: Sequence[CaseResult]) -> list[Held]:
    """Every claim of the cases that ran."""
    by_name = {result.case: result for result in results}
    return [_held(result, claim, by_name) for result in results for claim in CLAIMS.get(result.case, ())]


def _held(result: CaseResult, claim: Claim, others: Mapping[str, CaseResult]) -> Held:
    measured, text = _measure(result, claim, others)
    met = None if measured is None else measured >= claim.least
    return Held(result.case, claim, measured, text, met)


def _measure(result: CaseResult, claim: Claim, others: Mapping[str, CaseResult]) -> tuple[float | None, str]:
    if claim.peer == "read":
        return result.shares[1], f"{result.shares[1]:.0%} of the read bandwidth"
    if claim.peer in others or claim.peer.startswith("decode"):
        other = others.get(claim.peer)
        if other is None:
            return None, f"{claim.peer} did not run"
        times = other.get(OURS).median / result.get(OURS).median
        return times, f"{times:.2f}x as fast as {claim.peer}"
    name = result.best_peer if claim.peer == "best peer" else claim.peer
    if name is None or name not in result.ratios:
        return None, f"{claim.peer} did not run"
    return result.ratios[name][1], f"{ratio_text(result, name)} {name}"


def ratio_text(result: CaseResult, name: str) -> str:
    """`1.52x (1.49 to 1.55)`: the contestant's time over ours; few rounds give no interval, which is said."""
    low, middle, high = result.ratios[name]
    if math.isfinite(high):
        return f"{middle:.2f}x ({low:.2f} to {high:.2f})"
    rounds = min(len(result.get(contestant).samples) for contestant in (name, OURS))
    return f"{middle:.2f}x (no interval from {rounds} round{'s' if rounds > 1 else ''})"


def shares_text(result: CaseResult) -> str:
    """`79% of 510 GFLOP/s, 5% of 62.4 GB/s`; no share of arithmetic where a call tensor decides how much there is."""
    (fma, read), peaks = result.shares, result.peaks
    text = f"{read:.0%} of {peaks.read / 1e9:.1f} GB/s"
    return text if math.isnan(fma) else f"{fma:.0%} of {peaks.flops / 1e9:.0f} GFLOP/s, {text}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three digits."""
    return f"{seconds * 1e3:.3g}"


def least_text(claim: Claim) -> str:
    """`at least 1.35x sdpa`."""
    if claim.peer == "read":
        return f"at least {claim.least:.0%} of the read bandwidth"
    return f"at least {claim.least:g}x {claim.peer}"


HOW = """\
attnreg against its peers on one machine, by one command. The contestants of a case take turns, in another order each
round, and a ratio is the median over rounds of a peer's time over ours in the same round, with its 95% interval:
above 1, attnreg is faster. Each answer is first held to the float64 oracle; a contestant that is wrong is not timed.
Probes of arithmetic and reading run between the samples, and a round next to a slow one is dropped. The peaks are two
plain loops, one of multiply-adds and one that reads memory from start to end on every thread. They take their turns
like a contestant, and a share is paired by round as well. Such a loop is no limit: where part of the keys lies in the
last cache, or several places are asked for at once, a share of the read bandwidth passes 100%.
"""


def markdown(results: Sequence[CaseResult], machine: Mapping[str, Any], extras: Mapping[str, str] | None = None) -> str:
    """A whole run as a document. extras: more of its output, by heading."""
    where = f"{machine['hardware']}, {machine['threads']} threads, {machine['memory']}; {machine['versions']}"
    lines = ["# Benchmarks", "", HOW, f"Machine: {where}. Date: {machine['date']}.", "", f"    {machine['command']}"]
    if results:
        peaks = [r.peaks for r in results]
        lines += [
            "",
            f"Peaks, by {peaks[0].how}: {_span(p.flops / 1e9 for p in peaks)} GFLOP/s in float32, "
            f"{_span(p.read / 1e9 for p in peaks)} GB/s read.",
            "",
            "## Claims",
            "",
            "| case | claim | measured | |",
            "|---|---|---|---|",
        ]
    words = {True: "met", False: "**not met**", None: "not run"}
    lines += [f"| {h.case} | {least_text(h.claim)} | {h.text} | {words[h.met]} |" for h in hold(results)]
    for name in dict.fromkeys(result.suite for result in results):
        lines += ["", f"## {name}", ""]
        lines += ["| case | contestant | median ms | its time over ours | |", "|---|---|---|---|---|"]
        for result in results:
            if result.suite == name:
                lines += _rows(result)
    for heading, text in (extras or {}).items():
        lines += ["", f"## {heading}", "", "```", text.strip("\n"), "```"]
    return "\n".join(lines) + "\n"


def _span(values: Iterable[float]) -> str:
    known = sorted(values)
    return f"{known[0]:.0f} to {known[-1]:.0f}"


def _rows(result: CaseResult) -> list[str]:
    of_peaks = f"{shares_text(result)}; {result.dropped} rounds dropped"
    out = []
    for c in sorted(result.contestants, key=lambda c: (c.name != OURS, not c.samples, c.median)):
        if c.name == OURS:
            out.append(f"| {result.case} | **attnreg**: {result.chosen} | {milliseconds(c.median)} | 1 | {of_peaks} |")
        elif c.samples:
            out.append(f"| | {c.name} | {milliseconds(c.median)} | {ratio_text(result, c.name)} | |")
        elif not c.why.startswith("only "):
            out.append(f"| | {c.name} | | | {_one_line(c.why)} |")
    return out


def _one_line(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 120 else line[:117] + "..."


def to_json(results: Sequence[CaseResult], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data: every sample of every contestant, ratios with intervals (null where rounds were too few), claims."""
    return {
        "machine": dict(machine),
        "cases": [
            {
                "suite": r.suite,
                "case": r.case,
                "problem": r.problem.to_json(),
                "chosen": r.chosen,
                "dropped": r.dropped,
                "peaks": {"flops": r.peaks.flops, "read": r.peaks.read, "how": r.peaks.how},
                "share_of_flops": None if math.isnan(r.shares[0]) else r.shares[0],
                "share_of_read": r.shares[1],
                "contestants": [{"name": c.name, "samples": list(c.samples), "why": c.why} for c in r.contestants],
                "ratios": {name: _plain(ratio) for name, ratio in r.ratios.items()},
            }
            for r in results
        ],
        "claims": [
            {"case": h.case, "peer": h.claim.peer, "least": h.claim.least, "measured": h.measured, "met": h.met}
            for h in hold(results)
        ],
    }


def _plain(ratio: Interval) -> list[float | None]:
    """A ratio as JSON can hold it: ends without bound, which it has no number for, are null."""
    low, middle, high = ratio
    return [low, middle, high] if math.isfinite(high) else [None, middle, None]
