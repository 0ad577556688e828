"""`attnreg targets`: what the kernels' defaults and seeds show when compiled for GPUs that need not be here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from attnreg.cli import app, console, put, put_json, say
from attnreg.cli.static import bars
from attnreg.hardware import usable_cores
from attnreg.sheet import Sheet
from attnreg.targets import TARGETS
from attnreg.targets import target as known_target
from attnreg.tuning.compilers import Compilers
from attnreg.tuning.published import PUBLISHED, Standing, standing
from attnreg.tuning.survey import FORMS, Row, survey

COLUMNS = ("kernels", "configuration", "registers", "spills", "shared", "blocks", "matrix instructions", "status")


@app.command()
def targets(
    target: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(TARGETS)}.")] = None,
    only: Annotated[str | None, typer.Option(help="Only kernels whose name holds this, such as 'D128 bf16'.")] = None,
    seeds: Annotated[bool, typer.Option(help="Compile the seeds too, not only the defaults.")] = True,
    published: Annotated[bool, typer.Option("--published", help="Rank published choices by the static model.")] = False,
    jobs: Annotated[int | None, typer.Option(min=0, help="Compiling processes; every core. 0: none.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/targets.md.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON a configuration.")] = False,
) -> None:
    """Compile every Triton kernel's default and seeds for each target, and show what the binaries hold.

    registers a thread, spilled bytes (or instructions), shared memory in bytes, blocks that a multiprocessor holds, and
    matrix instructions by mnemonic. Exit status 1 where a configuration is refused. Compiled code is kept by Triton, so
    a second time is quick.
    """
    names = list(target or TARGETS)
    for name in names:
        known_target(name)
    if published:
        _published(names, as_json, as_markdown)
        return
    forms = [form for form in FORMS if only is None or only in form.name]
    if not forms:
        raise typer.BadParameter(
            f"--only: no kernel's name holds {only!r}; there are {', '.join(f.name for f in FORMS)}"
        )
    with bars() as progress, Compilers(usable_cores() if jobs is None else jobs) as compilers:
        task = progress.add_task("compiling", total=None, note="")

        def tell(done: int, total: int, row: Row) -> None:
            note = f"{row.target} {row.form.name}: {row.status}"
            progress.update(task, completed=done, total=total, note=escape(note))

        rows = survey(names, compilers, forms=forms, seeds=seeds, on_row=tell)
    if as_json:
        for row in rows:
            put_json(row.to_json())
    elif as_markdown:
        put(_markdown(rows))
    else:
        _print(rows)
    if any(row.report is not None and row.report.refused for row in rows):
        raise typer.Exit(1)


def _cells(row: Row) -> list[str]:
    name = row.form.name
    if row.report is None:
        return [name, "", "", "", "", "", "", row.status]
    report = row.report
    config = " ".join(f"{key}={value}" for key, value in row.config.items())
    matrix = " ".join(f"{key} {count}" for key, count in sorted(report.instructions.items()))
    figures = [str(report.registers), str(report.spills), str(report.shared), f"{report.occupancy:g}", matrix]
    return [f"{name}, {row.which}", config, *figures, row.status]


def _markdown(rows: list[Row]) -> str:
    lines: list[str] = []
    last = ""
    for row in rows:
        if row.target != last:
            last = row.target
            lines += ["", f"### {last}", "", f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|---|---|"]
        lines.append(f"| {' | '.join(_cells(row))} |")
    return "\n".join(lines).strip()


def _print(rows: list[Row]) -> None:
    for name in dict.fromkeys(row.target for row in rows):
        sheet = Sheet(*COLUMNS, title=name)
        for row in rows:
            if row.target == name:
                sheet.add(*_cells(row))
        sheet.print(console)
    refused = sum(1 for row in rows if row.report is not None and row.report.refused)
    compiled = sum(1 for row in rows if row.report is not None)
    say(f"{compiled} configurations compiled, {refused} refused; compiled only, not run: no time is measured")


def _published(names: list[str], as_json: bool, as_markdown: bool) -> None:
    """How the model ranks what others measured to be best."""
    found = [standing(choice) for choice in PUBLISHED if choice.target in names]
    if as_json:
        for one in found:
            put_json(one.to_json())
        return
    heads = (
        "target",
        "dtype",
        "published choice",
        "place",
        "percentile",
        "modelled",
        "best modelled",
        "best of the model",
    )
    lines = [_standing_cells(one) for one in found]
    if as_markdown:
        put("\n".join(f"| {' | '.join(line)} |" for line in [list(heads), ["---"] * len(heads), *lines]))
        return
    sheet = Sheet(*heads)
    for line in lines:
        sheet.add(*line)
    sheet.print(console)


def _standing_cells(one: Standing) -> list[str]:
    times = [f"{1e3 * one.seconds:.3g} ms", f"{1e3 * one.best_seconds:.3g} ms"]
    place = [f"{one.place} of {one.points}", f"{one.percentile:.1f}"]
    return [one.choice.target, one.choice.dtype, str(one.choice.tile), *place, *times, str(one.best)]
