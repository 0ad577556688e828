"""Law: the import contracts cover every module; a new one cannot stand outside of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import attnreg

ROOT = Path(__file__).parents[2]
PUBLIC = {"blocks", "errors", "folders", "masks", "scores", "sparsity", "targets", "testing"}


def contract(kind: str) -> dict[str, Any]:
    toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    data = toml.loads((ROOT / "pyproject.toml").read_text())
    found: dict[str, Any] = next(c for c in data["tool"]["importlinter"]["contracts"] if c["type"] == kind)
    return found


def modules() -> set[str]:
    folder = ROOT / "attnreg"
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    return files | {p.parent.name for p in folder.glob("*/__init__.py")}


def test_every_internal_module_is_closed_to_plugins() -> None:
    closed = {name.removeprefix("attnreg.") for name in contract("protected")["protected_modules"]}
    assert closed == modules() - PUBLIC


def test_public_modules_are_public_names() -> None:
    assert set(attnreg.__all__) >= PUBLIC


@pytest.mark.parametrize("folder", ["attnreg", "plugins"])
def test_no_module_grows_past_five_hundred_lines(folder: str) -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for suffix in ("*.py", "*.h", "*.cpp")
        for path in (ROOT / folder).rglob(suffix)
    }
    assert {name: n for name, n in sizes.items() if n > 500} == {}
