"""Law: a search space holds what a record can hold, or says at once what it cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnreg import SearchSpace, errors


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"n": np.array([1, 2])}, "expected ints, finite floats, bools or names, got"),
        ({"n": (1.0, float("nan"))}, "got nan"),
        ({"n": (None, 1)}, "got None"),
        ({"n": ("a/b",)}, "got 'a/b'"),
        ({"n[/red]": (1,)}, "expected a name of letters"),
        ({"n": (1, 1)}, "needs distinct values"),
        ({"n": ()}, "needs distinct values"),
    ],
    ids=str,
)
def test_what_no_record_holds_is_refused(choices: Any, said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said.replace("[", r"\[")):
        SearchSpace(choices)


def test_what_a_record_holds_is_taken() -> None:
    space = SearchSpace({"n": (1, 2), "x": (0.5,), "on": (True, False), "kernel": ("flash", "math")})
    assert space.default == {"n": 1, "x": 0.5, "on": True, "kernel": "flash"}
