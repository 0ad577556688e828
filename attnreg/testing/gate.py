"""The gate: a backend and configuration is right on a problem, on its bucket, and at the lengths that break kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from attnreg.backend import Backend, error_text
from attnreg.hardware import Hardware
from attnreg.problem import Problem, bucket_size
from attnreg.space import Config
from attnreg.spec import HeadGrouping
from attnreg.testing.bounds import Truth, find_truths
from attnreg.testing.candidate import GateResult, check_candidate, sample_rows
from attnreg.testing.dropout import check_dropout
from attnreg.testing.inputs import Flavour, Inputs, make_inputs
from attnreg.testing.unused import has_unused

__all__ = [
    "LENGTHS",
    "GateResult",
    "Trial",
    "bucket_mates",
    "check_backend",
    "check_candidate",
    "check_inputs",
    "trials",
]

LENGTHS = (1, 63, 65, 127, 129, 192, 40, 20)
"""No multiple of a tile, one short of one, one more than one, L % 128 == 64, L % 16 == 8, and L % 8 == 4."""

ORDER: tuple[Flavour, ...] = ("normal", "constant", "empty", "huge", "low", "large")
PAIRS = {"quick": 1 << 20, "full": 1 << 24}
"""Score entries of the given problem that the oracle computes; beyond it rows are sampled."""


@dataclass(frozen=True)
class Trial:
    """One thing to try: inputs of a problem in a flavour. why: what it stands for. summed: of gradients of a sum."""

    problem: Problem
    flavour: Flavour
    why: str
    seed: int = 0
    summed: bool = False


def check_backend(
    backend: Backend,
    problem: Problem,
    config: Config,
    hardware: Hardware,
    *,
    budget: Literal["quick", "full"] = "quick",
    truths: dict[tuple[Trial, str], Truth] | None = None,
) -> GateResult:
    """Pass or fail of a backend's configuration on a problem, at the first failure.

    The backend is asked about the bucket and prepared for it, as a call would. That callable runs the problem itself
    (the oracle computes a sample of its rows where it is large) and other sizes of its bucket; the configuration is
    then prepared for the lengths of LENGTHS with few heads, and for a sum's gradients where there are any. "quick"
    draws one flavour a length, "full" every flavour. A trial that the backend refuses, or whose configuration is not in
    its space (then its default is tried), is no failure. truths: filled with the oracle's answers, and read from on
    later calls, so that many configurations of one problem pay for the oracle once.
    """
    prepared: dict[Problem, Callable[..., Any]] = {}
    results: list[GateResult] = []
    skipped: list[str] = []
    for trial in trials(problem, budget):
        inputs = make_inputs(trial.problem, trial.flavour, trial.seed)
        bucket = inputs.problem.bucket()
        why = backend.supports(bucket, hardware)
        if why:
            if not results:
                return GateResult(False, f"refused: {'; '.join(why)}", float("inf"), case=str(inputs), checked=0)
            skipped.append(f"{trial.why}: {'; '.join(why)}")
            continue
        try:
            if bucket not in prepared:
                prepared[bucket] = _prepare(backend, bucket, config, hardware, first=not results)
        except (Exception, SystemExit) as error:
            reason = f"prepare raised {error_text(error)}"
            return GateResult(False, reason, float("inf"), case=str(inputs), checked=len(results))
        run, known = prepared[bucket], truths if truths is not None else {}
        if (trial, budget) not in known and not inputs.problem.spec.dropout_p:
            rows = sample_rows(inputs) if trial.summed else sample_rows(inputs, PAIRS[budget])
            known[trial, budget] = find_truths(inputs, rows, summed=trial.summed)
        truth, poison = known.get((trial, budget)), budget == "full"
        result = check_inputs(run, inputs, pairs=PAIRS[budget], poison=poison, truth=truth, summed=trial.summed)
        if not result.ok:
            return replace(result, reason=f"{trial.why}: {result.reason}", checked=len(results))
        results.append(result)
    return _worst(results, tuple(skipped))


def check_inputs(
    run: Callable[..., Any],
    inputs: Inputs,
    *,
    pairs: int = 1 << 24,
    poison: bool = True,
    truth: Truth | None = None,
    summed: bool = False,
) -> GateResult:
    """`check_candidate` at a bounded number of score entries; dropout is checked by the weights that it kept."""
    if inputs.problem.spec.dropout_p:
        return check_dropout(run, inputs, poison=poison, summed=summed)
    rows = sample_rows(inputs, pairs) if truth is None else truth.rows
    return check_candidate(run, inputs, rows=rows, poison=poison, truth=truth, summed=summed)


def trials(problem: Problem, budget: Literal["quick", "full"] = "quick") -> Iterator[Trial]:
    """What the gate tries, in order: the problem, its bucket, the gradients of a sum, the lengths, unused slots."""
    yield Trial(problem, "normal", "the problem itself")
    for n, other in enumerate(bucket_mates(problem)):
        yield Trial(other, ("large", "low", "empty")[n % 3], "another size of the same bucket", seed=n + 1)
    small = _few_heads(problem)
    if problem.needs_grad:
        yield Trial(_of_length(small, 65), "normal", "the gradients of a sum, of stride 0", seed=1, summed=True)
    flavours: tuple[Flavour, ...] = (*ORDER, "edges") if problem.spec.bias else ORDER
    for n, length in enumerate(LENGTHS):
        for m in range(len(flavours) if budget == "full" else 1):
            flavour = flavours[(n + m) % len(flavours)]
            yield Trial(_of_length(small, length), flavour, f"length {length}, {flavour}", seed=10 * n + m)

    if has_unused(problem):
        yield Trial(_of_length(small, 70), "unused", "NaN in slots that are not used", seed=2)


def _prepare(backend: Backend, problem: Problem, config: Config, hardware: Hardware, first: bool) -> Callable[..., Any]:
    if first:
        return backend.prepare(problem, config)
    space = backend.space(problem, hardware)
    return backend.prepare(problem, config if not space.reasons(config) else space.default)


def bucket_mates(problem: Problem) -> list[Problem]:
    """Problems of other sizes that the same prepared callable must serve.

    The shortest, one with L % 128 == 64, and another batch of the shortest.
    """
    out = []
    low, high = bucket_size(problem.skv) // 2 + 1, bucket_size(problem.skv)
    for skv in (low, high - 64 if high > 128 else high):
        if not low <= skv <= high or skv == problem.skv:
            continue
        if problem.square:
            out.append(_sized(problem, skv, skv))
        elif problem.sq <= 1:
            out.append(_sized(problem, problem.sq, skv))
        else:
            sq_low = bucket_size(problem.sq) // 2 + 1
            sq = min(max(sq_low, problem.sq - 1), bucket_size(problem.sq))
            if sq != skv:
                out.append(_sized(problem, sq, skv))
    least, most = bucket_size(problem.batch) // 2 + 1, bucket_size(problem.batch)
    batch = least if problem.batch != least else most
    if batch != problem.batch and problem.batch:
        out.append(_of_batch(out[0] if out else problem, batch))
    return out


def _sized(problem: Problem, sq: int, skv: int) -> Problem:
    """The problem with other lengths; packed totals and pages scale with them, inside their bucket."""
    sizes: dict[str, Any] = {"sq": sq, "skv": skv}
    for name, length, before in (("total_q", sq, problem.sq), ("total_k", skv, problem.skv)):
        total = getattr(problem, name)
        if total:
            scaled = round(total * length / max(before, 1))
            least, most = bucket_size(total) // 2 + 1, min(bucket_size(total), problem.batch * length)
            sizes[name] = max(min(scaled, most), min(least, most), min(1, total))
    if problem.square and problem.total_q == problem.total_k and problem.total_q:
        sizes["total_k"] = sizes["total_q"]
    return replace(problem, **sizes)


def _of_batch(problem: Problem, batch: int) -> Problem:
    """The problem with another batch; packed totals fit it, inside their bucket."""
    sizes = {}
    for name, longest in (("total_q", problem.sq), ("total_k", problem.skv)):
        total = getattr(problem, name)
        sizes[name] = min(total, batch * longest)
    return replace(problem, batch=batch, **sizes)


def _few_heads(problem: Problem) -> Problem:
    """At most two KV heads and two sequences (three where they are packed): enough to tell one from another."""
    kv = min(problem.kv_heads, 2 if problem.group <= 8 else 1)
    spec = problem.spec
    if spec.heads is not None:
        spec = spec.model_copy(update={"heads": HeadGrouping(q=kv * problem.group, kv=kv)})
    batch = min(problem.batch, 3 if spec.layout == "thd" else 2)
    return replace(problem, spec=spec, batch=batch, kv_heads=kv, q_heads=kv * problem.group, pages=0)


def _of_length(problem: Problem, length: int) -> Problem:
    if problem.square:
        sq = length
    elif problem.sq <= 1:
        sq = problem.sq
    else:
        sq = max(2, length // 2 + 1)
    return replace(problem, sq=sq, skv=length, total_q=0, total_k=0)


def _worst(results: list[GateResult], skipped: tuple[str, ...]) -> GateResult:
    def ratio(error: float | None, bound: float | None) -> float:
        return (error or 0.0) / bound if bound else 0.0

    worst = max(results, key=lambda r: ratio(r.error, r.bound))
    grads = [r for r in results if r.grad_error is not None]
    steepest = max(grads, key=lambda r: ratio(r.grad_error, r.grad_bound), default=worst)
    return replace(
        worst,
        grad_error=steepest.grad_error,
        grad_bound=steepest.grad_bound,
        checked=sum(r.checked for r in results),
        skipped=skipped,
    )
