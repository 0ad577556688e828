"""The native CPU backend on the public table."""

import pytest

from attnreg.testing import BackendConformance, cases
from attnreg_cpu.native import NativeBackend


class TestCpu(BackendConformance):
    backend = NativeBackend()


@pytest.mark.slow
class TestCpuLarger(BackendConformance):
    backend = NativeBackend()
    cases = cases(slow=True)
    configurations = 6
