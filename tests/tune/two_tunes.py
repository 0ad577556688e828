"""By hand, on a quiet machine: tune problems of the suites twice from nothing, and see whether the two agree.

    python tests/tune/two_tunes.py [--seconds 10] [--only TEXT]

Each tune has a seed, a study and a worker of its own, and no records to start from. Two agree where they pick the same,
or where one names the other's pick as a tie. Exits with 1 where two do not.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from attnreg import store
from attnreg.measure import Candidate
from attnreg.store import Store
from attnreg.suites import suite
from attnreg.tuning import Options, TuneReport, tune_problem

CASES = {
    "prefill": ("causal S512", "causal B8 S128", "causal GQA 32/8 D128 S1024"),
    "decode": ("decode MQA 16K D64", "decode GQA 32/8 B8 2K bfloat16"),
    "train": ("train S1024",),
}


def tune(name: str, seconds: float, seed: int) -> TuneReport:
    """One tune of a suite's problem, from nothing."""
    [problem] = [c.problem for kind in CASES for c in suite(kind) if c.name == name]
    with tempfile.TemporaryDirectory() as folder, store.using(Store(Path(folder) / "tuning_db", None)):
        options = Options(
            seconds=seconds, seed=seed, storage=f"{folder}/study.journal", backends=("cpu", "sdpa", "eager")
        )
        return tune_problem(problem, options)


def text(report: TuneReport, other: TuneReport) -> str:
    """A tune's winner, and how it saw the other's."""
    assert report.winner is not None
    assert other.winner is not None
    head = f"{report.winner}, {(report.seconds or 0) * 1e3:.4g} ms, {report.trials} trials, {len(report.ties)} ties"
    head += f", {report.rounds} rounds{', NOISY' if report.noisy else ''}"
    if report.winner == other.winner:
        return head
    theirs = [t for t in report.ties if Candidate(t.backend, t.config) == other.winner]
    looked = [x for x in report.looked if x.candidate == other.winner]
    seen = f"looked at, {looked[0].seconds / report.looked[0].seconds:.4f}x the fastest" if looked else "not looked at"
    return f"{head}; the other's: {f'a tie at {theirs[0].ratio}' if theirs else seen}"


def main() -> int:
    """Tune, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    failed = 0
    for name in (name for names in CASES.values() for name in names if given.only in name):
        one, two = (tune(name, given.seconds, seed) for seed in (0, 1))
        agreed = one.agrees(two)
        failed += not agreed
        same = one.winner == two.winner
        print(f"{name}: {'the same' if same else 'a tie' if agreed else 'DISAGREE'}")
        print(f"  {text(one, two)}\n  {text(two, one)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
