"""Static tuning: a configuration for a target without its hardware, from what compilers say; never "measured"."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from attnreg import registry, store
from attnreg.backend import Backend, StaticReport
from attnreg.errors import TuneError
from attnreg.hardware import Hardware
from attnreg.measure import Candidate
from attnreg.problem import Problem
from attnreg.records import Record, hardware_facts, software
from attnreg.space import Value
from attnreg.targets import target as named_target

__all__ = ["StaticResult", "tune_static"]


@dataclass(frozen=True)
class StaticResult:
    """What compiling showed. looked: (candidate, report), best first. refused: (candidate, why) of the others."""

    problem: Problem
    target: str
    record: Record | None
    looked: tuple[tuple[Candidate, StaticReport], ...]
    refused: tuple[tuple[Candidate, str], ...]
    unsupported: dict[str, tuple[str, ...]]


def tune_static(
    problem: Problem,
    target: str,
    *,
    limit: int = 64,
    backends: tuple[str, ...] | None = None,
    keep: bool = True,
    seed: int = 0,
    on_progress: Callable[[int, int, Candidate], object] = lambda done, total, candidate: None,
) -> StaticResult:
    """Compile each backend's space for the target and keep the configuration that looks best as a `static` record.

    limit: configurations a backend; a larger space is sampled, its default and seeds first. A configuration that does
    not compile, does not fit or spills is refused by its backend's report. Raises TuneError where the target is
    unknown or no backend can compile for it.
    """
    hardware = named_target(target)
    problem = replace(problem, device="cuda")  # what torch calls HIP devices too
    able: dict[str, Backend] = {}
    unsupported: dict[str, tuple[str, ...]] = {}
    for name, entry in sorted(registry.current().entries.items()):
        if backends is not None and name not in backends:
            continue
        why = _reasons(entry.backend, problem, hardware)
        if why:
            unsupported[name] = tuple(why)
        else:
            able[name] = entry.backend
    if not able:
        reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in unsupported.items())
        raise TuneError(f"no backend compiles {problem} for {target}: {reasons}")
    queue = [
        Candidate(name, config) for name, b in able.items() for config in _configs(b, problem, hardware, limit, seed)
    ]
    looked: list[tuple[Candidate, StaticReport]] = []
    refused: list[tuple[Candidate, str]] = []
    for n, candidate in enumerate(queue):
        on_progress(n, len(queue), candidate)
        report = _compile(able[candidate.backend], problem, candidate, target)
        if report is None or report.refused:
            refused.append((candidate, report.refused if report is not None else "gives no report for this problem"))
        else:
            looked.append((candidate, report))
    looked.sort(key=lambda pair: (pair[1].seconds is None, pair[1].seconds or 0.0, pair[0].key))
    record = _record(problem, hardware, able, looked, refused) if looked else None
    if record is not None and keep:
        store.current().add(record)
    return StaticResult(problem, target, record, tuple(looked), tuple(refused), unsupported)


def _reasons(backend: Backend, problem: Problem, hardware: Hardware) -> list[str]:
    if getattr(backend, "cross_compile", None) is None:
        return ["it has no cross_compile()"]
    try:
        return list(backend.supports(problem, hardware))
    except Exception as error:
        return [f"its supports() raised {type(error).__name__}: {error}"]


def _configs(backend: Backend, problem: Problem, hardware: Hardware, limit: int, seed: int) -> list[dict[str, Value]]:
    """The whole space if it is small enough, else its default, its seeds and a sample."""
    space = backend.space(problem, hardware)
    points = [dict(p) for _, p in zip(range(limit + 1), space.points(), strict=False)]
    if len(points) <= limit:
        return points
    out: list[dict[str, Value]] = []
    rng = random.Random(seed)
    first = [dict(space.default), *map(dict, space.seeds)]
    for config in [*first, *(space.sample(rng) for _ in range(10 * limit))]:
        if dict(config) not in out and len(out) < limit:
            out.append(dict(config))
    return out


def _compile(backend: Backend, problem: Problem, candidate: Candidate, target: str) -> StaticReport | None:
    try:
        report = backend.cross_compile(problem, dict(candidate.config), target)  # type: ignore[attr-defined]  # optional
    except Exception as error:
        return StaticReport(target, refused=f"does not compile: {type(error).__name__}: {str(error)[:300]}")
    return report if isinstance(report, StaticReport) else None


def _record(
    problem: Problem,
    hardware: Hardware,
    able: dict[str, Backend],
    looked: list[tuple[Candidate, StaticReport]],
    refused: list[tuple[Candidate, str]],
) -> Record:
    best, report = looked[0]
    shown = {name: value for name, value in asdict(report).items() if name not in ("target", "refused") and value}
    summary: dict[str, tuple[str, int, str]] = {}
    for candidate, why in refused:
        name, count, first = summary.get(candidate.backend, (candidate.backend, 0, why[:500]))
        summary[name] = (name, count + 1, first)
    versions = {name: backend.version for name, backend in able.items()}
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
