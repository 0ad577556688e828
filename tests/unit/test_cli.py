"""Law: the command line says what Python says, reads expressions without evaluating them, and fails with a message."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from attnreg import errors, masks, scores, sparsity
from attnreg.cli import app, commands
from attnreg.cli.parse import make_spec, parse_expression

run = CliRunner()
assert commands.explain


@pytest.mark.parametrize(
    ("family", "text", "want"),
    [
        ("mask", "causal", masks.Causal()),
        ("mask", "Causal() & SlidingWindow(255)", masks.Causal() & masks.SlidingWindow(255)),
        ("mask", "masks.Causal() | ~masks.Global((0, 1))", masks.Causal() | ~masks.Global((0, 1))),
        ("mask", "sliding_window(left=3, right=4)", masks.SlidingWindow(3, 4)),
        ("mask", "longformer(64, (0,))", masks.longformer(64, (0,))),
        ("mask", "prefix_lm", masks.PrefixLM()),
        ("sparsity", "bigbird(64, seed=7)", sparsity.BigBird(64, seed=7)),
        ("score", "scaled_dot(scale=0.5)", scores.ScaledDot(0.5)),
    ],
)
def test_expressions_are_read(family: str, text: str, want: Any) -> None:
    assert parse_expression(family, text) == want


@pytest.mark.parametrize(
    "text",
    ["", "causal &", "nothing", "causal(", "sliding_window()", "sliding_window(-1)", "custom(print)",
     "__import__('os').system('true')", "sliding_window(__import__('os'))", "(lambda: causal)()", "mask", "and_"],
)  # fmt: skip
def test_what_is_no_expression_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(errors.SpecError):
        parse_expression("mask", text)


def test_options_lie_over_a_spec_in_json() -> None:
    spec = make_spec('{"softcap": 3.0, "mask": {"kind": "causal"}}', "full", None, None, layout="bshd", softcap=None)
    assert (spec.softcap, spec.mask, spec.layout) == (3.0, masks.Full(), "bshd")


def test_explain_tells_the_decision_the_reasons_and_draws() -> None:
    said = run.invoke(app, ["explain", "--shape", "1x4x64x32", "--mask", "causal", "--backend", "eager", "--show-mask"])
    assert said.exit_code == 0, said.output
    assert "eager" in said.stdout
    assert "use_backend" in said.stdout
    assert "attend" in said.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--mask", "causal & sliding_window(7)", "--kv-heads", "2"],
        ["--sparsity", "bigbird(16)"],
        ["--layout", "thd"],
        ["--mask", "padding & causal", "--grad"],
        ["--dtype", "bfloat16", "--skv", "100"],
    ],
)
def test_explain_as_json(options: list[str]) -> None:
    said = run.invoke(app, ["explain", "--shape", "2x4x64x32", "--json", *options])
    assert said.exit_code == 0, said.output
    data = json.loads(said.stdout)
    chosen = [b for b in data["backends"] if b["name"] == data["backend"]]
    assert chosen[0]["reasons"] == []
    assert {b["name"] for b in data["backends"]} >= {"eager", "sdpa"}
    assert all(b["reasons"] for b in data["backends"] if b["name"] == "triton_flash")


def test_an_error_is_a_message_and_a_status() -> None:
    command = [sys.executable, "-m", "attnreg", "explain", "--mask", "sliding_window(-1)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("attnreg: SlidingWindow(left): expected an integer >= 0, got -1")
    assert "Traceback" not in done.stderr
