"""Survey of the targets: what defaults and seeds show when compiled, for problems that stand for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnreg import masks, registry
from attnreg.backend import StaticReport
from attnreg.decide import reasons_of
from attnreg.measure import Candidate
from attnreg.problem import Problem
from attnreg.space import SearchSpace
from attnreg.sparsity import BigBird
from attnreg.spec import AttentionSpec, Precision
from attnreg.suites import attention_problem
from attnreg.targets import target as named_target
from attnreg.tuning.compilers import Compilers, Job
from attnreg.tuning.spaces import usable_space

__all__ = ["FORMS", "Form", "Row", "rows", "survey"]

CAUSAL = AttentionSpec(mask=masks.Causal())
HALF = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Form:
    """A problem that stands for others of its kind, and the backend whose kernels it shows."""

    name: str
    backend: str
    problem: Problem


@dataclass(frozen=True)
class Row:
    """A configuration of a form on a target. which: "default", "seed 1", ...; report None: `reasons` refuse it all."""

    target: str
    form: Form
    which: str
    config: Mapping[str, Any]
    report: StaticReport | None
    reasons: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """ "ok", or why not."""
        if self.report is None:
            return f"not supported: {'; '.join(self.reasons)}"
        return f"refused: {self.report.refused}" if self.report.refused else "ok"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        out = {"target": self.target, "form": self.form.name, "backend": self.form.backend, "which": self.which}
        shown = {} if self.report is None else asdict(self.report)
        shown.pop("target", None)
        return {**out, "config": dict(self.config), "status": self.status, **shown}


def _gpu(*args: Any, **more: Any) -> Problem:
    return attention_problem(*args, device="cuda", **more)


def _forms() -> Iterator[Form]:
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    for grad, direction in ((False, "forward"), (True, "training")):
        for dim in (64, 128, 256):
            for dtype in HALF:
                made = _gpu(CAUSAL, (32, 8), 4096, 4096, dim, dtype=dtype, grad=grad)
                yield Form(f"flash {direction} D{dim} {short[dtype]}", "triton_flash", made)
    mla = _gpu(CAUSAL, (128, 128), 4096, 4096, 192, dim_v=128, dtype="bfloat16")
    yield Form("flash forward D192/128 bf16", "triton_flash", mla)
    for dtype in HALF:
        yield Form(f"decode D128 {short[dtype]}", "triton_decode", _gpu(CAUSAL, (32, 8), 1, 8192, 128, dtype=dtype))
    paged = AttentionSpec(mask=masks.Causal(), page_size=16)
    made = replace(_gpu(CAUSAL, (32, 8), 1, 8192, 128, batch=16, dtype="bfloat16"), spec=paged, pages=8192)
    yield Form("decode paged D128 bf16", "triton_decode", made)
    latent = _gpu(CAUSAL, (128, 1), 1, 8192, 576, dim_v=512, dtype="bfloat16")
    yield Form("decode latent D576/512 bf16", "triton_decode", latent)
    sparse = AttentionSpec(sparsity=BigBird(64))
    for grad, direction in ((False, "forward"), (True, "training")):
        for dim, dtype in ((64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float16"), (128, "float32")):
            made = _gpu(sparse, (32, 8), 4096, 4096, dim, dtype=dtype, grad=grad)
            yield Form(f"block-sparse {direction} D{dim} {short[dtype]}", "triton_block_sparse", made)
    e4m3 = AttentionSpec(mask=masks.Causal(), dtype=Precision(compute="float8_e4m3fn"))
    for dim in (64, 128, 256):
        yield Form(f"fp8 forward D{dim} e4m3", "triton_fp8", _gpu(e4m3, (32, 8), 4096, 4096, dim, dtype="bfloat16"))
    cached = AttentionSpec(mask=masks.Causal(), dtype=Precision(kv="float8_e4m3fn"))
    made = _gpu(cached, (32, 8), 1, 8192, 128, dtype="bfloat16")
    yield Form("fp8 cache decode D128 bf16", "triton_fp8", made)


FORMS: tuple[Form, ...] = tuple(_forms())
"""Every Triton kernel, forward and backward, in the head sizes and dtypes that differ in code."""


def survey(
    targets: Iterable[str],
    compilers: Compilers,
    *,
    forms: Iterable[Form] = FORMS,
    seeds: bool = True,
    on_row: Callable[[int, int, Row], object] = lambda done, total, row: None,
) -> list[Row]:
    """Compile each form's default, and with `seeds` the seeds, for each target; rows in the order of targets and forms.

    A form whose backend is not loaded is left out. Raises TuneError for a target that is not known.
    """
    waiting = [row for target in targets for row in rows(target, forms, seeds)]
    out: dict[int, Row] = {n: row for n, row in enumerate(waiting) if row.reasons}
    left = iter([n for n in range(len(waiting)) if n not in out])
    asked: dict[int, int] = {}

    def following() -> Job | None:
        n = next(left, None)
        if n is None:
            return None
        row = waiting[n]
        job = Job(row.form.problem, Candidate(row.form.backend, row.config), row.target)
        asked[id(job)] = n
        jobs.append(job)
        return job

    def done(job: Job, report: StaticReport) -> None:
        n = asked[id(job)]
        out[n] = replace(waiting[n], report=report)
        on_row(len(out), len(waiting), out[n])

    jobs: list[Job] = []  # kept, so that an id stays one job's
    compilers.run(following, done)
    return [out[n] for n in range(len(waiting))]


def rows(target: str, forms: Iterable[Form] = FORMS, seeds: bool = True) -> Iterator[Row]:
    """What a survey of one target would compile, without reports; a form that is not supported has its reasons."""
    hardware = named_target(target)
    entries = registry.current().entries
    for form in forms:
        if form.backend not in entries:
            continue
        backend = entries[form.backend].backend
        reasons = tuple(reasons_of(backend, form.problem, hardware))
        if reasons:
            yield Row(target, form, "", {}, None, reasons)
            continue
        space = usable_space(backend, form.problem, hardware)
        if not isinstance(space, SearchSpace):
            yield Row(target, form, "", {}, None, (space,))
            continue
        known: list[dict[str, Any]] = [dict(space.default)]
        if seeds:
            known += [dict(s) for s in space.seeds if dict(s) != known[0]]
        for n, config in enumerate(known):
            yield Row(target, form, f"seed {n}" if n else "default", config, None)
