"""Measuring: gate and clock for candidates, in a worker process that survives what they do."""

from attnreg.measure.candidates import About, Bench, Candidate, Died, Opened, Plan, Refusal, Round, Verdict
from attnreg.measure.client import Worker
from attnreg.measure.local import LocalBench

__all__ = [
    "About",
    "Bench",
    "Candidate",
    "Died",
    "LocalBench",
    "Opened",
    "Plan",
    "Refusal",
    "Round",
    "Verdict",
    "Worker",
]
