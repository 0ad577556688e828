"""Search spaces, refusals and compiler signatures of the flash backends: all without starting a kernel."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attnreg import AttentionSpec, Hardware, Problem, masks
from attnreg_triton import support
from attnreg_triton.flash import TritonDecode, TritonFlash

GPUS = {
    "sm_80": Hardware("cuda", "nvidia", "a100", "sm_80", 108, 0, (), (0, 0, 0), 166912, 65536, 32),
    "sm_86": Hardware("cuda", "nvidia", "a10", "sm_86", 72, 0, (), (0, 0, 0), 101376, 65536, 32),
    "sm_90": Hardware("cuda", "nvidia", "h100", "sm_90", 132, 0, (), (0, 0, 0), 232448, 65536, 32),
    "sm_100": Hardware("cuda", "nvidia", "b200", "sm_100", 148, 0, (), (0, 0, 0), 232448, 65536, 32),
    "gfx942": Hardware("hip", "amd", "mi300x", "gfx942", 304, 0, (), (0, 0, 0), 65536, 131072, 64),
    "gfx1100": Hardware("hip", "amd", "rx7900", "gfx1100", 96, 0, (), (0, 0, 0), 65536, 196608, 32),
}

DEVICE = {"kernel", "triton.jit"}
"""Decorators of functions that run on the device."""


def problem(dtype: str = "bfloat16", head_dim: int = 128, **sizes: object) -> Problem:
    """A causal problem on a GPU; sizes override."""
    plain: dict[str, object] = {"batch": 2, "q_heads": 32, "kv_heads": 8, "sq": 4096, "skv": 4096}
    plain |= {"head_dim": head_dim, "head_dim_k": head_dim, "head_dim_v": head_dim, "device": "cuda"}
    spec = AttentionSpec(mask=masks.Causal())
    return Problem(**({"spec": spec, "dtype": dtype, "kv_dtype": dtype} | plain | sizes))  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 96, 100, 128, 192, 200, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("grads", ["", "qkv"])
def test_seeds_lie_in_the_space(gpu: str, head_dim: int, dtype: str, grads: str) -> None:
    """Every architecture, head and direction has a default and seeds that its own constraints let through."""
    asked = problem(dtype, head_dim, grads=frozenset(grads))
    space = TritonFlash().space(asked, GPUS[gpu])
    assert space.reasons(space.default) == []
    assert len(space.seeds) >= 1
    assert dict(space.seeds[0]) == dict(space.default)
    assert space.size > 100


def test_constraints_drop_what_cannot_fit() -> None:
    """A tile whose stages exceed shared memory, or whose accumulators exceed the registers, is out, with the reason."""
    space = TritonFlash().space(problem(head_dim=256), GPUS["sm_86"])
    wide = {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 3}
    assert any("shared memory" in reason for reason in space.reasons(wide))
    thin = {"block_m": 128, "block_n": 128, "num_warps": 2, "num_stages": 1}
    assert any("registers" in reason for reason in space.reasons(thin))


def test_decode_seeds_fill_the_machine() -> None:
    """One sequence of a long cache splits until most multiprocessors work; a large batch does not split."""
    one = problem(batch=1, sq=1, skv=131072)
    many = problem(batch=64, sq=1, skv=8192)
    for gpu in ("sm_80", "sm_90", "gfx942"):
        split = int(TritonDecode().space(one, GPUS[gpu]).default["splits"])
        assert 8 * split >= 0.7 * GPUS[gpu].cores or split >= 32
        assert TritonDecode().space(many, GPUS[gpu]).default["splits"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float64", "kv_dtype": "float64"}, "float64"),
        ({"kv_dtype": "int8"}, "int8"),
        ({"head_dim": 300, "head_dim_k": 300}, "300"),
        ({"head_dim_v": 257}, "257"),
        ({"spec": AttentionSpec(mask=masks.Chunked(16))}, "no band"),
        ({"spec": AttentionSpec(mask=masks.Causal() | masks.Padding())}, "no band"),
        ({"spec": AttentionSpec(page_size=16), "grads": frozenset("q"), "pages": 8}, "gradient"),
        ({"skv": 2**30}, "keys"),
    ],
)
def test_refusals_name_the_reason(change: dict[str, object], words: str) -> None:
    reasons = TritonFlash().supports(replace(problem(), **change), GPUS["sm_90"])  # type: ignore[arg-type]  # fields by name
    assert any(words in reason for reason in reasons), reasons


def test_the_machine_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(GPUS["sm_80"], arch="sm_75")
    assert any("too old" in reason for reason in TritonFlash().supports(problem(), old))
    unknown = replace(GPUS["gfx942"], arch="gfx803")
    assert any("gfx803" in reason for reason in TritonFlash().supports(problem(), unknown))
    assert TritonFlash().supports(problem(), GPUS["gfx942"]) == []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cpu = replace(problem(), device="cpu")
    assert any("CPU" in reason for reason in TritonFlash().supports(cpu, GPUS["sm_80"]))
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert any("not installed" in reason for reason in TritonFlash().supports(problem(), GPUS["sm_80"]))


def test_kernels_read_all_that_they_take() -> None:
    """No argument is bound, specialised and passed for nothing."""
    checked = 0
    for path in Path(support.__file__).parent.glob("*.py"):
        for found in ast.walk(ast.parse(path.read_text())):
            if isinstance(found, ast.FunctionDef) and {ast.unparse(x) for x in found.decorator_list} & DEVICE:
                read = {x.id for x in ast.walk(found) if isinstance(x, ast.Name)}
                assert {x.arg for x in found.args.args} <= read, (path.name, found.name)
                checked += 1
    assert checked > 20


def test_asking_loads_no_kernel() -> None:
    """Importing the plugin, asking for support and for a space loads none of the modules that need Triton."""
    code = (
        "import sys; import attnreg_triton as t; from attnreg import *; from attnreg.hardware import detect\n"
        "p = Problem(AttentionSpec(), 1, 1, 1, 8, 8, 16, 16, 16)\n"
        "for b in t.attnreg_backends(): b.supports(p, detect('cpu')); b.space(p, detect('cpu'))\n"
        "loaded = [m for m in sys.modules if m.startswith('attnreg_triton.') and m.split('.')[1] in\n"
        "          ('tile', 'band', 'flash_forward', 'flash_backward', 'flash_merge', 'flash_bias')]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
