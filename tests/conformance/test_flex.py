"""FlexAttention on a part of the table: each row compiles for seconds; torch has no backward and no lse on the CPU."""

import pytest

from attnreg.testing import BackendConformance, cases
from attnreg_flex import Flex
from attnreg_flex.backend import compiler_missing

pytestmark = pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "-")

ROWS = (
    "causal/normal_129x129/float32", "causal/low_63x127/float32", "padding/huge_65x192/float32",
    "window/empty_100x63/float32", "document_causal/normal_65x65/bfloat16", "bias/edges_65x65/float32",
    "alibi/normal_129x129/float32", "softcap/normal_129x129/float32", "composed/normal_129x129/float32",
)  # fmt: skip


class TestFlex(BackendConformance):
    backend = Flex()
    cases = tuple(case.bare() for case in cases() if case.name in ROWS)
    configurations = 0
    poison = False

    def test_the_rows_are_in_the_table(self) -> None:
        assert len(self.cases) == len(ROWS)


@pytest.mark.slow
class TestFlexWhole(BackendConformance):
    backend = Flex()
    cases = tuple(case.bare() for case in cases(slow=True))
    poison = False
