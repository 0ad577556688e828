"""The tuner: search, race and record; the only package that imports Optuna."""

from attnreg.modes import autotune
from attnreg.tuning.api import known, tune, tune_all, tune_missing
from attnreg.tuning.recorder import Recorder, read_problems, record, write_problems
from attnreg.tuning.report import Progress, TuneReport
from attnreg.tuning.session import Options, tune_problem

__all__ = [
    "Options",
    "Progress",
    "Recorder",
    "TuneReport",
    "autotune",
    "known",
    "read_problems",
    "record",
    "tune",
    "tune_all",
    "tune_missing",
    "tune_problem",
    "write_problems",
]
