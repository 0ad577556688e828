"""Static tuning: a configuration for a target without its hardware, from what compilers say; never "measured"."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator
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
from attnreg.space import SearchSpace, Value
from attnreg.targets import target as named_target
from attnreg.tuning.compilers import Compilers, Job

__all__ = ["StaticResult", "tune_static"]

ENUMERATE = 4000
"""Spaces of at most this many points are foreseen whole; larger ones by climbing from their seeds and a sample."""
STARTS = 8
"""Random points, besides the default and the seeds, that climbing starts from."""
LEVEL = 1.2
"""Modelled times within this factor of the least are level: what others measured to be fastest stands up to 17% above
the least (`attnreg targets --published`), so less says nothing. Among them the written order of backends decides, then
a backend's own seeds in their order, then the time."""
FAR = 2.0
"""Seeds that are foreseen to take this many times as long as the best of all are not compiled."""


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
    unsupported: dict[str, tuple[str, ...]] = {}
    for name, entry in sorted(registry.current().entries.items()):
        if backends is not None and name not in backends:
            continue
        why = _reasons(entry.backend, bucket, hardware)
        if why:
            unsupported[name] = tuple(why)
        else:
            able[name] = entry.backend
    if not able:
        reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in unsupported.items())
        raise TuneError(f"no backend compiles {problem} for {target}: {reasons}")
    queue, known, foreseen = _queue(able, bucket, hardware, limit, seed)
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


def _queue(
    able: dict[str, Backend], problem: Problem, hardware: Hardware, limit: int, seed: int
) -> tuple[list[Candidate], list[Candidate], int]:
    """(candidates in the order of compiling, all seeds, how many were foreseen): good seeds, then the best foreseen."""
    plain: list[Candidate] = []
    times: dict[Candidate, float] = {}
    seeds: list[Candidate] = []
    order = {name: n for n, name in enumerate(WRITTEN_ORDER)}
    for name in sorted(able, key=lambda n: order.get(n, len(order))):  # a small budget goes to the first of the order
        backend = able[name]
        space = backend.space(problem, hardware)
        if getattr(backend, "foresee", None) is None:
            plain += [Candidate(name, config) for config in _configs(space, limit, seed)]
            continue
        for config in _pool(space, _foresight(backend, problem, hardware.arch), random.Random(seed)):
            times[Candidate(name, config[0])] = config[1]
        seeds += [Candidate(name, config) for config in _known(space)]
    best = min(times.values(), default=0.0)
    first = [c for c in seeds if times.get(c, best) <= FAR * best]
    rest = sorted(times, key=lambda c: (times[c], c.key))
    return list(dict.fromkeys([*plain, *first, *rest])), seeds, len(times)


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


def _foresight(backend: Backend, problem: Problem, target: str) -> Callable[[dict[str, Value]], float]:
    def foresee(config: dict[str, Value]) -> float:
        return float(backend.foresee(problem, config, target))  # type: ignore[attr-defined]  # optional

    return foresee


def _known(space: SearchSpace) -> list[dict[str, Value]]:
    """The default and the seeds, each once."""
    out: list[dict[str, Value]] = []
    for config in (space.default, *space.seeds):
        if dict(config) not in out:
            out.append(dict(config))
    return out


def _pool(
    space: SearchSpace, foresee: Callable[[dict[str, Value]], float], rng: random.Random
) -> Iterator[tuple[dict[str, Value], float]]:
    """(configuration, foreseen seconds) of a small space's every point, or of what climbing a large one passes."""
    if space.size <= ENUMERATE:
        for config in space.points():
            yield config, foresee(config)
        return
    seen: dict[tuple[Value, ...], float] = {}
    names = list(space.choices)

    def look(config: dict[str, Value]) -> float:
        key = tuple(config[name] for name in names)
        if key not in seen:
            seen[key] = foresee(config)
        return seen[key]

    for start in [*_known(space), *(space.sample(rng) for _ in range(STARTS))]:
        here = dict(start)
        while True:
            near = min(space.neighbours(here), key=look, default=here)
            if look(near) >= look(here):
                break
            here = near
    for key, seconds in seen.items():
        yield dict(zip(names, key, strict=True)), seconds


def _reasons(backend: Backend, problem: Problem, hardware: Hardware) -> list[str]:
    if getattr(backend, "cross_compile", None) is None:
        return ["it has no cross_compile()"]
    return reasons_of(backend, problem, hardware)


def _configs(space: SearchSpace, limit: int, seed: int) -> list[dict[str, Value]]:
    """The whole space if it is small enough, else its default, its seeds and a sample."""
    points = [dict(p) for _, p in zip(range(limit + 1), space.points(), strict=False)]
    if len(points) <= limit:
        return points
    out: list[dict[str, Value]] = []
    rng = random.Random(seed)
    for config in [*_known(space), *(space.sample(rng) for _ in range(10 * limit))]:
        if dict(config) not in out and len(out) < limit:
            out.append(dict(config))
    return out


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
