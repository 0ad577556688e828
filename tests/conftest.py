"""Shared fixtures (third-party plugins as real distributions, an empty hot table), and the list of what was refused."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnreg import hot, registry
from attnreg.testing.conformance import listed_refusals

PluginMaker = Callable[[str, str], None]

of_workers: dict[str, dict[str, list[str]]] = {}

LONGEST = (
    "test_decode_native", "test_sanitised", "test_replay", "test_flex", "test_resume", "test_studies", "test_compilers",
    "test_killed", "test_ahead", "test_fleet", "test_eager_traced",
)  # fmt: skip
"""Files whose tests take tens of seconds, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests say why they do not run; `slow` ones run only when asked for by -m. Long tests start first, so that
    no core waits in the end for one that another began last."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    reason = "needs a CUDA or HIP device, and torch sees none here"
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands what its backends refused to the process that writes the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["refusals"] = listed_refusals()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for backend, refused in getattr(node, "workeroutput", {}).get("refusals", {}).items():
        of_workers.setdefault(backend, {}).update(refused)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Lists what each backend of the conformance kit refused: a refusal is a result, not a skip."""
    for backend, refused in sorted({**listed_refusals(), **of_workers}.items()):
        terminalreporter.section(f"{backend}: refuses {len(refused)} cases")
        reasons = Counter("; ".join(why) for why in refused.values())
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:4} x {reason}")


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginMaker]:
    """Make a distribution with an entry point of group `attnreg` importable: `install_plugin(name, source)`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made: list[str] = []

    def install(name: str, source: str) -> None:
        (site / f"{name}.py").write_text(textwrap.dedent(source))
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[attnreg]\n{name} = {name}\n")
        importlib.invalidate_caches()
        made.append(name)

    yield install
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def loaded(install_plugin: PluginMaker) -> Iterator[Callable[[], registry.Registry]]:
    """Load the registry anew, with whatever was installed, and put it in force for the test."""
    stack: list[object] = []

    def load() -> registry.Registry:
        manager = registry.using(registry.load())
        stack.append(manager)
        return manager.__enter__()

    yield load
    for manager in reversed(stack):
        manager.__exit__(None, None, None)  # type: ignore[attr-defined]  # a context manager


@pytest.fixture
def fresh() -> Iterator[hot.HotTable]:
    """An empty hot table."""
    with hot.fresh_table() as table:
        yield table
