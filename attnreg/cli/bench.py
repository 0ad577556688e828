"""`attnreg bench`: measure against the peers, hold the claims against what was measured, and say what ran where."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from attnreg import registry
from attnreg.bench.chart import check_chart, write_chart
from attnreg.bench.overhead import measure_overhead
from attnreg.bench.peaks import PeakLoops
from attnreg.bench.peers import PEERS
from attnreg.bench.report import hold, least_text, markdown, milliseconds, ratio_text, shares_text, to_json
from attnreg.bench.run import OURS, CaseResult, Options, run_case
from attnreg.cli import app, console, put, say
from attnreg.cli.options import output_file
from attnreg.hardware import Hardware, detect
from attnreg.sheet import Part, Sheet
from attnreg.suites import SUITES, suite

TIMED = ("prefill", "decode", "sparse", "train")
EXTRA = ("overhead", "tuner", "fp8")


@app.command()
def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join((*TIMED, 'long', *EXTRA))}, or all.")
    ] = None,
    only: Annotated[str, typer.Option(help="Cases whose name holds this text.")] = "",
    backend: Annotated[list[str] | None, typer.Option(help="Backends of ours to time by force as well.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Peers to keep, of: {', '.join(PEERS)}.")] = None,
    flex: Annotated[bool, typer.Option(help="FlexAttention compiles for tens of seconds a case.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each contestant.")] = 11,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; what torch has unless given.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=output_file, help="Write every sample here.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(callback=output_file, help="Write a chart here: .html, .svg or .png.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", callback=output_file, help="Write the run as a document here.")
    ] = None,
) -> None:
    """Time attention() and its peers, interleaved; print paired ratios with 95% intervals and shares of the peaks."""
    wanted = _wanted(suites or ["prefill"])
    if threads is not None:
        torch.set_num_threads(threads)
    peers = tuple(peer) if peer else tuple(n for n in PEERS if flex or not n.startswith("flex"))
    unknown = [n for n in peers if n not in PEERS]
    if unknown:
        raise typer.BadParameter(f"--peer: no peer is named {unknown[0]!r}; there are {', '.join(PEERS)}")
    for name in backend or ():
        registry.current().get(name)
    if chart is not None:
        check_chart(chart)
    hardware = detect("cpu")
    options = Options(rounds=rounds, backends=tuple(backend or ()), peers=peers)
    cases = [(name, case) for name in wanted if name in SUITES and name != "overhead" for case in suite(name)]
    if cases and not any(only.lower() in case.name.lower() for _, case in cases):
        names = ", ".join(case.name for _, case in cases)
        raise typer.BadParameter(f"--only: no case's name holds {only!r}; there are {names}")
    cases = [(name, case) for name, case in cases if only.lower() in case.name.lower()]
    results: list[CaseResult] = []
    machine = _machine(hardware)
    if cases:
        say(f"{machine['hardware']}, {machine['threads']} threads, {machine['versions']}\n")
        loops = PeakLoops(hardware, torch.get_num_threads())
        for name, case in cases:
            results.append(run_case(name, case, options, loops))
            _print_case(results[-1])
            _write(results, machine, json_file, markdown_file)  # a run takes long, and may be cut off
        _print_claims(results)
        if chart is not None:
            write_chart(chart, results, machine)
    extras = {name: _told(SHOW[name]) for name in EXTRA if name in wanted}
    if extras and markdown_file is not None:
        markdown_file.write_text(markdown(results, machine, extras), encoding="utf-8")


def _wanted(suites: list[str]) -> list[str]:
    known = [*TIMED, "long", *EXTRA]
    for name in suites:
        if name not in (*known, "all"):
            raise typer.BadParameter(f"no suite is named {name!r}; there are {', '.join(known)} and all")
    return known if "all" in suites else suites


def _machine(hardware: Hardware) -> dict[str, Any]:
    return {
        "hardware": hardware.slug,
        "threads": torch.get_num_threads(),
        "memory": f"{hardware.memory / 2**30:.0f} GiB memory",
        "isa": list(hardware.isa),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["attnreg", *sys.argv[1:]]),
    }


def _print_case(result: CaseResult) -> None:
    say((result.case, "bold"), f"  {result.problem}")
    say(f"attnreg ran {result.chosen}; {shares_text(result)}")
    sheet = Sheet("contestant", "median ms", "its time over ours")
    for c in sorted(result.contestants, key=lambda c: (c.name != OURS, not c.samples, c.median)):
        if c.name == OURS:
            sheet.add((c.name, "green"), milliseconds(c.median), "1")
        elif c.samples:
            sheet.add(c.name, milliseconds(c.median), ratio_text(result, c.name))
        elif not c.why.startswith("only "):
            sheet.add(c.name, "", (c.why.splitlines()[0], "dim"))
    sheet.print(console)
    if result.dropped:
        say(f"{result.dropped} rounds dropped: a probe was slow, so something else ran")
    put("")


def _print_claims(results: list[CaseResult]) -> None:
    sheet = Sheet("case", "claim", "measured", "verdict", title="Claims")
    words: dict[bool | None, Part] = {True: ("met", "green"), False: ("not met", "red"), None: "not run"}
    for held in hold(results):
        sheet.add(held.case, least_text(held.claim), held.text, words[held.met])
    if sheet.rows:
        sheet.print(console)


def _write(
    results: list[CaseResult],
    machine: dict[str, Any],
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(results, machine), indent=1) + "\n", encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(results, machine), encoding="utf-8")


def _print_overhead() -> None:
    found = measure_overhead()
    sheet = Sheet("call", "us", title="Overhead, one thread, 1x1x16x16 float32", right=("us",))
    sheet.add("torch's op, called directly", f"{found.direct:.2f}")
    sheet.add("attention(), a hit", f"{found.hit:.2f}")
    sheet.add("over the op", f"{found.over:+.2f}")
    sheet.add("prepare()'s callable", f"{found.prepared:.2f}")
    sheet.add("a decode step, cache growing from 1 to 2,000", f"{found.step:.2f}")
    sheet.add("the op alone, the same steps", f"{found.direct_step:.2f}")
    sheet.print(console)
    say(f"hot table missed {found.misses} of 2,000 steps (at most 15 promised)")
    say(f"a hit costs {found.over:.2f} us over the op (at most 5 promised)")


def _tuner() -> None:
    """The tuner against exhaustive search on recorded measurements."""
    from attnreg.tuning import replay

    replay.show(console)


def _fp8() -> None:
    """FP8 accuracy on the published outlier test."""
    from attnreg.bench import fp8

    fp8.show(console)


SHOW: Mapping[str, Callable[[], None]] = {"overhead": _print_overhead, "tuner": _tuner, "fp8": _fp8}
"""What is measured beside the suites' cases; each prints its own table."""


def _told(show: Callable[[], None]) -> str:
    """What it prints, which is printed here too; plain text."""
    with console.capture() as said:
        show()
    console.file.write(said.get())
    return Text.from_ansi(said.get()).plain
