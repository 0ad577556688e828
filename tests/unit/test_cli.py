"""Law: the command line says what Python says, reads expressions without evaluating them, and fails with a message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnreg import AttentionSpec, Problem, errors, masks, scores, sparsity
from attnreg.cli import app, commands, main
from attnreg.cli.parse import make_spec, parse_expression
from attnreg.suites import attention_problem
from attnreg.testing import make_inputs
from attnreg.tuning import TuneReport, write_problems
from attnreg.tuning.static import StaticResult

run = CliRunner()
assert commands.explain


@pytest.mark.parametrize(
    ("family", "text", "want"),
    [
        ("mask", "causal", masks.Causal()),
        ("mask", "Causal() & SlidingWindow(255)", masks.Causal() & masks.SlidingWindow(255)),
        ("mask", "masks.Causal() | ~masks.Global((0, 1))", masks.Causal() | ~masks.Global((0, 1))),
        ("mask", "sliding_window(left=3, right=4)", masks.SlidingWindow(3, 4)),
        ("mask", "global", masks.Global()),
        ("mask", "causal | ~global((0, 1))", masks.Causal() | ~masks.Global((0, 1))),
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
     "__import__('os').system('true')", "sliding_window(__import__('os'))", "(lambda: causal)()", "mask", "and_",
     "sliding_window({[]: 1})", "lambda", "~lambda: 1"],
)  # fmt: skip
def test_what_is_no_expression_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(errors.SpecError):
        parse_expression("mask", text)


@pytest.mark.parametrize(
    ("family", "text"),
    [("score", "scaled_dot & scaled_dot"), ("score", "~scaled_dot"), ("sparsity", "bigbird | bigbird")],
)
def test_only_masks_are_combined(family: str, text: str) -> None:
    with pytest.raises(errors.SpecError, match="only masks are combined"):
        parse_expression(family, text)


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
        ["--spec", '{"dtype": {"kv": "int8", "scaling": "head"}}', "--mask", "causal"],
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


def test_explain_takes_no_memory_for_the_tensors() -> None:
    """q alone would take 128 GiB; what is said of small ones is what calls find."""
    said = run.invoke(app, ["explain", "--shape", "64x32x131072x128", "--kv-heads", "8", "--mask", "causal", "--grad"])
    assert said.exit_code == 0, said.output
    assert "B64 H32/8 Sq131072 Skv131072 D128 float32 cpu grad k,q,v" in said.stdout
    listed = ["--spec", '{"bias": true, "layout": "bshd", "dropout_p": 0.1}', "--mask", "padding"]
    said = run.invoke(app, ["explain", "--shape", "2x4x64x32", "--json", *listed])
    problem = Problem.from_json(json.loads(said.stdout)["problem"])
    assert problem == make_inputs(problem).problem


def test_explain_as_json_holds_the_picture() -> None:
    said = run.invoke(app, ["explain", "--shape", "1x2x8x16", "--mask", "causal", "--json", "--show-mask"])
    assert "attend" in json.loads(said.stdout)["mask"]


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")
TUNE = "tune --model-shape minilm"
REFUSED = [
    ("explain --shape=-1x8x16x64", "expected sizes such as 2x8x512x64, got '-1x8x16x64'"),
    ("explain --shape 1x8x16", "expected four sizes"),
    ("explain --shape 1x0x16x64", "expected Hq and D of 1 or more"),
    ("explain --shape 1x8x9999999999x64", "no such tensors can be made here"),
    ("explain --kv-heads -2", "'--kv-heads'"),
    ("explain --kv-heads 0", "'--kv-heads'"),
    ("explain --head-dim-v 0", "'--head-dim-v'"),
    ("explain --skv -4", "'--skv'"),
    ("explain --dtype foo", "expected one of float16, bfloat16, float32, float64"),
    ("explain --device tpu", "expected cpu or cuda, got 'tpu'"),
    ("explain --device cuda:x", "expected cuda or cuda:N"),
    pytest.param("explain --device cuda", "torch sees no CUDA or HIP devices", marks=NO_GPU),
    ("explain --backend=", "no backend is named ''"),
    ("variants --device tpu", "expected cpu or cuda, got 'tpu'"),
    pytest.param("variants --device cuda", "torch sees no CUDA or HIP devices", marks=NO_GPU),
    (f"{TUNE} --lengths 12,a", "expected lengths such as 512,2048, got '12,a'"),
    (f"{TUNE} --lengths ,", "expected lengths such as 512,2048, got ','"),
    (f"{TUNE} --lengths -5", "expected lengths such as 512,2048, got '-5'"),
    (f"{TUNE} --dtype foo", "expected one of float16"),
    (f"{TUNE} --device tpu", "expected cpu or cuda, got 'tpu'"),
    (f"{TUNE} --batch 0", "'--batch'"),
    (f"{TUNE} --budget -5", "'--budget'"),
    (f"{TUNE} --seconds -3", "'--seconds'"),
    (f"{TUNE} --seconds nan", "'--seconds'"),
    (f"{TUNE} --time-limit -1", "'--time-limit'"),
    (f"{TUNE} --memory-limit -1", "'--memory-limit'"),
    (f"{TUNE} --memory-limit inf", "expected a finite number, got inf"),
    (f"{TUNE} --jobs -1", "'--jobs'"),
    (f"{TUNE} --backends nope", "no backend is named 'nope'"),
    (f"{TUNE} --backends ,", "expected names such as cpu,sdpa"),
    (f"{TUNE} --target tpu --static", "target 'tpu' is not known"),
    ("tune {here}/p.jsonl --only zzz", "no problem's name or text holds 'zzz'; there are 1 problems"),
    ("build --jobs -3", "'--jobs'"),
    ("targets --jobs -3", "'--jobs'"),
    ("db export {here}/no/x.jsonl", "there is no folder"),
    ("db export {here}", "is a folder"),
    ("bench overhead --markdown {here}/no/x.md", "there is no folder"),
    ("bench overhead --json {here}/no/x.json", "there is no folder"),
    ("bench prefill --chart {here}/x.gif", ".html, .svg or .png"),
    ("bench --threads 0", "'--threads'"),
    ("bench --rounds 0", "'--rounds'"),
    ("bench decode --only zzz", "no case's name holds 'zzz'; there are decode"),
    ("bench decode --backend nope", "no backend is named 'nope'"),
]


def told(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit status and what stderr says, without the frame that typer draws; a traceback would raise here."""
    monkeypatch.setattr(sys, "argv", ["attnreg", *command.split()])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code, " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


@pytest.mark.parametrize(("command", "said"), REFUSED)
def test_what_cannot_be_meant_is_refused_before_any_work(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_problems(tmp_path / "p.jsonl", [attention_problem(AttentionSpec(), (2, 2), 16, 16, 16)])
    code, err = told(command.format(here=tmp_path), monkeypatch, capsys)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_an_error_of_a_file_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(records: object, path: Path) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("attnreg.db.export", full)
    code, err = told(f"db export {tmp_path}/x.jsonl", monkeypatch, capsys)
    assert code == 2
    assert err == f"attnreg: [Errno 28] No space left on device: '{tmp_path}/x.jsonl'"


@pytest.mark.parametrize("more", ["", " --target sm_90 --static --jobs 0"])
def test_a_tune_without_any_winner_says_so_by_its_exit_status(
    more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = attention_problem(AttentionSpec(), (2, 2), 16, 16, 16)
    nothing = TuneReport(problem, None, None, None, (), (), (), {}, 1, 0, "done", 0.0, 0.99, False, 0, 0)
    static = StaticResult(problem, "sm_90", None, (), (), {})
    monkeypatch.setattr("attnreg.cli.tune.tune_all", lambda *rest, **named: [(problem, nothing)])
    monkeypatch.setattr("attnreg.cli.static.tune_static", lambda *rest, **named: static)
    write_problems(tmp_path / "p.jsonl", [problem])
    code, _ = told(f"tune {tmp_path}/p.jsonl{more}", monkeypatch, capsys)
    assert code == 1


def test_an_error_is_a_message_and_a_status() -> None:
    command = [sys.executable, "-m", "attnreg", "explain", "--mask", "sliding_window(-1)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("attnreg: SlidingWindow(left): expected an integer >= 0, got -1")
    assert "Traceback" not in done.stderr
