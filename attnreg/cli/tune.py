"""`attnreg tune`: tune recorded problems, a suite or a model's shapes, with live progress and a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.markup import escape
from rich.progress import Progress, TaskID

from attnreg import registry, store
from attnreg.backend import error_text
from attnreg.cli import app, console, put_json, say
from attnreg.cli.options import backend_names, device_kind, dtype_name, finite, parse_lengths
from attnreg.cli.static import bars as progress_bars
from attnreg.cli.static import tune_for
from attnreg.decide import reasons_of
from attnreg.errors import TuneError
from attnreg.match import Match
from attnreg.problem import Problem
from attnreg.sheet import Sheet
from attnreg.suites import MODELS, SUITES, Case, model_shape, suite
from attnreg.targets import target as known_target
from attnreg.tuning import Options, TuneReport, known, read_problems, tune_all
from attnreg.tuning import Progress as Stage
from attnreg.tuning.report import seconds_text
from attnreg.tuning.session import hardware_of

DTYPE, BATCH = "float32", 1

Result = TuneReport | Match | TuneError


@app.command()
def tune(
    problems: Annotated[Path | None, typer.Argument(help="A file that attnreg.record() wrote.")] = None,
    suites: Annotated[list[str] | None, typer.Option("--suite", help=f"{', '.join(SUITES)}, or all.")] = None,
    shapes: Annotated[list[str] | None, typer.Option("--model-shape", help=", ".join(MODELS))] = None,
    dtype: Annotated[str, typer.Option(callback=dtype_name, help="Of --model-shape.")] = DTYPE,
    batch: Annotated[int, typer.Option(min=1, help="Of --model-shape.")] = BATCH,
    lengths: Annotated[str | None, typer.Option(help="Of --model-shape, such as 512,2048.")] = None,
    device: Annotated[str, typer.Option(callback=device_kind, help="Of suites and model shapes: cpu or cuda.")] = "cpu",
    only: Annotated[str | None, typer.Option(help="Only problems whose name or text holds this.")] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Most candidates a problem; unlimited: as many as pay.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0, callback=finite, help="Most seconds a problem.")] = None,
    storage: Annotated[str | None, typer.Option(help="A journal file, or a URL such as postgresql://host/db.")] = None,
    backends: Annotated[str | None, typer.Option(help="Only these, such as cpu,sdpa.")] = None,
    cache: Annotated[str, typer.Option(help="Time with warm or cold caches.")] = "warm",
    time_limit: Annotated[
        float, typer.Option(min=0.1, callback=finite, help="Seconds that one step of a candidate may take.")
    ] = 120.0,
    memory_limit: Annotated[
        float, typer.Option(min=0, callback=finite, help="GiB that a candidate may hold; 0: most of what is free.")
    ] = 0.0,
    target: Annotated[str | None, typer.Option(help="Tune for hardware that is not here, such as sm_90.")] = None,
    static: Annotated[bool, typer.Option("--static", help="With --target: from compiled code alone.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=0, help="With --static: compiling processes; every core. 0: none.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Tune problems with a fresh record too.")] = False,
    keep: Annotated[bool, typer.Option(help="Write records to the user's database.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; measure nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON a problem.")] = False,
) -> None:
    """Find the fastest correct backend and configuration for each problem, and keep it.

    An interrupted run goes on where it stopped when the same command is given again: finished problems are passed
    over, and the one at work resumes its trials. Exit status 1 where no problem has a winner.
    """
    found = _cases(problems, suites or [], shapes or [], dtype, batch, lengths, device)
    cases = [c for c in found if only is None or only in c.name or only in str(c.problem)]
    if found and not cases:
        raise typer.BadParameter(f"--only: no problem's name or text holds {only!r}; there are {len(found)} problems")
    if not cases:
        raise typer.BadParameter("nothing to tune: give a problem file, --suite or --model-shape")
    if cache not in ("warm", "cold"):
        raise typer.BadParameter(f"--cache: expected warm or cold, got {cache!r}")
    names = backend_names(backends)  # before the work: a problem that is known already would not look at them
    options = Options(
        trials=budget,
        seconds=seconds,
        storage=storage,
        backends=names,
        cache=cast("Literal['warm', 'cold']", cache),
        keep=keep,
        time_limit=time_limit,
        memory_limit=int(memory_limit * 2**30),
    )
    if target is not None or static:
        if target is None or not static:
            raise typer.BadParameter("--target and --static go together: what is not here cannot be measured")
        for name, given in (
            ("--dry-run", dry_run),
            ("--storage", storage is not None),
            ("--cache cold", cache == "cold"),
        ):
            if given:
                raise typer.BadParameter(f"{name} does not go with --static, which measures nothing")
        known_target(target)
        tune_for(cases, target, budget, names, keep, as_json, jobs)
    elif dry_run:
        _dry_run(cases, options, again, as_json)
    else:
        _tune(cases, options, again, as_json)


def _cases(
    file: Path | None,
    suites: list[str],
    shapes: list[str],
    dtype: str,
    batch: int,
    lengths: str | None,
    device: str,
) -> list[Case]:
    out = [Case(f"problem {n}", p) for n, p in enumerate(read_problems(file), 1)] if file is not None else []
    for name in suites:
        out += suite(name, device)
    sizes = None if lengths is None else parse_lengths(lengths)
    if not shapes and (sizes is not None or (dtype, batch) != (DTYPE, BATCH)):
        raise typer.BadParameter("--dtype, --batch and --lengths go with --model-shape: files and suites say their own")
    for name in shapes:
        out += model_shape(name, dtype=dtype, batch=batch, lengths=sizes, device=device)
    return out


def _tune(cases: list[Case], options: Options, again: bool, as_json: bool) -> None:
    """Tune with progress on stderr, so that stdout stays clean for results."""
    names = {c.problem: c.name for c in cases}
    results: list[tuple[Case, Result]] = []
    bars = progress_bars()
    with bars:
        overall = bars.add_task("problems", total=len(cases), note="")
        live = _Live(bars, bars.add_task("", total=None, note="", visible=False), names)
        problems = [case.problem for case in cases]
        for case, (_, result) in zip(cases, tune_all(problems, options, again=again, on_progress=live), strict=True):
            results.append((case, result))
            bars.advance(overall)
            if as_json:
                put_json({"name": case.name, **_data(result)})
            elif not bars.console.is_terminal:  # a log shows no bars, but should show that the run moves
                bars.console.print(escape(_line(case, result)), soft_wrap=True)
            elif isinstance(result, TuneReport) and result.resumed:
                bars.console.print(f"{escape(case.name)}: resumed {result.resumed} trials of an interrupted run")
    if not as_json:
        _summary(results, options.backends or ())
    if not any(isinstance(r, Match) or (isinstance(r, TuneReport) and r.winner is not None) for _, r in results):
        raise typer.Exit(1)


class _Live:
    """Shows a problem's stage and its best so far."""

    def __init__(self, bars: Progress, task: TaskID, names: dict[Problem, str]) -> None:
        self.bars, self.task, self.names = bars, task, names
        self.best = ""

    def __call__(self, problem: Problem, stage: Stage) -> None:
        if stage.stage == "search" and stage.done <= 1:
            self.best = ""
        if stage.best is not None:
            self.best = f"best {seconds_text(stage.best[1])} {stage.best[0]}"
        self.bars.update(
            self.task,
            description=escape(f"{self.names.get(problem, '')}: {stage.stage}"),
            completed=stage.done,
            total=stage.total,
            note=escape(f"{self.best}  {stage.note}"),
            visible=stage.stage != "done",
        )


def _data(result: Result) -> dict[str, Any]:
    if isinstance(result, TuneReport):
        return {"status": "tuned" if result.winner is not None else "none usable", **result.to_json()}
    if isinstance(result, Match):
        chosen = {"backend": result.backend, "config": result.config}
        return {
            "status": "known",
            "winner": chosen,
            "date": result.record.date,
            "problem": result.record.problem.to_json(),
        }
    return {"status": "error", "error": str(result)}


def _summary(results: list[tuple[Case, Result]], asked: tuple[str, ...]) -> None:
    """The table, then what was refused, what was asked for and cannot run, and what else should be known."""
    sheet = Sheet("problem", "winner", "time", "runner-up", "slower by", "refused", "remarks")
    for case, result in results:
        sheet.add(case.name, *_row(result))
    sheet.print(console)
    for case, result in results:
        if not isinstance(result, TuneReport):
            continue
        lines = [f"refused {r.candidate}: {r.kind}: {r.reason}" for r in result.refused]
        lines += [f"cannot {n}: {'; '.join(why)}" for n, why in result.unsupported.items() if n in asked]
        for line in (*lines, *result.notes):
            say((f"{case.name}: {line}", "yellow"))


def _row(result: Result) -> tuple[str, str, str, str, str, str]:
    if isinstance(result, TuneError):
        return "-", "", "", "", "", str(result)
    if isinstance(result, Match):
        seconds = seconds_text(result.record.seconds or 0.0)
        return result.backend, seconds, "", "", "", f"tuned on {result.record.date[:10]}; --again tunes anew"
    rival, remarks = result.runner_up, []
    if result.ties:
        remarks.append(f"ties with {', '.join(sorted({t.backend for t in result.ties}))}")
    if result.noisy:
        remarks.append("NOISY")
    if result.resumed:
        remarks.append(f"resumed {result.resumed} trials")
    slower = f"{rival.ratio[1]:.2f}x ({rival.ratio[0]:.2f} to {rival.ratio[2]:.2f})" if rival and rival.ratio else ""
    winner = str(result.winner) if result.winner is not None else "none usable"
    time = seconds_text(result.seconds) if result.seconds is not None else ""
    return winner, time, rival.backend if rival else "", slower, str(len(result.refused) or ""), "; ".join(remarks)


def _line(case: Case, result: Result) -> str:
    winner, time, *_, remarks = _row(result)
    said = ", ".join(text for text in (winner, time, remarks) if text)
    return f"{case.name}: {said}"


def _dry_run(cases: list[Case], options: Options, again: bool, as_json: bool) -> None:
    """What would be searched, from where it would start, and what is known already."""
    entries = registry.current().entries
    sheet = Sheet("problem", "backends (points)", "starts from", "known")
    for case in cases:
        hardware = hardware_of(case.problem)
        points: dict[str, int] = {}
        for name, entry in sorted(entries.items()):
            if options.backends is not None and name not in options.backends:
                continue
            try:
                if not reasons_of(entry.backend, case.problem, hardware):
                    points[name] = sum(1 for _ in entry.backend.space(case.problem, hardware).points())
            except (Exception, SystemExit) as error:  # a plugin may raise anything; the tune itself will name it
                typer.echo(f"{name}: {error_text(error)}", err=True)
        versions = registry.current().versions(case.problem, hardware)
        matches = store.current().find(case.problem, hardware, versions, cache=options.cache)
        seeds = [f"{m.rung} {m.backend}" + (f" ({m.distance:g} octaves)" if m.distance else "") for m in matches]
        match = None if again else known(case.problem, options.cache)
        if as_json:
            data = {"name": case.name, "problem": case.problem.to_json(), "points": points, "seeds": seeds}
            put_json({**data, "known": match is not None})
        spaces = ", ".join(f"{name} ({n})" for name, n in points.items()) or "none"
        sheet.add(case.name, spaces, ", ".join(seeds[:3]) or "defaults", match.backend if match else "")
    if not as_json:
        sheet.print(console)
