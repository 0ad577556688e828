"""Law: what the documents say of the code is what the code says."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attnreg
from attnreg import errors, hookspecs, masks, registry, scores, sparsity
from attnreg.cli import app, commands
from attnreg.variants import VARIANTS, Variant

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def between(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*)<!-- /{name} -->", text, re.S)
    assert found is not None
    return found.group(1).strip()


def test_the_readmes_table_of_variants_is_what_the_command_prints() -> None:
    assert commands.variants
    printed = CliRunner().invoke(app, ["variants", "--markdown"])
    assert printed.exit_code == 0
    assert between(README, "variants") == printed.stdout.strip(), "run: attnreg variants --markdown"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_the_code_of_a_variant_makes_its_spec(variant: Variant) -> None:
    names = {n: getattr(attnreg, n) for n in ("AttentionSpec", "HeadGrouping", "Precision")}
    modules = {"masks": masks, "scores": scores, "sparsity": sparsity, "mask_mod": None}
    if "mask_mod" in variant.code:
        assert isinstance(variant.spec.mask, masks.Custom)
        return
    made = eval(variant.code, {**names, **modules})  # the table is ours, and this is what its readers do
    heads = {"heads": made.heads} if made.heads else {}
    assert made == variant.spec.model_copy(update=heads)


def test_every_hook_is_documented_with_its_signature() -> None:
    told = between((ROOT / "docs" / "plugins.md").read_text(), "hooks")
    hooks = [n for n, f in vars(hookspecs).items() if n.startswith("attnreg_") and inspect.isfunction(f)]
    assert len(hooks) == 3
    for name in hooks:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
        assert f"`{name}({arguments})`" in told


def test_the_error_tree_of_the_docstring_is_the_tree() -> None:
    drawn = set(re.findall(r"\w+Error", errors.__doc__ or ""))
    assert set(errors.__all__) == {
        n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, Exception)
    }
    assert set(errors.__all__) <= drawn
    assert all(issubclass(getattr(errors, name), errors.AttnregError) for name in errors.__all__)


@pytest.mark.parametrize("command", ["doctor", "explain", "tune", "db", "bench", "plugins"])
def test_the_commands_of_the_contract_exist(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_example_plugin_loads_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugin"))
    with registry.using(registry.load({"ATTNREG_PLUGINS": "attnreg_baddbmm"})) as loaded:
        assert loaded.get("baddbmm").origin == "ATTNREG_PLUGINS"
        q = torch.randn(1, 2, 5, 8)
        spec = attnreg.AttentionSpec(mask=masks.Causal())
        with attnreg.use_backend("baddbmm"):
            got = attnreg.attention(spec, q, q, q)
        torch.testing.assert_close(got, attnreg.attention(spec, q, q, q))
        with attnreg.use_backend("baddbmm"), pytest.raises(errors.UnsupportedError, match="softcap: no place"):
            attnreg.attention(attnreg.AttentionSpec(softcap=3.0), q, q, q)
    sys.modules.pop("attnreg_baddbmm", None)
