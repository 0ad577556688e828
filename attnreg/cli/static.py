"""`attnreg tune --target T --static`: compile for hardware that is not here, with progress and a summary."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from attnreg.cli import console, put_json, say
from attnreg.errors import AttnregError
from attnreg.hardware import usable_cores
from attnreg.measure import Candidate
from attnreg.sheet import Sheet
from attnreg.suites import Case
from attnreg.tuning.compilers import Compilers
from attnreg.tuning.report import seconds_text
from attnreg.tuning.static import StaticResult, tune_static

__all__ = ["bars", "tune_for"]


def bars() -> Progress:
    """Progress on stderr, so that stdout stays clean for results; none in a log, where no bar moves."""
    notes = TextColumn("{task.fields[note]}", table_column=Column(overflow="fold"))
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), notes)
    stderr = Console(stderr=True)
    return Progress(*columns, console=stderr, disable=not stderr.is_terminal)


def tune_for(
    cases: list[Case],
    target: str,
    budget: int | None,
    backends: tuple[str, ...] | None,
    keep: bool,
    as_json: bool,
    jobs: int | None,
) -> None:
    """Tune each case for the target from compiled code alone; exit status 1 where nothing fits any."""
    sheet = Sheet("problem", "static choice", "modelled", "registers", "matrix", "compiled", "refused", "why the first")
    done = 0
    with bars() as progress, Compilers(usable_cores() if jobs is None else jobs) as compilers:
        overall = progress.add_task("problems", total=len(cases), note="")
        one = progress.add_task("", total=None, note="")
        for case in cases:

            def tell(count: int, total: int, candidate: Candidate, name: str = case.name) -> None:
                note = escape(str(candidate)[:100])
                progress.update(one, description=escape(name), completed=count, total=total, note=note)

            try:
                more = {} if budget is None else {"limit": budget}
                made = tune_static(
                    case.problem, target, backends=backends, keep=keep, compilers=compilers, on_progress=tell, **more
                )
            except AttnregError as error:
                if as_json:
                    put_json({"name": case.name, "target": target, "error": str(error)})
                sheet.add(case.name, "-", "", "", "", "", "", str(error))
            else:
                done += bool(made.looked)
                if as_json:
                    put_json(_data(case.name, made))
                sheet.add(case.name, *_row(made))
            progress.advance(overall)
    if not as_json:
        sheet.print(console)
        say(f"static: compiled for {target}, not measured; a measured record always ranks above")
    if not done:
        raise typer.Exit(1)


def _row(made: StaticResult) -> tuple[str, str, str, str, str, str, str]:
    first = f"{made.refused[0][0]}: {made.refused[0][1]}" if made.refused else ""
    compiled = f"{len(made.looked) + len(made.refused)} of {made.foreseen or len(made.looked) + len(made.refused)}"
    if not made.looked:
        return "none fits", "", "", "", compiled, str(len(made.refused)), first
    candidate, report = made.looked[0]
    time = seconds_text(report.seconds) if report.seconds is not None else ""
    matrix = " ".join(f"{name} {count}" for name, count in report.instructions.items())
    return str(candidate), time, str(report.registers), matrix, compiled, str(len(made.refused)), first


def _data(name: str, made: StaticResult) -> dict[str, object]:
    best = made.looked[0] if made.looked else None
    return {
        "name": name,
        "target": made.target,
        "problem": made.problem.to_json(),
        "choice": str(best[0]) if best else None,
        "static": dict(made.record.static) if made.record is not None else {},
        "looked": [[str(c), report.seconds] for c, report in made.looked],
        "refused": [[str(c), why] for c, why in made.refused],
        "foreseen": made.foreseen,
    }
