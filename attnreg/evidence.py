"""Combine records of one identity: all evidence is kept, and its intervals decide who won."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from attnreg.errors import RecordError
from attnreg.records import Quantiles, Record, Rival, choice_text
from attnreg.records_json import as_evidence, from_evidence

__all__ = ["combine", "memory_class"]

# Half-width of a 95% interval of the median, in interquartile ranges over sqrt(n) (McGill, Tukey, Larsen 1978).
NOTCH = 1.57
# Differences below this are no reason to prefer: timers and allocators move by as much from run to run.
TIE = math.log(1.01)


def combine(records: Sequence[Record]) -> Record:
    """One record that holds everything the given ones hold, whatever their order.

    The winner is a choice that no other beats: by the pooled paired ratios where two choices ran in the same
    rounds, by disjoint intervals of the medians where they never did. Disturbed runs count only where no quiet
    one says anything. Choices that cannot be told apart are named as ties; smaller memory, then the name, breaks
    them. Raises RecordError if the identities differ.
    """
    if not records or len({record.identity for record in records}) != 1:
        raise RecordError("combine: expected records of one problem, machine class, software and policy")
    entries = _entries(records)
    latest = {entry.choice: entry for entry in entries}
    if entries[0].origin == "static":
        return _with_evidence(entries[-1], entries[:-1])
    quiet = [entry for entry in entries if not entry.policy.noisy] or entries
    choices = sorted({entry.choice for entry in quiet})
    ratios = _pooled(quiet)
    beaten = {a for a in choices for b in choices if a != b and _slower(a, b, ratios, quiet)}
    # Everyone can be beaten only by contradictory samples; then none of them proves anything.
    standing = [c for c in choices if c not in beaten] or choices
    best = min(standing, key=lambda c: (memory_class(latest[c].peak_memory), latest[c].backend, c))
    winner = latest[best]
    ties = {choice_text(t.backend, t.version, t.config): t for t in winner.ties}
    for other in standing:
        if other != best and other not in ties:
            ties[other] = _as_rival(latest[other], ratios.get((best, other)))
    winner = replace(winner, ties=tuple(ties[name] for name in sorted(ties)))
    return _with_evidence(winner, [entry for entry in entries if entry is not latest[best]])


def memory_class(peak: int) -> int:
    """Peak memory in steps of a quarter of an octave, at least 1 MiB: smaller differences are measurement noise."""
    return round(4 * math.log2(max(peak / 2**20, 1.0)))


def _entries(records: Iterable[Record]) -> list[Record]:
    """The records and all their evidence, each once, oldest first."""
    out: dict[str, Record] = {}
    for record in records:
        for entry in (replace(record, evidence=()), *(from_evidence(record, e) for e in record.evidence)):
            out.setdefault(json.dumps(as_evidence(entry), sort_keys=True), entry)
    return [out[text] for text in sorted(out, key=lambda text: (out[text].date, text))]


def _with_evidence(record: Record, others: Iterable[Record]) -> Record:
    return replace(record, evidence=tuple(as_evidence(other) for other in others))


def _pooled(entries: Iterable[Record]) -> dict[tuple[str, str], tuple[float, float]]:
    """(a, b) -> estimate and half-width of log(time of b / time of a), pooled by inverse variance, both ways round."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in entries:
        rivals = [*([entry.runner_up] if entry.runner_up else []), *entry.ties]
        seen: set[str] = set()
        for rival in rivals:
            other = choice_text(rival.backend, rival.version, rival.config)
            if not rival.ratio or other in seen or other == entry.choice:
                continue
            seen.add(other)
            low, middle, high = (math.log(x) for x in rival.ratio)
            half = max((high - low) / 2, 1e-6)
            found.setdefault((entry.choice, other), []).append((middle, half))
            found.setdefault((other, entry.choice), []).append((-middle, half))
    out = {}
    for pair, seen_pairs in found.items():
        weight = sum(half**-2 for _, half in seen_pairs)
        out[pair] = sum(middle * half**-2 for middle, half in seen_pairs) / weight, weight**-0.5
    return out


def _slower(a: str, b: str, ratios: Mapping[tuple[str, str], tuple[float, float]], entries: Sequence[Record]) -> bool:
    """Is choice a shown to be slower than choice b?"""
    if (b, a) in ratios:
        middle, half = ratios[b, a]
        return middle - half > 0 and middle > TIE
    low = min(_notch(e.times)[0] for e in entries if e.choice == a and e.times)
    high = max(_notch(e.times)[1] for e in entries if e.choice == b and e.times)
    return low > high * math.exp(TIE)


def _notch(sample: Quantiles) -> tuple[float, float]:
    half = NOTCH * (sample.values[4] - sample.values[2]) / math.sqrt(max(sample.n, 1))
    return sample.median - half, sample.median + half


def _as_rival(entry: Record, ratio: tuple[float, float] | None) -> Rival:
    around: tuple[Any, ...] = ()
    if ratio is not None:
        middle, half = ratio
        around = tuple(float(f"{math.exp(x):.6g}") for x in (middle - half, middle, middle + half))
    seconds = entry.seconds or 0.0
    return Rival(entry.backend, entry.version, entry.config, seconds, around)
