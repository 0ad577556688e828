"""Programs that run where attnreg has to do without something, and what they warned of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LAUNCHER = Path(__file__).with_name("elsewhere.py")
RECORDS = Path(__file__).parents[1] / "unit"
ROOT = Path(__file__).parents[2]
DROPPED = (
    "HOME",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "ATTNREG_CACHE_DIR",
    "ATTNREG_DATA_DIR",
    "XDG_CACHE_HOME",
    "XDG_DATA_HOME",
)
UNKNOWN_USER = ("--unknown-user",)

BEFORE = """
import json, sys, warnings
sys.path.insert(0, {records!r})
warnings.simplefilter("always")
caught = warnings.catch_warnings(record=True)
warned = caught.__enter__()
said = {{}}
"""
AFTER = """
print(json.dumps([said, [str(w.message) for w in warned if str(w.message).startswith("attnreg:")]]))
"""


@dataclass(frozen=True)
class Ran:
    """said: what the program put into `said`. warned: attnreg's warnings, in their order."""

    said: dict[str, Any]
    warned: list[str]


Run = Callable[..., Ran]


@pytest.fixture
def run() -> Run:
    """`run(program, conditions, **environ)`: a Python program under conditions of elsewhere.py; None drops a variable."""

    def start(program: str, conditions: Sequence[str] = (), **environ: str | None) -> Ran:
        whole = BEFORE.format(records=str(RECORDS)) + textwrap.dedent(program) + AFTER
        command = [sys.executable, str(LAUNCHER), *map(str, conditions), "--", sys.executable, "-c", whole]
        done = subprocess.run(command, env=_environ(environ), capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        said, warned = json.loads(done.stdout.splitlines()[-1])
        return Ran(said, warned)

    return start


def _environ(changes: Mapping[str, str | None]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return kept | {"PYTHONPATH": path} | {name: str(value) for name, value in changes.items() if value is not None}
