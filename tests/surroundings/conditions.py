"""Run something where attnreg has to do without, in a fork or a process of its own, and hear what it warned of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elsewhere

from attnreg.folders import choice, locks
from attnreg_cpu import build, toolchain

UNKNOWN_USER = ("--unknown-user",)
ROOT = Path(__file__).parents[2]
DROPPED = (
    "HOME", "USER", "LOGNAME", "TMPDIR", "ATTNREG_CACHE_DIR", "ATTNREG_DATA_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME",
)  # fmt: skip

BEFORE = """
import json, sys, warnings
sys.path.insert(0, {unit!r})
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
    """said: what it gave back. warned: attnreg's warnings, in their order."""

    said: dict[str, Any]
    warned: list[str]


def forked(work: Callable[[], dict[str, Any]], conditions: Sequence[str] = (), **environ: str) -> Ran:
    """Run `work` in a fork that knows nothing of folders and compilers yet; it must not use torch's threads."""
    incoming, outgoing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(outgoing, "w") as answer:
            answer.write(_in_the_fork(work, conditions, environ))
        os._exit(0)
    os.close(outgoing)
    with os.fdopen(incoming) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    said, warned = json.loads(text)
    assert "failed" not in said, said["failed"]
    return Ran(said, warned)


def _in_the_fork(work: Callable[[], dict[str, Any]], conditions: Sequence[str], environ: Mapping[str, str]) -> str:
    try:
        os.environ.update(environ)
        for name in set(DROPPED) - set(environ):
            os.environ.pop(name, None)
        build.find_compiler.cache_clear()
        for known in (choice._told, choice._faults, locks._told, toolchain._faults):
            known.clear()
        elsewhere.enter(conditions)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            said = work()
        return json.dumps([said, [str(w.message) for w in warned if str(w.message).startswith("attnreg:")]])
    except BaseException:
        return json.dumps([{"failed": traceback.format_exc()}, []])


def started(program: str, conditions: Sequence[str] = (), **environ: str) -> Ran:
    """Run a Python program, which puts what it has to say into the dictionary `said`, in a process of its own."""
    whole = BEFORE.format(unit=str(ROOT / "tests" / "unit")) + textwrap.dedent(program) + AFTER
    command = [sys.executable, elsewhere.__file__, *conditions, "--", sys.executable, "-c", whole]
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        command, env={**kept, "PYTHONPATH": path, **environ}, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    said, warned = json.loads(done.stdout.splitlines()[-1])
    return Ran(said, warned)
