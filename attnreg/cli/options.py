"""What options have in common: sizes, names and files, read or refused with a message before any work."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import typer

from attnreg import registry, terminal
from attnreg.validate import FLOAT8, FLOATS

__all__ = [
    "backend_names",
    "device_here",
    "device_kind",
    "dtype_name",
    "finite",
    "output_file",
    "parse_lengths",
    "parse_shape",
]

DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in (*FLOATS, *FLOAT8))


def parse_shape(text: str) -> tuple[int, ...]:
    """`2x8x512x64` as (2, 8, 512, 64)."""
    return _sizes(
        text.lower().replace(",", "x").split("x"), 0, f"--shape: expected sizes such as 2x8x512x64, got {text!r}"
    )


def parse_lengths(text: str) -> tuple[int, ...]:
    """`512,2048` as (512, 2048)."""
    return _sizes(text.split(","), 1, f"--lengths: expected lengths such as 512,2048, got {text!r}")


def _sizes(parts: list[str], least: int, wrong: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise typer.BadParameter(wrong)
    return tuple(int(part) for part in parts)


def device_kind(text: str) -> str:
    """`cpu` or `cuda`, whether or not it is here: a callback of options that only name a device."""
    if text not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {text!r}")
    return text


def device_here(text: str) -> str:
    """`cpu`, `cuda` or `cuda:1` if this machine has it: a callback of options whose device is used."""
    kind, _, index = text.partition(":")
    if device_kind(kind) == "cpu":
        return kind
    found = torch.cuda.device_count()
    if index and not index.isdecimal():
        raise typer.BadParameter(f"expected cuda or cuda:N, got {text!r}")
    if int(index or 0) >= found:
        raise typer.BadParameter(f"{text!r} is not here: torch sees {found or 'no'} CUDA or HIP devices")
    return text


def dtype_name(text: str) -> str:
    """A dtype that q may have, by torch's name: a callback."""
    if text not in DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return text


def finite(number: float | None) -> float | None:
    """A number that can be counted with: a callback, since bounds let NaN pass."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"expected a finite number, got {number}")
    return number


def backend_names(text: str | None) -> tuple[str, ...] | None:
    """`cpu,sdpa` as names of loaded backends; None unless given. Raises UnknownBackendError."""
    if text is None:
        return None
    names = tuple(text.replace(",", " ").split())
    if not names:
        raise typer.BadParameter(f"--backends: expected names such as cpu,sdpa, got {text!r}")
    for name in names:
        registry.current().get(name)
    return names


def output_file(path: Path | None) -> Path | None:
    """A file that can be written, said before the work whose result it is to hold: a callback."""
    if path is None:
        return path
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {str(path.parent)!r}"
        raise typer.BadParameter(f"{str(path)!r} {why}")
    return terminal.stdout_file(path)
