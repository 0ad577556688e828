"""The torch SDPA backend on the public table."""

import pytest

from attnreg.testing import BackendConformance, cases
from attnreg_sdpa import Sdpa


class TestSdpa(BackendConformance):
    backend = Sdpa()


@pytest.mark.slow
class TestSdpaLarger(BackendConformance):
    backend = Sdpa()
    cases = cases(slow=True)
