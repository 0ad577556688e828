"""`attnreg explain`: the decision for a call that is described on the command line."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import torch
import typer

from attnreg import dispatch
from attnreg.cli import app, console, put, put_json, say
from attnreg.cli.options import device_here, dtype_name, parse_shape
from attnreg.cli.parse import make_spec
from attnreg.errors import AttnregError
from attnreg.explanation import Explanation, explain_problem
from attnreg.problem import Problem
from attnreg.sheet import Part, Sheet
from attnreg.testing.inputs import call_tensors, real_problem

ENTRIES = 2**40
"""A tensor of more is a slip of the keyboard: no machine holds it."""


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="B x Hq x Sq x D of q, such as 1x32x1024x128.")] = "1x8x1024x64",
    kv_heads: Annotated[int | None, typer.Option(min=1, help="KV heads; Hq unless given.")] = None,
    skv: Annotated[int | None, typer.Option(min=0, help="Keys; Sq unless given.")] = None,
    head_dim_v: Annotated[int | None, typer.Option(min=1, help="Dv; D unless given.")] = None,
    dtype: Annotated[
        str, typer.Option(callback=dtype_name, help="float32, float16, bfloat16, float64, float8_e4m3fn or _e5m2.")
    ] = "float32",
    device: Annotated[str, typer.Option(callback=device_here, help="cpu or cuda.")] = "cpu",
    mask: Annotated[str | None, typer.Option(help="Such as 'causal & sliding_window(255)'.")] = None,
    sparsity: Annotated[str | None, typer.Option(help="Such as 'bigbird(64)'.")] = None,
    score: Annotated[str | None, typer.Option(help="Such as 'scaled_dot(scale=0.125)'.")] = None,
    spec: Annotated[str | None, typer.Option(help="A spec as JSON; the other options lie over it.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Soft cap of the scores.")] = None,
    layout: Annotated[str | None, typer.Option(help="bhsd, bshd or thd.")] = None,
    grad: Annotated[bool, typer.Option("--grad", help="q, k and v need gradients.")] = False,
    backend: Annotated[str | None, typer.Option(help="As with use_backend.")] = None,
    show_mask: Annotated[
        bool, typer.Option("--show-mask", help="Draw the mask AND sparsity; under --json as the field mask.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Plain data for programs.")] = False,
) -> None:
    """Say which backend a call would use, on what evidence, and why each other one was not taken."""
    said = make_spec(spec, mask, sparsity, score, softcap=softcap, layout=layout)
    batch, q_heads, sq, head_dim = _four(shape)
    keys = sq if skv is None else skv
    problem = Problem(
        said, batch, q_heads, q_heads if kv_heads is None else kv_heads, sq, keys,
        head_dim, head_dim, head_dim if head_dim_v is None else head_dim_v,
        total_q=batch * sq if said.layout == "thd" else 0, total_k=batch * keys if said.layout == "thd" else 0,
        dtype=dtype, kv_dtype=dtype if said.dtype.kv == "same" else said.dtype.kv, device=device, square=sq == keys,
        grads=frozenset("qkv") if grad else frozenset(),
    )  # fmt: skip
    entries = batch * max(sq * q_heads, keys * problem.kv_heads) * max(head_dim, problem.head_dim_v)
    if entries > ENTRIES:
        raise typer.BadParameter(f"--shape: no such tensors can be made here: {entries} entries in one")
    try:
        real = real_problem(problem)  # of tensors that hold no memory
    except AttnregError:
        raise
    except (RuntimeError, TypeError) as error:  # torch's own, of a named tensor whose size overflows
        raise typer.BadParameter(f"--shape: no such tensors can be made here: {_first_line(error)}") from None
    with dispatch.use_backend(backend) if backend is not None else contextlib.nullcontext():
        explanation = explain_problem(real)
    picture = {"mask": said.show(sq, keys, **_drawn(problem))} if show_mask else {}
    if as_json:
        put_json({**explanation.to_json(), **picture}, indent=2)
        return
    _print(explanation)
    for drawn in picture.values():
        put(drawn)


def _four(shape: str) -> tuple[int, int, int, int]:
    sizes = parse_shape(shape)
    if len(sizes) != 4:
        raise typer.BadParameter(f"--shape: expected four sizes BxHqxSqxD, got {shape!r}")
    if not sizes[1] or not sizes[3]:
        raise typer.BadParameter(f"--shape: expected Hq and D of 1 or more, got {shape!r}")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _drawn(problem: Problem) -> dict[str, Any]:
    """Call tensors for the picture."""
    try:
        return {name: x for name, x in call_tensors(problem).items() if isinstance(x, torch.Tensor)}
    except RuntimeError as error:  # torch's own, such as of memory
        raise typer.BadParameter(f"--show-mask: no such tensors can be made here: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]  # a trace of C++ may follow


def _print(e: Explanation) -> None:
    d = e.decision
    config = ", ".join(f"{name}={value}" for name, value in d.config.items()) or "no parameters"
    lines: tuple[tuple[str, tuple[Part, ...]], ...] = (
        ("problem", (str(e.problem),)),
        ("hardware", (d.hardware.slug,)),
        ("chosen", ((d.backend, "bold green"), f" ({config})")),
        ("source", (f"{d.source}: {d.why}",)),
        *(("", (line,)) for line in e.evidence()),
    )
    for head, parts in lines:
        say(f"{head:<9} ", *parts, hang=10)
    rows = e.rows()
    color = {"chosen": "green", "able": "cyan", "refused": "red"}
    columns: dict[str, list[Part]] = {
        "backend": [r.backend for r in rows],
        "verdict": [(r.verdict, color[r.verdict]) for r in rows],
        "time": [r.time for r in rows],
        "error": [r.error for r in rows],
        "why": ["\n".join(r.why[1:] if r.verdict == "chosen" else r.why) for r in rows],
    }
    told = {name: cells for name, cells in columns.items() if any(cells)}
    sheet = Sheet(*told)
    for row in zip(*told.values(), strict=True):
        sheet.add(*row)
    sheet.print(console)
