"""Static tuning: a configuration for a target without its hardware, from what compilers say; never "measured"."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from attnreg import registry, store
from attnreg.backend import Backend, StaticReport, versions_for
from attnreg.decide import WRITTEN_ORDER, reasons_of
from attnreg.errors import TuneError
from attnreg.hardware import Hardware
from attnreg.measure import Candidate
from attnreg.problem import Problem
from attnreg.records import Record, hardware_facts, software
from attnreg.space import Value
from attnreg.targets import target as named_target
from attnreg.tuning.compilers import Compilers, Job
from attnreg.tuning.offers import Offer, offer_of, queue_of

__all__ = ["StaticResult", "tune_static"]

LEVEL = 1.2
"""Modelled times within this factor of the least are level: what others measured to be fastest stands up to 17% above
the least (`attnreg targets --published`), so less says nothing. Among them the written order of backends decides, then
a backend's own seeds in their order, then the time."""


@dataclass(frozen=True)
class StaticResult:
    """What compiling showed. looked: (candidate, report), best first. refused: (candidate, why) of the others.

    foreseen: how many configurations the backends' models ordered before any was compiled.
    """

    problem: Problem
    target: str
    record: Record | None
    looked: tuple[tuple[Candidate, StaticReport], ...]
    refused: tuple[tuple[Candidate, str], ...]
    unsupported: dict[str, tuple[str, ...]]
    foreseen: int = 0


def tune_static(
    problem: Problem,
    target: str,
    *,
    limit: int = 16,
    backends: tuple[str, ...] | None = None,
    keep: bool = True,
    seed: int = 0,
    compilers: Compilers | None = None,
    on_progress: Callable[[int, int, Candidate], object] = lambda done, total, candidate: None,
) -> StaticResult:
    """Compile the configurations that look best for the target and keep the best of them as a `static` record.

    limit: configurations that compile and fit, in all; what is refused does not count, but no more than 4 * limit are
    tried. Where backends foresee times, their seeds and then the best foreseen are compiled; other backends' spaces are
    compiled whole if that small, else their default, seeds and a sample. What does not compile, does not fit or spills
    is refused, and so is unseen what shares the choices a refusal lies in. The winner has the least modelled time, but
    for what is level with it (LEVEL).
    compilers: where to compile; this process by default. on_progress: (done, likely total, candidate) as each is done.
    Raises TuneError where the target is unknown or no backend can compile for it.
    """
    hardware = named_target(target)
    problem = replace(problem, device="cuda")  # what torch calls HIP devices too
    bucket = problem.bucket()  # what a call will ask backends about
    able: dict[str, Backend] = {}
    offers: dict[str, Offer] = {}
    unsupported: dict[str, tuple[str, ...]] = {}
    for name, entry in sorted(registry.current().entries.items()):
        if backends is not None and name not in backends:
            continue
        why = _reasons(entry.backend, bucket, hardware)
        if not why:
            offer = offer_of(name, entry.backend, bucket, hardware, limit, seed)
            if isinstance(offer, Offer):
                able[name], offers[name] = entry.backend, offer
                continue
            why = [offer]
        unsupported[name] = tuple(why)
    if not able:
        reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in unsupported.items())
        raise TuneError(f"no backend compiles {problem} for {target}: {reasons}")
    queue, known, foreseen = queue_of(offers)
    work = _Work(bucket, target, queue, limit, on_progress, last=list(known), most=4 * limit)
    (compilers or Compilers()).run(work.following, work.done)
    looked = _ranked(work.looked, known)
    record = _record(problem, hardware, able, looked, work.refused) if looked else None
    if record is not None and keep:
        store.current().add(record)
    return StaticResult(problem, target, record, tuple(looked), tuple(work.refused), unsupported, foreseen)


@dataclass
class _Work:
    """The queue of one problem, and what became of it."""

    problem: Problem
    target: str
    queue: list[Candidate]
    limit: int
    on_progress: Callable[[int, int, Candidate], object]
    looked: list[tuple[Candidate, StaticReport]] = field(default_factory=list)
    refused: list[tuple[Candidate, str]] = field(default_factory=list)
    culprits: list[tuple[str, dict[str, Value]]] = field(default_factory=list)
    at_work: int = 0
    last: list[Candidate] = field(default_factory=list)
    most: int = 0

    def following(self) -> Job | None:
        """The next configuration that no refusal speaks against; None while those at work may be enough."""
        while True:
            tried = len(self.looked) + len(self.refused) + self.at_work
            while self.queue and tried < self.most and len(self.looked) + self.at_work < self.limit:
                candidate = self.queue.pop(0)
                if not any(name == candidate.backend and _within(part, candidate) for name, part in self.culprits):
                    self.at_work += 1
                    return Job(self.problem, candidate, self.target)
            if self.looked or self.at_work or not self.last:
                return None
            # Nothing that looked good fits: the rest of what backends know to be sound.
            self.queue, self.last, self.most = self.last, [], tried + len(self.last)

    def done(self, job: Job, report: StaticReport) -> None:
        """Take note of a result."""
        self.at_work -= 1
        if report.refused:
            self.refused.append((job.candidate, report.refused))
            if report.culprit:
                self.culprits.append((job.candidate.backend, dict(report.culprit)))
        else:
            self.looked.append((job.candidate, report))
        count = len(self.looked) + len(self.refused)
        self.on_progress(
            count, count + self.at_work + min(len(self.queue), self.limit - len(self.looked)), job.candidate
        )


def _within(part: dict[str, Value], candidate: Candidate) -> bool:
    return all(candidate.config.get(name) == value for name, value in part.items())


def _ranked(
    looked: list[tuple[Candidate, StaticReport]], seeds: list[Candidate]
) -> list[tuple[Candidate, StaticReport]]:
    """Best first; see LEVEL. What has no modelled time comes last."""
    least = min((report.seconds for _, report in looked if report.seconds is not None), default=0.0)
    order = {name: n for n, name in enumerate(WRITTEN_ORDER)}
    places = {candidate: n for n, candidate in enumerate(seeds)}

    def rank(pair: tuple[Candidate, StaticReport]) -> tuple[Any, ...]:
        candidate, seconds = pair[0], pair[1].seconds
        if seconds is None:
            return (2, candidate.key)
        level = seconds <= LEVEL * least
        choice = (order.get(candidate.backend, len(order)), places.get(candidate, len(places))) if level else ()
        return (0 if level else 1, *choice, seconds, candidate.key)

    return sorted(looked, key=rank)


def _reasons(backend: Backend, problem: Problem, hardware: Hardware) -> list[str]:
    if getattr(backend, "cross_compile", None) is None:
        return ["it has no cross_compile()"]
    return reasons_of(backend, problem, hardware)


def _record(
    problem: Problem,
    hardware: Hardware,
    able: dict[str, Backend],
    looked: list[tuple[Candidate, StaticReport]],
    refused: list[tuple[Candidate, str]],
) -> Record:
    best, report = looked[0]
    shown = {
        name: value for name, value in asdict(report).items() if name not in ("target", "refused", "culprit") and value
    }
    summary: dict[str, tuple[str, int, str]] = {}
    for candidate, why in refused:
        name, count, first = summary.get(candidate.backend, (candidate.backend, 0, why[:500]))
        summary[name] = (name, count + 1, first)
    versions = versions_for(able, problem.bucket(), hardware)
    return Record(
        problem=problem,
        backend=best.backend,
        version=versions[best.backend],
        config=dict(best.config),
        hardware=hardware_facts(hardware),
        software={**software(), "backends": versions},
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        origin="static",
        static=shown,
        refused=tuple(summary[name] for name in sorted(summary)),
        trials=len(looked) + len(refused),
    )
