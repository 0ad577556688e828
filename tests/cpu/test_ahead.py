"""Law: `attnreg build` compiles what a call would, so that the call then needs no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnreg_cpu import library_files

# The command, whose compiler writes through the cache of the other tests: they have most of these libraries too.
BUILD = """
import os, shutil, sys
from pathlib import Path
from attnreg.cli import main
from attnreg_cpu import build, library_files
compile_, shared = build._compile, Path(os.environ["SHARED"])
def through(command, target):
    kept = shared / target.name
    with library_files.locked(kept.with_suffix(".lock")):
        if not library_files.is_whole(kept):
            compile_(command, kept)
    shutil.copyfile(kept, target)
    sys.stdout.write(f"\\ncompiled {target.name}\\n")  # a line of its own, whatever other threads print
build._compile = through
main()
"""
CALL = """
import torch, attnreg
from attnreg_cpu import build
assert build.find_compiler() is None
q = torch.randn(1, 2, 100, 24)
k = torch.randn(1, 2, 100, 24)
for rows, keys in ((q, k), (q[:, :, :1], k), (q[:, :, :1].bfloat16(), k.bfloat16())):
    with attnreg.use_backend("cpu"):
        out = attnreg.attention(attnreg.AttentionSpec(), rows, keys, keys)
    want = torch.nn.functional.scaled_dot_product_attention(rows.float(), keys.float(), keys.float())
    near = 2e-2 if out.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.float(), want, rtol=near, atol=near)
try:
    with attnreg.use_backend("cpu"):
        attnreg.attention(attnreg.AttentionSpec(), q, k.requires_grad_(), k)
except attnreg.errors.UnsupportedError as error:
    assert "`attnreg build --head-dims 24 --dtypes float32`" in str(error), error
else:
    raise AssertionError("gradients were not built")
"""


def test_a_call_finds_what_was_built(tmp_path: Path) -> None:
    shared = library_files.cache_dir()
    shared.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, "ATTNREG_CACHE_DIR": str(tmp_path), "SHARED": str(shared)}
    command = [sys.executable, "-c", BUILD, "build", "--head-dims", "24", "--dtypes", "float32", "--no-gradients"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert "head_k=24" in done.stdout
    libraries = sorted(tmp_path.rglob("*.so"))
    assert libraries
    compiled = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("compiled ")]
    assert sorted(compiled) == [path.name for path in libraries]
    bare = {**environ, "PATH": str(tmp_path / "none"), "CXX": ""}
    subprocess.run([sys.executable, "-c", CALL], env=bare, check=True)
    assert sorted(tmp_path.rglob("*.so")) == libraries, "nothing else was compiled"


@pytest.mark.parametrize(
    ("options", "said"), [(["--dtypes", "float64"], "dtypes: expected"), (["--head-dims", "0"], "head_dims: expected")]
)
def test_what_cannot_be_built_is_said(options: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "attnreg", "build", *options], capture_output=True, text=True)
    assert (done.returncode, said in done.stderr) == (2, True)
