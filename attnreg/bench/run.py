"""Run a case: every contestant once a round in turning order, probes between, ratios paired round by round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnreg import dispatch
from attnreg.bench.peaks import PeakLoops, Peaks
from attnreg.bench.peers import PEERS, UnfitError, copied
from attnreg.errors import AttnregError
from attnreg.hardware import detect
from attnreg.measure.probes import Probes
from attnreg.measure.timing import Clock, Thunk, bind
from attnreg.problem import Problem
from attnreg.registry import current
from attnreg.suites import Case
from attnreg.testing import Inputs, check_inputs, make_inputs
from attnreg.testing.bounds import find_truth
from attnreg.testing.candidate import sample_rows
from attnreg.tuning.stats import Interval, interval, log_ratios

__all__ = ["OURS", "CaseResult", "Contestant", "Options", "run_case"]

OURS = "attnreg"
MULTIPLY, READ = "peak of multiply-adds", "peak of reading"
"""The loops that stand for the machine's peaks, which take their turns like any contestant."""
DOCUMENTS = 8
PAIRS = 1 << 22
"""Score entries that a peer's check against the oracle looks at."""
REST = 2.0
"""Most seconds to wait after a sample until all threads of the process are at rest: those of other runtimes go on
spinning after a call, for which the next contestant must not pay (measured: ONNX Runtime's doubled its time)."""
LOOK = 0.01
IDLE = 0.1
"""A process that used less than this share of one processor while it slept for LOOK is at rest."""


@dataclass(frozen=True)
class Options:
    """rounds: samples of each contestant. confidence: of the intervals. sample_seconds: least length of a sample.

    patience: most rounds tried, as a multiple of `rounds`, since rounds while a probe is low are dropped. backends:
    backends of ours to time by force, beside what attention() chooses. peers: names to keep, None for all.
    seconds: a contestant slower than this a call sits out after two rounds.
    """

    rounds: int = 11
    confidence: float = 0.95
    sample_seconds: float = 5e-3
    patience: int = 3
    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] | None = None
    seconds: float = 4.0


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case: its samples in seconds, or why it has none."""

    name: str
    samples: tuple[float, ...] = ()
    why: str = ""

    @property
    def median(self) -> float:
        """Median seconds a call; NaN where there is no sample."""
        return statistics.median(self.samples) if self.samples else math.nan


@dataclass(frozen=True)
class CaseResult:
    """Every contestant of a case. ratios: a contestant's time over ours, (low, estimate, high).

    shares: of the multiply-add and the read peak, paired by round; peaks: their medians over the rounds.
    """

    suite: str
    case: str
    problem: Problem
    chosen: str
    contestants: tuple[Contestant, ...]
    ratios: Mapping[str, Interval]
    dropped: int
    shares: tuple[float, float]
    peaks: Peaks
    notes: tuple[str, ...] = field(default=())

    def get(self, name: str) -> Contestant:
        """The contestant of that name."""
        return next(c for c in self.contestants if c.name == name)

    @property
    def best_peer(self) -> str | None:
        """The fastest contestant that is not ours."""
        timed = [c for c in self.contestants if c.samples and c.name in PEERS]
        return min(timed, key=lambda c: c.median).name if timed else None


def run_case(suite: str, case: Case, options: Options, loops: PeakLoops | None = None) -> CaseResult:
    """Prepare, check and time every contestant of a case, and the machine's peaks beside them, since they drift."""
    problem, inputs = case.problem, _inputs(case.problem)
    hardware = detect(problem.device)
    explained = dispatch.decision_of(inputs.problem)
    ready, idle = _prepare(inputs, options)
    loops = loops or PeakLoops(hardware, torch.get_num_threads())
    clock = Clock(hardware, "warm", options.sample_seconds)
    timed = {**ready, MULTIPLY: loops.multiply, READ: loops.read}
    samples, dropped = _rounds(timed, clock, Probes(hardware), options)
    contestants = [Contestant(name, tuple(samples[name])) for name in ready] + idle
    ours = samples[OURS]
    ratios = {name: _ratio(samples[name], ours, options.confidence) for name in timed if name != OURS and samples[name]}
    multiply, read = ratios.pop(MULTIPLY)[1], ratios.pop(READ)[1]
    known = inputs.problem.live_pairs.kind != "bound"  # run-time masks: how much work there was is not known
    shares = (problem.flops / loops.flops * multiply if known else math.nan, problem.bytes / loops.bytes * read)
    peaks = Peaks(
        loops.flops / statistics.median(samples[MULTIPLY]), loops.bytes / statistics.median(samples[READ]), loops.how
    )
    config = ", ".join(f"{n}={v}" for n, v in explained.config.items())
    chosen = f"{explained.backend}({config}), {explained.source}"
    return CaseResult(suite, case.name, problem, chosen, tuple(contestants), ratios, dropped, shares, peaks)


def _inputs(problem: Problem) -> Inputs:
    """Inputs of the problem; documents of one length, as the suites mean them and as a batch can hold them."""
    inputs = make_inputs(problem)
    ids = inputs.tensors.get("document_ids")
    if ids is not None:
        length = -(-ids.shape[-1] // DOCUMENTS)
        ids.copy_(torch.arange(ids.shape[-1]) // length)
    return inputs


def _prepare(inputs: Inputs, options: Options) -> tuple[dict[str, Thunk], list[Contestant]]:
    """Contestants that can run and are right, bound to the inputs; and the others with the reason."""
    truth = find_truth(inputs, sample_rows(inputs, PAIRS))
    ready: dict[str, Thunk] = {}
    idle: list[Contestant] = []
    spec = inputs.problem.spec

    def ours(q: Any, k: Any, v: Any, **tensors: Any) -> Any:
        return dispatch.attention(spec, q, k, v, **tensors)

    makers: list[tuple[str, Callable[[], Callable[..., Any]]]] = [(OURS, lambda: ours)]
    makers += [(f"backend {name}", _forced(name, inputs)) for name in options.backends]
    wanted = PEERS if options.peers is None else {n: PEERS[n] for n in options.peers}
    makers += [(name, lambda make=make: make(inputs.problem, inputs)) for name, make in wanted.items()]  # type: ignore[misc]
    for name, make in makers:
        try:
            run = make()
            verdict = check_inputs(run if name == OURS else copied(run), inputs, truth=truth, poison=False)
        except (UnfitError, AttnregError) as error:
            idle.append(Contestant(name, why=str(error)))
            continue
        except Exception as error:
            idle.append(Contestant(name, why=f"{type(error).__name__}: {error}"))
            continue
        if verdict.ok or name == OURS:
            ready[name] = bind(run, inputs)
        else:
            idle.append(Contestant(name, why=f"wrong: {verdict.reason}"))
    return ready, idle


def _forced(name: str, inputs: Inputs) -> Callable[[], Callable[..., Any]]:
    """The prepared callable of one of our backends, with its record's or default configuration."""

    def make() -> Callable[..., Any]:
        current().get(name)
        with dispatch.use_backend(name):
            run: Callable[..., Any] = dispatch.prepare(
                inputs.problem.spec, inputs.q, inputs.k, inputs.v, **inputs.tensors
            )
        return run

    return make


def _rounds(
    ready: Mapping[str, Thunk], clock: Clock, probes: Probes, options: Options
) -> tuple[dict[str, list[float]], int]:
    """Samples by contestant, aligned by round. A round in which a probe was low is dropped whole."""
    rough = {name: min(clock.once(call), clock.once(call)) for name, call in ready.items()}
    slow = {name for name, seconds in rough.items() if seconds > options.seconds}
    samples: dict[str, list[float]] = {name: [] for name in ready}
    names, dropped, kept, turn = list(ready), 0, 0, 0
    while kept < options.rounds and turn < options.rounds * options.patience:
        order = names[turn % len(names) :] + names[: turn % len(names)]
        turn += 1
        quiet, now = probes.quiet(), {}
        for name in order:
            if name in slow and kept >= 2:
                continue
            now[name] = clock.sample(ready[name], rough[name])
            _rest()
            quiet = probes.quiet() and quiet
        last_chance = turn + options.rounds - kept > options.rounds * options.patience
        if quiet or last_chance:
            kept += 1
            for name, seconds in now.items():
                samples[name].append(seconds)
        dropped += not quiet
    return samples, dropped


def _rest() -> None:
    """Wait until no thread of this process runs, at most REST seconds."""
    end = time.perf_counter() + REST
    while time.perf_counter() < end:
        before = time.process_time(), time.perf_counter()
        time.sleep(LOOK)
        if time.process_time() - before[0] < IDLE * (time.perf_counter() - before[1]):
            return


def _ratio(peer: Sequence[float], ours: Sequence[float], confidence: float) -> Interval:
    """The peer's time over ours with its interval; a peer that sat out early is paired with the rounds it ran."""
    n = min(len(peer), len(ours))
    low, middle, high = interval(log_ratios(peer[:n], ours[:n]), confidence)
    return math.exp(low), math.exp(middle), math.exp(high)
