"""Ways to ask for a derivative: each takes a function of tensors and the tensors, and gives the derivatives it found.

The same way runs on attention in float32 or less and on the reference in float64.
"""

from __future__ import annotations

import derivative_first  # noqa: F401  # importing it fills the tables
import derivative_higher  # noqa: F401  # as above
from derivative_tables import FIRST, FORWARD, SECOND, Function, Way

__all__ = ["FIRST", "FORWARD", "SECOND", "WAYS", "Function", "Way"]

WAYS: dict[str, Way] = {**FIRST, **SECOND, **FORWARD}
