"""The conformance kit over the example plugin of docs/plugins.md, as its author would run it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "plugin"))

from attnreg_baddbmm import Baddbmm

from attnreg.testing import BackendConformance


class TestBaddbmm(BackendConformance):
    backend = Baddbmm()
