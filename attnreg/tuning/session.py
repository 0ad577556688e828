"""A session: tune one problem from search to record, in a study that can be interrupted and gone on with."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import optuna
import torch

from attnreg import registry, store
from attnreg.backend import Backend, estimate_seconds, versions_for
from attnreg.decide import reasons_of
from attnreg.errors import SpecError, TuneError
from attnreg.hardware import Hardware, detect
from attnreg.measure import Bench, Candidate, LocalBench, Plan, Worker
from attnreg.problem import Problem
from attnreg.records import hardware_facts, software
from attnreg.space import SearchSpace
from attnreg.tuning.evaluate import Evaluator
from attnreg.tuning.finals import finals
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.options import DEFAULTS, Options
from attnreg.tuning.outcome import make_report
from attnreg.tuning.report import Progress, TuneReport
from attnreg.tuning.search import ENUMERATE, Search
from attnreg.tuning.seeds import starting_points
from attnreg.tuning.spaces import usable_space
from attnreg.tuning.storage import database_error
from attnreg.tuning.studies import note_record, study_of

__all__ = ["Options", "hardware_of", "tune_problem"]

WORKER_ONLY = "not loaded in the measuring worker; give it an entry point or ATTNREG_PLUGINS, or say isolate=False"


@dataclass
class _Setting:
    """What is fixed for a session. Backends are asked about the bucket, as by a call."""

    problem: Problem
    bucket: Problem
    options: Options
    hardware: Hardware
    backends: Mapping[str, Backend]
    unsupported: dict[str, tuple[str, ...]]
    started: float
    tell: Callable[[Progress], object]

    @property
    def versions(self) -> dict[str, str]:
        return versions_for(self.backends, self.bucket, self.hardware)

    def left(self) -> float:
        limit = self.options.seconds
        return math.inf if limit is None else limit - (time.monotonic() - self.started)


def tune_problem(
    problem: Problem, options: Options = DEFAULTS, on_progress: Callable[[Progress], object] = lambda _: None
) -> TuneReport:
    """Find the fastest correct backend and configuration for a problem, and keep the record.

    Every candidate passes the gate before it is timed. A candidate that fails, crashes, hangs, leaks or runs out of
    memory is a result; it never ends the run. Raises TuneError where tuning cannot start: a custom mask, a device
    that this machine lacks, a storage that cannot be opened, or no backend for the problem; and where its database
    fails.
    """
    try:
        return _tune_problem(problem, options, on_progress)
    except Exception as error:
        failed = database_error(options.storage, error)
        if not failed:
            raise
    # Out of the handler, so that what the driver said is no part of the traceback: it may hold the password.
    raise TuneError(failed)


def _tune_problem(problem: Problem, options: Options, on_progress: Callable[[Progress], object]) -> TuneReport:
    setting = _setting(problem, options, on_progress)
    plan = Plan(
        problem,
        cache=options.cache,
        threads=torch.get_num_threads() if setting.hardware.kind == "cpu" else 0,
        time_limit=options.time_limit,
        memory_limit=options.memory_limit,
        seed=options.seed,
    )
    with _quiet_optuna(), Worker(plan) if options.isolate else LocalBench(plan) as bench:
        about = bench.about()
        for name in set(setting.backends) - set(about.versions):
            setting.unsupported[name] = (WORKER_ONLY,)
        setting.backends = {n: b for n, b in setting.backends.items() if n in about.versions}
        if not setting.backends:
            raise TuneError(f"no backend can run {problem}: {_reasons(setting.unsupported)}")
        space = JointSpace(_spaces(setting))
        if not space.spaces:
            raise TuneError(f"no backend can run {problem}: {_reasons(setting.unsupported)}")
        study, notes = study_of(plan, setting.hardware.slug, setting.versions, space, options.storage, options.seed)
        search = Search(
            study,
            space,
            _seeds(setting, space),
            limit=options.trials,
            enumerate_up_to=options.enumerate_up_to,
            patience=options.patience,
            seed=options.seed,
        )
        resumed = search.done
        stopped = _search(setting, bench, search)
        final = finals(bench, study, search, options.confidence, setting.left(), on_progress)
        made = make_report(
            setting.problem,
            final,
            unsupported=setting.unsupported,
            trials=search.done,
            resumed=resumed,
            stopped=stopped,
            notes=notes,
            elapsed=time.monotonic() - setting.started,
            confidence=options.confidence,
            circumstances={
                "hardware": hardware_facts(setting.hardware),
                "software": {**software(), "backends": setting.versions},
                "versions": setting.versions,
                "cache": options.cache,
                "threads": plan.threads,
                "timer": about.timer,
            },
        )
        if made.record is not None and options.keep:
            note_record(study, made.record.date)
            store.current().add(made.record)
        study.set_user_attr("done", {"winner": str(made.winner), "trials": made.trials})
    setting.tell(Progress("done", search.done, None, search.best and (search.best[1], search.best[0])))
    return made


def hardware_of(problem: Problem) -> Hardware:
    """The hardware of the problem's device. Raises TuneError where this machine has none."""
    try:
        return detect(problem.device)
    except (RuntimeError, AssertionError) as error:
        raise TuneError(f"device {problem.device!r} is not here: {error}; see attnreg tune --target") from error


def _setting(problem: Problem, options: Options, tell: Callable[[Progress], object]) -> _Setting:
    try:
        problem.key()
    except SpecError as error:
        raise TuneError(f"cannot be tuned: {error}; say the mask with attnreg.masks") from error
    hardware, bucket = hardware_of(problem), problem.bucket()
    entries = registry.current().entries
    for name in options.backends or ():
        registry.current().get(name)
    backends, unsupported = {}, {}
    for name, entry in sorted(entries.items()):
        if options.backends is not None and name not in options.backends:
            continue
        why = reasons_of(entry.backend, bucket, hardware)
        if why:
            unsupported[name] = tuple(why)
        else:
            backends[name] = entry.backend
    if not backends:
        raise TuneError(f"no backend can run {problem}: {_reasons(unsupported)}")
    return _Setting(problem, bucket, options, hardware, backends, unsupported, time.monotonic(), tell)


def _spaces(setting: _Setting) -> dict[str, SearchSpace]:
    """The search spaces of the backends; one without a usable space is set aside with the reason."""
    spaces = {}
    for name, backend in list(setting.backends.items()):
        space = usable_space(backend, setting.bucket, setting.hardware)
        if isinstance(space, SearchSpace):
            spaces[name] = space
        else:
            setting.unsupported[name] = (space,)
            setting.backends = {n: b for n, b in setting.backends.items() if n != name}
    return spaces


def _seeds(setting: _Setting, space: JointSpace) -> list[tuple[Candidate, str]]:
    """Where the search starts: the backends' defaults and seeds, and the records that speak for the problem."""
    p, hardware = setting.bucket, setting.hardware
    estimates = {name: estimate_seconds(setting.backends[name], p, hardware) for name in space.spaces}
    matches = store.current().find(setting.problem, hardware, setting.versions, cache=setting.options.cache)
    said = {"static": "static", "nearest": "neighbour"}
    records = [(Candidate(match.backend, match.config), said.get(match.rung, "record")) for match in matches]
    return starting_points(space, estimates, records)


def _search(setting: _Setting, bench: Bench, search: Search) -> str:
    """Evaluate what the search proposes; returns why it ended."""
    evaluator = Evaluator(bench, search.reference())
    total = search.space.count(ENUMERATE) if search.whole else search.limit
    while True:
        if setting.left() < 0.25 * (setting.options.seconds or 0.0):
            return "the time for the search was spent"
        proposal = search.ask()
        if proposal is None:
            break
        try:
            outcome = evaluator.evaluate(proposal.candidate)
        except BaseException:
            search.give_up(proposal)
            raise
        search.tell(proposal, outcome.seconds, **outcome.notes())
        now = search.best and (search.best[1], search.best[0])
        said = f"{proposal.candidate}: {outcome.kind}" + (f": {outcome.reason}" if outcome.reason else "")
        setting.tell(Progress("search", search.done, total, now, said))
    if search.limit is not None and search.done >= search.limit:
        return "the budget of trials was spent"
    return "every point was looked at" if search.whole else "more trials could not pay"


def _reasons(unsupported: Mapping[str, tuple[str, ...]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in unsupported.items()) or "none is loaded"


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Optuna logs every trial; progress is told by this package."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
