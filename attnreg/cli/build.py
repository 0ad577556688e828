"""`attnreg build`: backends that compile at first use compile now, for images and machines without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from attnreg import registry
from attnreg.cli import app, put_json, say
from attnreg.errors import InputError
from attnreg.hardware import detect


@app.command()
def build(
    head_dims: Annotated[str, typer.Option(help="Head sizes, separated by commas.")] = "64,96,128",
    dtypes: Annotated[str, typer.Option(help="Dtypes of q, separated by commas.")] = "float32,bfloat16,float16",
    gradients: Annotated[bool, typer.Option(help="Backward kernels too.")] = True,
    whole_space: Annotated[bool, typer.Option("--whole-space", help="All that the tuner may try.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Compilers at once; 0: one a usable core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Plain data for programs; progress on stderr.")] = False,
) -> None:
    """Compile ahead what calls would compile at first use, into the cache that calls read.

    A machine with the same CPU that has this cache needs no compiler for what was built.
    """
    sizes = [_size(text) for text in head_dims.split(",")]
    names = [text.strip() for text in dtypes.split(",")]
    hardware, built = detect("cpu"), 0
    tell: Callable[[str], None] = _to_stderr if as_json else say
    for entry in registry.current().entries.values():
        ahead = getattr(entry.backend, "build_ahead", None)
        if ahead is not None:
            built += ahead(
                hardware, head_dims=sizes, dtypes=names, gradients=gradients, whole_space=whole_space,
                jobs=jobs or None, say=tell,
            )  # fmt: skip
    if as_json:
        put_json({"hardware": hardware.slug, "libraries": built})
        return
    say(f"{built} libraries are ready." if built else "No backend here compiles ahead.")


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def _size(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 1024:
        raise InputError("head_dims", f"expected head sizes of 1 to 1024 separated by commas, got {text.strip()!r}")
    return int(text)
