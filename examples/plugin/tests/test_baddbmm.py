"""The conformance kit over the example plugin: three lines, and every claim of the backend is held to the oracle."""

from attnreg_baddbmm import Baddbmm

from attnreg.testing import BackendConformance


class TestBaddbmm(BackendConformance):
    backend = Baddbmm()
