"""Planted bad backends from outside: `attnreg tune` and autotuned calls, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_planted import WANTED as WANTED_BY_TUNE

from attnreg import AttentionSpec, masks
from attnreg.suites import attention_problem
from attnreg.tuning import write_problems

pytestmark = pytest.mark.alone

HERE = Path(__file__).parent
LIMIT = 8
WANTED = {**WANTED_BY_TUNE, "planted_hang": ("hang", rf"no answer within {LIMIT} s")}
HONEST = ("sdpa", "planted_right_but_slow", "planted_chatty")
UNSURE = "its supports() raised ValueError: cannot make up its mind"
ALL = ",".join((*HONEST, "planted_unsure", *WANTED))
QUICK = ("planted_wrong", "planted_no_gradient", "planted_crash", "planted_leak", "planted_mutate", "planted_raising")
"""What a call that tunes under its own limits meets in a minute: what neither waits for a limit nor fills it."""

# Tunes inside a call, then compares the call's result and gradients with torch's own, and prints the explanation.
CALL = """
import contextlib, json, sys
import torch
import torch.nn.functional as F
import attnreg
from attnreg import AttentionSpec, masks, modes

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 192, 16, requires_grad=True) for _ in range(3))
spec = AttentionSpec(mask=masks.Causal())
block = contextlib.nullcontext()
if sys.argv[1:]:
    from attnreg.tuning import Options, tune_missing
    how = Options(backends=tuple(sys.argv[1].split(",")), time_limit=float(sys.argv[2]), memory_limit=2 << 30)
    modes.set_tuner(lambda problem: tune_missing(problem, how))
    block = attnreg.autotune()
with block:
    out = attnreg.attention(spec, q, k, v)
wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
grads, wanted_grads = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, wanted))
off = max(float((a - b).abs().max()) for a, b in zip((out, *grads), (wanted, *wanted_grads)))
explained = attnreg.explain(spec, q, k, v)
print(json.dumps({"off": off, "text": str(explained), **explained.to_json()}))
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ended]:
    """Each way to tune, in a process with a data folder of its own; side by side, as nothing here is a time."""
    folder = tmp_path_factory.mktemp("outside")
    site = folder / "site"
    info = site / "planted_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "planted_plugin.py").write_text((HERE / "planted" / "planted_plugin.py").read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted_plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnreg]\nplanted_plugin = planted_plugin\n")
    problems = folder / "problems.jsonl"
    write_problems(problems, [attention_problem(AttentionSpec(mask=masks.Causal()), (2, 2), 192, 192, 16, grad=True)])
    tune = [sys.executable, "-m", "attnreg", "tune", str(problems), "--backends", ALL]
    tune += ["--time-limit", str(LIMIT), "--memory-limit", "2"]
    call = [sys.executable, "-c", CALL]
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "json": ([*tune, "--json"], {}),
        "people": (tune, {}),
        "block": ([*call, ALL, str(LIMIT)], {}),
        "environment": (call, {"ATTNREG_AUTOTUNE": "1", "PLANTED": ",".join((*QUICK, *HONEST[1:]))}),
    }
    running = {}
    for name, (command, more) in ways.items():
        environ = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **more}
        environ["ATTNREG_DATA_DIR"] = str(folder / name)
        running[name] = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
        )
    out = {}
    for name, process in running.items():
        said, complained = process.communicate(timeout=500)
        out[name] = Ended(process.returncode, said, complained)
    return out


def test_the_command_names_each_for_programs(ended: Mapping[str, Ended]) -> None:
    made = ended["json"]
    assert made.code == 0, made.err
    row = json.loads(made.out)
    assert row["status"] == "tuned"
    assert row["winner"]["backend"] in HONEST
    assert {t["backend"] for t in row["ties"]} <= set(HONEST)
    found = {r["backend"]: (r["kind"], r["reason"]) for r in row["refused"]}
    assert set(found) == set(WANTED)
    for name, (kind, reason) in WANTED.items():
        assert found[name][0] == kind, (name, found[name])
        assert re.search(reason, found[name][1]), (name, found[name])
    assert row["unsupported"]["planted_unsure"] == [UNSURE]


def test_the_command_names_each_for_people(ended: Mapping[str, Ended]) -> None:
    made = ended["people"]
    assert made.code == 0, made.err
    lines = made.out.splitlines()
    [winner] = [line for line in lines if line.startswith("problem 1 ")]
    assert any(name in winner for name in HONEST)
    for name, (kind, reason) in WANTED.items():
        [line] = [line for line in lines if line.startswith(f"problem 1: refused {name}:")]
        assert re.search(rf"{kind}: .*(?:{reason})", line), line
    assert f"problem 1: cannot planted_unsure: {UNSURE}" in lines


@pytest.mark.parametrize(("way", "wanted"), [("block", tuple(WANTED)), ("environment", QUICK)])
def test_a_call_that_tunes_is_right_and_names_each(
    ended: Mapping[str, Ended], way: str, wanted: tuple[str, ...]
) -> None:
    made = ended[way]
    assert made.code == 0, made.err
    row: dict[str, Any] = json.loads(made.out.splitlines()[-1])
    assert row["off"] < 1e-4
    assert row["source"] == "user record"
    assert row["backend"] in (*HONEST, "cpu", "eager")
    for name in wanted:
        kind, reason = WANTED[name]
        [line] = [line for line in row["evidence"] if line.startswith(f"refused   {name}, 1 ")]
        assert re.search(rf"{kind}: .*(?:{reason})", line), line
        assert line in row["text"]
