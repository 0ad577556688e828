"""Lists what each backend refused, in the terminal summary: a refusal is a result, not a skip."""

from collections import Counter
from typing import Any

from attnreg.testing.conformance import listed_refusals


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for backend, refused in listed_refusals().items():
        terminalreporter.section(f"{backend}: refuses {len(refused)} cases")
        reasons = Counter("; ".join(why) for why in refused.values())
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:4} x {reason}")
