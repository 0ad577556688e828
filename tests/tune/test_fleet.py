"""Many workers on one study set, in a real PostgreSQL server that the test starts for itself."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Debian keeps the server's programs outside of PATH.
FOLDERS = os.pathsep.join([os.environ.get("PATH", ""), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)])
PROGRAMS = {name: shutil.which(name, path=FOLDERS) for name in ("initdb", "pg_ctl", "postgres")}
WORKERS = 3

WORKER = """
import sys, time
import optuna
from attnreg.space import SearchSpace
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.search import Search, make_sampler
from attnreg.tuning.storage import open_storage, open_study
optuna.logging.set_verbosity(optuna.logging.ERROR)
space = JointSpace({"a": SearchSpace({"m": tuple(range(6)), "n": (1, 2, 3)}), "b": SearchSpace()})
study = open_study(open_storage(sys.argv[1]), "fleet", make_sampler(int(sys.argv[2])))
search = Search(study, space, [])
mine = 0
while (proposal := search.ask()) is not None:
    time.sleep(0.05)
    search.tell(proposal, 1.0 + proposal.candidate.config.get("m", 9))
    mine += 1
print(mine)
"""


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a fresh server on a socket in a temporary folder."""
    missing = [name for name, path in PROGRAMS.items() if path is None]
    if missing:
        pytest.skip(f"needs PostgreSQL's {', '.join(missing)}")
    pytest.importorskip("psycopg", reason="needs the psycopg driver")
    root = os.geteuid() == 0
    if root and subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    as_user = ["runuser", "-u", "postgres", "--"] if root else []
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:  # a socket's path must be short
        if root:
            shutil.chown(folder, "postgres")
        data = Path(folder) / "data"

        def run(name: str, *args: str) -> None:
            program = PROGRAMS[name]
            assert program is not None
            subprocess.run([*as_user, program, *args], check=True, capture_output=True, cwd=folder)

        run("initdb", "-D", str(data), "-U", "postgres", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-D", str(data), "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")


def test_workers_share_one_study_and_look_at_each_point_once(server: str) -> None:
    command = [sys.executable, "-c", WORKER, server]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(WORKERS)]
    counts = []
    for process in running:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0
        counts.append(int(out))
    assert sum(counts) == 19
    assert sum(count > 0 for count in counts) >= 2
