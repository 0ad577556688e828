"""`attnreg explain`: the decision for a call that is described on the command line."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from attnreg import dispatch
from attnreg.cli import app, console
from attnreg.cli.parse import make_spec, parse_shape
from attnreg.explanation import Explanation
from attnreg.explanation import explain as explain_call
from attnreg.problem import Problem
from attnreg.testing import make_inputs


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="B x Hq x Sq x D of q, such as 1x32x1024x128.")] = "1x8x1024x64",
    kv_heads: Annotated[int | None, typer.Option(help="KV heads; Hq unless given.")] = None,
    skv: Annotated[int | None, typer.Option(help="Keys; Sq unless given.")] = None,
    head_dim_v: Annotated[int | None, typer.Option(help="Dv; D unless given.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mask: Annotated[str | None, typer.Option(help="Such as 'causal & sliding_window(255)'.")] = None,
    sparsity: Annotated[str | None, typer.Option(help="Such as 'bigbird(64)'.")] = None,
    score: Annotated[str | None, typer.Option(help="Such as 'scaled_dot(scale=0.125)'.")] = None,
    spec: Annotated[str | None, typer.Option(help="A spec as JSON; the other options lie over it.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Soft cap of the scores.")] = None,
    layout: Annotated[str | None, typer.Option(help="bhsd, bshd or thd.")] = None,
    grad: Annotated[bool, typer.Option("--grad", help="q, k and v need gradients.")] = False,
    backend: Annotated[str | None, typer.Option(help="As with use_backend.")] = None,
    show_mask: Annotated[bool, typer.Option("--show-mask", help="Draw the mask AND sparsity.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Plain data for programs.")] = False,
) -> None:
    """Say which backend a call would use, on what evidence, and why each other one was not taken."""
    said = make_spec(spec, mask, sparsity, score, softcap=softcap, layout=layout)
    batch, q_heads, sq, head_dim = _four(shape)
    keys = sq if skv is None else skv
    problem = Problem(
        said, batch, q_heads, kv_heads or q_heads, sq, keys, head_dim, head_dim, head_dim_v or head_dim,
        total_q=batch * sq if said.layout == "thd" else 0, total_k=batch * keys if said.layout == "thd" else 0,
        dtype=dtype, kv_dtype=dtype, device=device, square=sq == keys,
        grads=frozenset("qkv") if grad else frozenset(),
    )  # fmt: skip
    made = make_inputs(problem)
    with dispatch.use_backend(backend) if backend else torch.enable_grad():
        explanation = explain_call(said, made.q, made.k, made.v, **made.tensors)
    if as_json:
        typer.echo(json.dumps(explanation.to_json(), indent=2, default=str))
    else:
        _print(explanation)
    if show_mask:
        named: dict[str, Any] = {n: x for n, x in made.tensors.items() if isinstance(x, torch.Tensor)}
        typer.echo(said.show(sq, keys, **named))


def _four(shape: str) -> tuple[int, int, int, int]:
    sizes = parse_shape(shape)
    if len(sizes) != 4:
        raise typer.BadParameter(f"--shape: expected four sizes BxHqxSqxD, got {shape!r}")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _print(e: Explanation) -> None:
    d = e.decision
    config = ", ".join(f"{name}={value}" for name, value in d.config.items()) or "no parameters"
    for head, line in (
        ("problem", str(e.problem)),
        ("hardware", d.hardware.slug),
        ("chosen", f"[bold green]{d.backend}[/bold green] ({config})"),
        ("source", f"{d.source}: {d.why}"),
        *(("", line) for line in e.evidence()),
    ):
        console.print(f"{head:<9} {line}", highlight=False, soft_wrap=True)
    rows = [(r, "\n".join(r.why[1:] if r.verdict == "chosen" else r.why)) for r in e.rows()]
    color = {"chosen": "green", "able": "cyan", "refused": "red"}
    columns = {
        "backend": [r.backend for r, _ in rows],
        "verdict": [f"[{color[r.verdict]}]{r.verdict}[/{color[r.verdict]}]" for r, _ in rows],
        "time": [r.time for r, _ in rows],
        "error": [r.error for r, _ in rows],
        "why": [escape(why) for _, why in rows],
    }
    told = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(*told, box=None, pad_edge=False)
    for row in zip(*told.values(), strict=True):
        table.add_row(*row)
    console.print(table)
