"""A data folder of its own for every test of the tuner, and the planted plugin behind real entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attnreg import registry, store
from attnreg.store import Store

PLANTED = Path(__file__).parent / "planted"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Records and studies go to the test's folder; nothing shipped is seen."""
    monkeypatch.setenv("ATTNREG_DATA_DIR", str(tmp_path / "data"))
    with store.using(Store(tmp_path / "data" / "tuning_db", None)) as own:
        yield own


@pytest.fixture
def planted(install_plugin: Callable[[str, str], None], loaded: Callable[[], registry.Registry]) -> registry.Registry:
    """The planted plugin, installed as a distribution with an entry point, and loaded."""
    install_plugin("planted_plugin", (PLANTED / "planted_plugin.py").read_text())
    return loaded()
