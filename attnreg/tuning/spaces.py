"""Search spaces as backends give them: a space whose own code breaks when it is walked is none."""

from __future__ import annotations

import itertools
from typing import Any

from attnreg.backend import Backend, error_text, safe_repr
from attnreg.hardware import Hardware
from attnreg.problem import Problem
from attnreg.space import SearchSpace
from attnreg.tuning.joint import POINTS

__all__ = ["usable_space"]


def usable_space(backend: Backend, problem: Problem, hardware: Hardware) -> SearchSpace | str:
    """The backend's search space for the problem; or why it has none that can be searched, to set it aside with."""
    try:
        space: Any = backend.space(problem, hardware)
        if not isinstance(space, SearchSpace):
            return f"its space() must return a SearchSpace, got {safe_repr(space)}"
        for _ in itertools.islice(space.points(), POINTS):
            pass  # its constraints are the backend's own code
        return space
    except (Exception, SystemExit) as error:
        return f"its space() raised {error_text(error)}"
