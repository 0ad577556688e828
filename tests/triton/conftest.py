"""Kernels on CPU tensors: TRITON_INTERPRET=1 must stand before Triton is imported, so these tests run alone."""

import os
import sys
from collections.abc import Iterator

import pytest

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _interpreted() -> bool:
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    # The standard library of kernels was decorated when Triton was first imported, with or without the interpreter.
    return isinstance(triton.language.standard.sum, InterpretedFunction)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    mine = [item for item in items if str(item.path).startswith(here) and "gpu" not in item.keywords]
    if mine and not _interpreted():
        reason = "Triton was imported without TRITON_INTERPRET=1; run these alone: pytest tests/triton"
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def kernels_stay_inside_their_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """No interpreted kernel of any test here reads or writes outside the tensors of its launch."""
    if not _interpreted():
        yield
        return
    from memory_guard import guarded
    from quick_interpreter import quick

    with quick(), guarded():
        yield
