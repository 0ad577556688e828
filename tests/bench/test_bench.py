"""Law: the bench times only right answers, pairs by round, drops disturbed rounds, holds claims to measurements."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnreg import errors, masks
from attnreg.bench import peers, run
from attnreg.bench.chart import write_chart
from attnreg.bench.claims import CLAIMS, Claim
from attnreg.bench.overhead import measure_overhead
from attnreg.bench.peaks import PeakLoops, Peaks
from attnreg.bench.report import hold, markdown, to_json
from attnreg.bench.run import OURS, CaseResult, Contestant, Options, run_case
from attnreg.cli import app, commands
from attnreg.hardware import detect
from attnreg.sparsity import BigBird
from attnreg.spec import AttentionSpec
from attnreg.suites import SUITES, Case, attention_problem, suite
from attnreg.testing import check_inputs, make_inputs

pytestmark = pytest.mark.alone

PEAKS = Peaks(1e11, 1e10, "a test")
MACHINE: dict[str, Any] = {
    "hardware": "cpu-test",
    "threads": 2,
    "memory": "1 GiB memory",
    "versions": "torch",
    "date": "today",
    "command": "x",
}
CAUSAL = AttentionSpec(mask=masks.Causal())


def small_loops() -> PeakLoops:
    return PeakLoops(detect("cpu"), 2, size=1 << 20, rounds=1000)


SMALL = {
    "full": attention_problem(AttentionSpec(), (2, 2), 64, 64, 16),
    "causal grouped": attention_problem(CAUSAL, (4, 2), 64, 64, 16),
    "half": attention_problem(CAUSAL, (2, 2), 64, 64, 16, dtype="bfloat16"),
    "decode": attention_problem(CAUSAL, (4, 1), 1, 96, 16, batch=2),
    "decode half": attention_problem(CAUSAL, (4, 2), 1, 96, 16, dtype="float16"),
    "window": attention_problem(AttentionSpec(mask=masks.Causal() & masks.SlidingWindow(20)), (2, 2), 600, 600, 16),
    "documents": attention_problem(AttentionSpec(mask=masks.Causal() & masks.Document()), (2, 2), 64, 64, 16),
    "bigbird": attention_problem(AttentionSpec(sparsity=BigBird(8)), (2, 2), 128, 128, 16),
    "prefix": attention_problem(AttentionSpec(mask=masks.PrefixLM(20)), (2, 2), 64, 64, 16),
    "train": attention_problem(CAUSAL, (2, 2), 64, 64, 16, grad=True),
}


TORCH_PEERS = [n for n in peers.PEERS if not n.startswith(("flex", "onnx", "openvino"))]


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_a_peer_is_right_on_what_it_takes_and_takes_something(name: str) -> None:
    taken = 0
    for problem in SMALL.values():
        inputs = run._inputs(problem)
        try:
            call = peers.PEERS[name](inputs.problem, inputs)
        except peers.UnfitError:
            continue
        verdict = check_inputs(peers.copied(call), inputs, poison=False)
        assert verdict.ok, f"{problem}: {verdict.reason}"
        taken += 1
    assert taken


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_runtime_is_right_where_it_is_installed_and_says_so_where_it_is_not(name: str) -> None:
    installed = all(
        importlib.util.find_spec(part) for part in {"onnxruntime": ("onnx", "onnxruntime")}.get(name, (name,))
    )
    for problem in (SMALL["full"], SMALL["decode"]):
        inputs = run._inputs(problem)
        if not installed:
            with pytest.raises(peers.UnfitError, match="installed"):
                peers.PEERS[name](inputs.problem, inputs)
            continue
        verdict = check_inputs(peers.copied(peers.PEERS[name](inputs.problem, inputs)), inputs, poison=False)
        assert verdict.ok, f"{problem}: {verdict.reason}"


def test_a_peer_that_is_wrong_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"zeros": lambda p, i: lambda q, k, v, **named: torch.zeros_like(q)}
    monkeypatch.setattr(run, "PEERS", wrong)
    result = run_case("prefill", Case("tiny", SMALL["full"]), Options(rounds=2, sample_seconds=0), small_loops())
    assert result.get("zeros").samples == ()
    assert result.get("zeros").why.startswith("wrong: ")
    assert len(result.get(OURS).samples) == 2


def test_ratios_are_paired_by_round() -> None:
    ours, peer = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    low, middle, high = run._ratio(peer, ours, 0.95)
    assert (low, middle, high) == pytest.approx((2.0, 2.0, 2.0))


class Scripted:
    """Probes that answer what they are told."""

    def __init__(self, answers: list[bool]) -> None:
        self.answers = answers

    def quiet(self) -> bool:
        return self.answers.pop(0) if self.answers else True


def test_disturbed_rounds_are_dropped_and_counted() -> None:
    clock = run.Clock(detect("cpu"), "warm", 0.0)
    calls = {OURS: lambda: None, "peer": lambda: None}
    samples, dropped = run._rounds(calls, clock, Scripted([True, True, False]), Options(rounds=4))  # type: ignore[arg-type]
    assert dropped == 1
    assert {len(s) for s in samples.values()} == {4}
    samples, dropped = run._rounds(calls, clock, Scripted([False] * 999), Options(rounds=4))  # type: ignore[arg-type]
    assert dropped == 12, "a machine that is never quiet is said to be so, and its last rounds are kept"
    assert {len(s) for s in samples.values()} == {4}


def result(case: str, share: float = 0.5, **ratios: float) -> CaseResult:
    contestants = [Contestant(OURS, (1e-3, 1e-3)), Contestant("flex 64", why="no compiler")]
    contestants += [Contestant(name, (ratio * 1e-3,)) for name, ratio in ratios.items()]
    spread = {name: (ratio * 0.9, ratio, ratio * 1.1) for name, ratio in ratios.items()}
    return CaseResult("prefill", case, SMALL["full"], "cpu()", tuple(contestants), spread, 1, (share, share), PEAKS)


def test_claims_are_held_against_what_was_measured() -> None:
    held = hold([result("full D64 S2048", sdpa=1.4, eager=1.1), result("decode MHA 4K float32", share=0.81, sdpa=1.0)])
    assert [(h.claim.peer, h.met) for h in held] == [
        ("sdpa", True), ("best peer", False), ("read", True), ("sdpa", False),
    ]  # fmt: skip
    missing = hold([result("window 256 S8192", sdpa=31.0)])
    assert [h.met for h in missing] == [True, None]


def test_a_quantised_cache_is_held_against_the_case_it_names() -> None:
    slow = result("decode MHA 4K bfloat16", sdpa=9.0)
    fast = result("decode MHA 4K int8 cache")
    quick = replace(fast, contestants=(Contestant(OURS, (5e-4,)),))
    assert [h.met for h in hold([slow, quick]) if h.case == fast.case] == [True]
    assert [h.met for h in hold([slow, fast]) if h.case == fast.case] == [False]


def test_every_claim_names_a_case_of_the_suites_and_a_contestant() -> None:
    names = {case.name for name in SUITES for case in suite(name)}
    assert set(CLAIMS) <= names
    for claim in (c for claims in CLAIMS.values() for c in claims):
        assert isinstance(claim, Claim)
        assert claim.peer in {*peers.PEERS, "best peer", "read"} | names


@pytest.mark.parametrize("name", ["sdpa math", "eager", "flex 64", "flex 128", "onnxruntime", "openvino"])
def test_a_peer_that_holds_every_pair_sits_out_where_that_would_take_all_memory(name: str) -> None:
    [case] = suite("long")
    with pytest.raises(peers.UnfitError, match="query-key pairs, since it holds them all"):
        peers.PEERS[name](case.problem, make_inputs(case.problem))


def test_documents_hold_every_sample_and_say_what_did_not_run(tmp_path: Path) -> None:
    results = [result("full D64 S2048", sdpa=1.4)]
    data = json.loads(json.dumps(to_json(results, MACHINE)))
    assert data["cases"][0]["contestants"][2] == {"name": "sdpa", "samples": [1.4e-3], "why": ""}
    text = markdown(results, MACHINE, {"tuner": "a table"})
    assert text.rstrip().endswith("## tuner\n\n```\na table\n```")
    assert "# Benchmarks" in markdown([], MACHINE)
    assert "| full D64 S2048 | at least 1.35x sdpa | 1.40x (1.26 to 1.54) sdpa | met |" in text
    assert "no compiler" in text
    for end in (".html", ".svg"):
        write_chart(tmp_path / f"chart{end}", results, MACHINE)
        drawn = (tmp_path / f"chart{end}").read_text()
        assert "1.40x" in drawn
        assert drawn.count("<svg") == 1
    with pytest.raises(errors.InputError, match=r"\.html, \.svg or \.png"):
        write_chart(tmp_path / "chart.gif", results, MACHINE)


def test_too_few_rounds_for_an_interval_are_said_and_are_null_in_json() -> None:
    few = result("full D64 S2048", sdpa=1.4)
    for n, said in ((1, "1 round"), (2, "2 rounds")):
        contestants = tuple(Contestant(c.name, (1e-3,) * n if c.samples else (), c.why) for c in few.contestants)
        now = replace(few, contestants=contestants, ratios={"sdpa": run._ratio([1.4] * n, [1.0] * n, 0.95)})
        assert f"| 1.40x (no interval from {said}) |" in markdown([now], MACHINE)
        assert hold([now])[0].text == f"1.40x (no interval from {said}) sdpa"
        data = json.loads(json.dumps(to_json([now], MACHINE), allow_nan=False))
        assert data["cases"][0]["ratios"]["sdpa"] == [None, pytest.approx(1.4), None]


def test_peaks_are_loops_with_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = small_loops()
    monkeypatch.setattr("attnreg.bench.peaks.shutil.which", lambda name: None)
    plain = small_loops()
    for loops in (compiled, plain):
        loops.multiply()
        loops.read()
        assert loops.bytes == 1 << 20
    assert compiled.flops % (2 * 1000 * 12) == 0, "rounds x chains of multiply-adds a lane"
    assert "C loops" in compiled.how
    assert "below the true peaks" in plain.how


def test_shares_of_the_peaks_are_paired_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    drifting = {OURS: [1.0, 2.0, 4.0], run.MULTIPLY: [2.0, 4.0, 8.0], run.READ: [0.5, 1.0, 2.0]}
    monkeypatch.setattr(run, "_rounds", lambda *rest: (drifting, 0))
    problem, loops = SMALL["full"], small_loops()
    result = run_case("prefill", Case("tiny", problem), Options(peers=()), loops)
    assert [c.name for c in result.contestants] == [OURS], "the loops take turns but are no contestants"
    assert not result.ratios
    assert result.shares == pytest.approx((2.0 * problem.flops / loops.flops, 0.5 * problem.bytes / loops.bytes))
    assert (result.peaks.flops, result.peaks.read) == (loops.flops / 4.0, loops.bytes / 1.0)


def test_overhead_is_measured_on_the_op_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnreg.bench.overhead.CALLS", 5)
    monkeypatch.setattr("attnreg.bench.overhead.ROUNDS", 3)
    found = measure_overhead()
    assert found.misses <= 15
    assert all(math.isfinite(x) and x > 0 for x in (found.direct, found.hit, found.prepared, found.step))
    assert found.over == found.hit - found.direct


def test_the_command_runs_a_case_and_writes_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands.bench
    tiny = [Case("full D64 S2048", SMALL["full"])]
    monkeypatch.setattr("attnreg.cli.bench.suite", lambda name: tiny)
    out = {end: tmp_path / f"run{end}" for end in (".json", ".html", ".md")}
    said = ["bench", "prefill", "--rounds", "3", "--no-flex", "--json", str(out[".json"])]
    said += ["--chart", str(out[".html"]), "--markdown", str(out[".md"])]
    done = CliRunner().invoke(app, said)
    assert done.exit_code == 0, done.output
    assert "Claims" in done.stdout
    assert all(path.exists() for path in out.values())
    assert "(no interval from 3 rounds)" in done.stdout
    assert "Infinity" not in out[".json"].read_text()
    assert CliRunner().invoke(app, ["bench", "nothing"]).exit_code == 2
