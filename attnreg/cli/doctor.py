"""`attnreg doctor`: hardware, versions, plugins, failures, and what each absent backend would need."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from attnreg import folders, registry, store
from attnreg.backend import Finding
from attnreg.cli import app, console
from attnreg.hardware import Hardware, detect

PACKAGES = ("attnreg", "torch", "triton", "numpy", "pluggy", "pydantic", "optuna", "transformers")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Plain data for programs.")] = False) -> None:
    """Say what this machine has, what loaded, what is broken or missing, and what to do about it."""
    devices = [detect("cpu"), *(detect(torch.device("cuda", n)) for n in range(_gpus()))]
    loaded = registry.current()
    findings = [*_core_findings(), *loaded.findings(devices[0])]
    if as_json:
        typer.echo(json.dumps(_data(devices, findings), indent=2))
        return
    for hardware in devices:
        _print_hardware(hardware)
    versions = _versions()
    _say("versions  " + ", ".join(f"{n} {v}" for n, v in versions.items() if v))
    absent = [name for name, version in versions.items() if not version]
    if absent:
        _say(f"absent    {', '.join(absent)}")
    console.print()
    _print_backends()
    _print_findings(findings)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = ""
    return out


def _print_hardware(h: Hardware) -> None:
    _say("hardware  ", (h.slug, "bold"))
    if h.kind == "cpu":
        caches = ", ".join(f"L{n} {_bytes(size)}" for n, size in zip((1, 2, 3), h.caches, strict=True) if size)
        _say(
            f"          {h.vendor} {h.model}, {h.cores} usable cores, {torch.get_num_threads()} torch threads, "
            f"{_bytes(h.memory)} memory, {caches}"
        )
        _say(f"          {' '.join(h.isa)}")
    else:
        _say(
            f"          {h.model} {h.arch}, {h.cores} multiprocessors, {_bytes(h.memory)} memory, "
            f"{_bytes(h.shared_memory)} shared memory a block, {h.registers} registers"
        )


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.3g} {unit}"
        n = n / 1024  # type: ignore[assignment]  # a size for people, not for arithmetic
    raise AssertionError


def _print_backends() -> None:
    loaded = registry.current()
    table = Table(title="backends", title_justify="left", box=None, pad_edge=False)
    for column in ("backend", "version", "plugin", "from"):
        table.add_column(column)
    for entry in loaded.entries.values():
        table.add_row(*map(Text, (entry.name, entry.version, entry.plugin, entry.origin)))
    console.print(table)
    if loaded.blocked:
        _say(f"blocked by ATTNREG_BLOCK: {', '.join(loaded.blocked)}")
    for failure in loaded.failures:
        _say(("set aside", "red"), f" plugin {failure.plugin} ({failure.origin}) at {failure.step}: {failure.reason}")


def _core_findings() -> list[tuple[str, Finding]]:
    """What the core itself can see: records that could not be read, a GPU that torch does not see."""
    todo = "mend or delete it; the rest is used"
    out = [("records", Finding(b.where, False, b.reason, todo)) for b in store.current().broken()]
    out.append(("core", _folder(folders.report("data"))))  # that of kernels is named by whoever compiles them
    if _gpus() == 0:
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built} but sees no device" if built else "this torch is a CPU build"
        out.append(("core", Finding("GPU", True, f"none: {why}", "GPU backends refuse CPU tensors and say so")))
    return out


def _folder(said: folders.Report) -> Finding:
    """The folder in use, what it stands in for, and why."""
    detail = str(said.path) if said.path is not None else "nothing is kept: no folder can be written"
    if not said.passed:
        return Finding(said.what, True, detail)
    why = "; ".join(f"{fault.where}: {fault.why}" for fault in said.passed)
    todo = f"set {said.variable} to a folder that can be used"
    return Finding(said.what, False, f"{detail} (others cannot be used: {why})", todo)


def _print_findings(findings: list[tuple[str, Finding]]) -> None:
    console.print()
    for plugin, found in findings:
        mark = ("ok   ", "green") if found.ok else ("bad  ", "red")
        todo = f" -> {found.todo}" if found.todo else ""
        subject = found.subject if found.subject.startswith(plugin) else f"{plugin}: {found.subject}"
        _say(mark, f"{subject}: {found.detail}{todo}")


def _say(*parts: str | tuple[str, str]) -> None:
    """A line of texts, and of texts with a style; none is read as markup, for plugins write what they like."""
    console.print(Text.assemble(*parts))


def _data(devices: list[Hardware], findings: list[tuple[str, Finding]]) -> dict[str, Any]:
    loaded = registry.current()
    return {
        "hardware": [{"slug": h.slug, **asdict(h)} for h in devices],
        "versions": _versions(),
        "backends": [
            {"name": e.name, "version": e.version, "plugin": e.plugin, "origin": e.origin}
            for e in loaded.entries.values()
        ],
        "failures": [asdict(f) for f in loaded.failures],
        "blocked": list(loaded.blocked),
        "findings": [{"plugin": plugin, **asdict(found)} for plugin, found in findings],
    }
