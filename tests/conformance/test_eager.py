"""The eager backend on the public table; it refuses nothing."""

import pytest

from attnreg.testing import BackendConformance, cases
from attnreg.testing.conformance import listed_refusals
from attnreg_eager.backend import Eager


class TestEager(BackendConformance):
    backend = Eager()

    def test_nothing_is_refused(self) -> None:
        self.test_refusals()
        assert "eager" not in listed_refusals()


@pytest.mark.slow
class TestEagerLarger(BackendConformance):
    backend = Eager()
    cases = cases(slow=True)
