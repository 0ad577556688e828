"""What programs call: tune one call, tune a problem that was never tuned here, tune a list."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attnreg import registry, store
from attnreg.backend import error_text
from attnreg.errors import RecordError, TuneError
from attnreg.match import Match
from attnreg.problem import Problem
from attnreg.spec import AttentionSpec
from attnreg.tuning.options import DEFAULTS, Options
from attnreg.tuning.report import Progress, TuneReport
from attnreg.tuning.session import hardware_of, tune_problem
from attnreg.validate import check

__all__ = ["known", "tune", "tune_all", "tune_missing"]

MISSED = Options(trials=60, seconds=60.0, time_limit=30.0)
"""What a call that tunes on a miss may cost: it waits, so that one candidate that hangs must not take all the time."""


def tune(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int | None = None,
    seconds: float | None = None,
    storage: str | Path | None = None,
    backends: tuple[str, ...] | None = None,
    cache: Literal["warm", "cold"] = "warm",
    isolate: bool = True,
    keep: bool = True,
    seed: int = 0,
    on_progress: Callable[[Progress], object] = lambda _: None,
    **tensors: Any,
) -> TuneReport:
    """Find the fastest correct backend and configuration for the problem of a call, and keep it as a record.

    spec, q, k, v and tensors: as for `attention`; they stand for the problem (sizes, dtypes, strides, gradients),
    and their values are not used. budget: most candidates to look at. seconds: most time to spend. storage: a journal
    file or a database URL, through which an interrupted run is resumed and several machines share one search.
    backends: only these. cache: "warm" or "cold". isolate: run candidates in a worker process. keep: write the
    record to the user's database; attention() then uses it. Returns a TuneReport.

    Raises what `attention` raises for a call that does not fit its spec, InputError for an option that cannot be meant,
    UnknownBackendError for a name of `backends` that is not loaded, and TuneError where it cannot be tuned.
    """
    tensors = {name: x for name, x in tensors.items() if x is not None}
    q, k, v = (_as_under_autocast(x) for x in (q, k, v))
    sizes = check(spec, q, k, v, tensors)
    problem = Problem.of(spec, sizes, q, k, v, tensors)
    options = Options(
        trials=budget,
        seconds=seconds,
        storage=storage,
        backends=backends,
        cache=cache,
        isolate=isolate,
        keep=keep,
        seed=seed,
    )
    return tune_problem(problem, options, on_progress)


def known(problem: Problem, cache: Literal["warm", "cold"] = "warm") -> Match | None:
    """The fresh, exact record of this user for the problem, if one passed the gate. Raises TuneError off its device."""
    hardware = hardware_of(problem)
    versions = registry.current().versions(problem.bucket(), hardware)
    matches = store.current().find(problem, hardware, versions, cache=cache)
    return next((m for m in matches if m.rung == "user" and not m.stale and m.record.passed), None)


def tune_missing(problem: Problem, options: Options = MISSED) -> TuneReport | None:
    """Tune a problem unless a fresh record of this user holds for it. A problem that cannot be tuned is left alone.

    Nothing but what ends the program comes out: the call that asked goes on. What is no TuneError is warned of.
    """
    try:
        if known(problem, options.cache) is not None:
            return None
        return tune_problem(problem, options)
    except TuneError:
        return None
    except Exception as error:
        warnings.warn(
            f"attnreg: {problem} could not be tuned ({error_text(error)}); the call goes on with what is known. "
            "`attnreg tune` shows more; ATTNREG_AUTOTUNE=0 tunes nothing in calls.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def tune_all(
    problems: Iterable[Problem],
    options: Options = DEFAULTS,
    *,
    again: bool = False,
    on_progress: Callable[[Problem, Progress], object] = lambda problem, progress: None,
) -> Iterator[tuple[Problem, TuneReport | Match | TuneError]]:
    """Tune problem after problem; yields each with its report, the fresh record that made it needless, or the error.

    again: tune those with a fresh record too.
    """
    for problem in problems:
        result: TuneReport | Match | TuneError | None
        try:
            result = None if again else known(problem, options.cache)
            if result is None:
                result = tune_problem(problem, options, functools.partial(on_progress, problem))
        except TuneError as error:
            result = error
        except (OSError, RecordError) as error:  # a full disk or a locked database; it may serve the next one
            result = TuneError(f"{problem} could not be tuned: {error_text(error)}")
        yield problem, result


def _as_under_autocast(x: Tensor) -> Tensor:
    """What attention() would see: autocast turns q, k and v into its dtype."""
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    wide = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if wide and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
