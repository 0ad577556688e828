"""`attnreg doctor`: hardware, versions, plugins, failures, and what each absent backend would need."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from attnreg import folders, metadata, registry, store
from attnreg.backend import Finding
from attnreg.cli import app, console, put, put_json, say
from attnreg.hardware import Hardware, detect
from attnreg.sheet import Sheet

PACKAGES = ("attnreg", "torch", "triton", "numpy", "pluggy", "pydantic", "optuna", "transformers")
HANG = 10
"""Where the facts stand, beside their heads."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Plain data for programs.")] = False) -> None:
    """Say what this machine has, what loaded, what is broken or missing, and what to do about it."""
    devices = [detect("cpu"), *(detect(torch.device("cuda", n)) for n in range(_gpus()))]
    loaded = registry.current()
    findings = [*_core_findings(), *loaded.findings(devices[0])]
    if as_json:
        put_json(_data(devices, findings), indent=2)
        return
    for hardware in devices:
        _print_hardware(hardware)
    versions = _versions()
    say("versions  " + ", ".join(f"{n} {v}" for n, v in versions.items() if v), hang=HANG)
    absent = [name for name, version in versions.items() if not version]
    if absent:
        say(f"absent    {', '.join(absent)}", hang=HANG)
    put("")
    _print_backends()
    _print_findings(findings)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) or "" for name in PACKAGES}}


def _print_hardware(h: Hardware) -> None:
    say("hardware  ", (h.slug, "bold"), hang=HANG)
    if h.kind == "cpu":
        caches = ", ".join(f"L{n} {_bytes(size)}" for n, size in zip((1, 2, 3), h.caches, strict=True) if size)
        say(
            f"          {h.vendor} {h.model}, {h.cores} usable cores, {torch.get_num_threads()} torch threads, "
            f"{_bytes(h.memory)} memory, {caches}",
            hang=HANG,
        )
        say(f"          {' '.join(h.isa)}", hang=HANG)
    else:
        say(
            f"          {h.model} {h.arch}, {h.cores} multiprocessors, {_bytes(h.memory)} memory, "
            f"{_bytes(h.shared_memory)} shared memory a block, {h.registers} registers",
            hang=HANG,
        )


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.3g} {unit}"
        n = n / 1024  # type: ignore[assignment]  # a size for people, not for arithmetic
    raise AssertionError


def _print_backends() -> None:
    loaded = registry.current()
    sheet = Sheet("backend", "version", "plugin", "from", title="backends")
    for entry in loaded.entries.values():
        sheet.add(entry.name, entry.version, entry.plugin, entry.origin)
    sheet.print(console)
    if loaded.blocked:
        say(f"blocked by ATTNREG_BLOCK: {', '.join(loaded.blocked)}")
    for failure in loaded.failures:
        say(("set aside", "red"), f" plugin {failure.plugin} ({failure.origin}) at {failure.step}: {failure.reason}")


def _core_findings() -> list[tuple[str, Finding]]:
    """What the core itself can see: records that could not be read, a GPU that torch does not see."""
    todo = "mend or delete it; the rest is used"
    out = [("records", Finding(b.where, False, b.reason, todo)) for b in store.current().broken()]
    out.append(("core", _folder(folders.report("data"))))  # that of kernels is named by whoever compiles them
    todo = "mend it or install it anew; attnreg goes on without it"
    out += [("metadata", Finding(c.name, False, f"{c.place}: {c.reason}", todo)) for c in metadata.culprits()]
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
    put("")
    for plugin, found in findings:
        mark = ("ok   ", "green") if found.ok else ("bad  ", "red")
        todo = f" -> {found.todo}" if found.todo else ""
        subject = found.subject if found.subject.startswith(plugin) else f"{plugin}: {found.subject}"
        say(mark, f"{subject}: {found.detail}{todo}", hang=5)


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
