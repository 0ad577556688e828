"""Launches that are kept ready hand the driver what a fresh call would; start_ready.py says how that is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_calls_kept_ready() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("start_ready.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, env=environment, timeout=590
    )
    assert done.returncode == 0, done.stderr[-3000:]
