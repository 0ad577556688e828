"""What `attnreg doctor` says of the Triton backends: the package, and whether it has a device to run on."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from attnreg import AttentionSpec, Finding, Hardware, Problem

from .support import interpreted, machine_reasons


def findings(hardware: Hardware) -> list[Finding]:
    """The installed Triton, and the reasons why kernels cannot run on this hardware, if any."""
    if importlib.util.find_spec("triton") is None:
        return [Finding("triton: package", False, "not installed", "pip install attnreg[triton]")]
    package = Finding("triton: package", True, f"triton {_version()}")
    device = "cpu" if hardware.kind == "cpu" else "cuda"
    reasons = machine_reasons(Problem(AttentionSpec(), 1, 1, 1, 1, 1, 64, 64, 64, device=device), hardware)
    if hardware.kind == "cpu" and not interpreted():
        there = "a GPU that torch sees" if torch.cuda.is_available() else "no GPU that torch sees"
        return [package, Finding("triton: device", True, f"kernels stay unused on the CPU; {there}")]
    todo = "other backends serve this device" if reasons else ""
    return [package, Finding("triton: device", not reasons, "; ".join(reasons) or hardware.arch, todo)]


def _version() -> str:
    try:
        return importlib.metadata.version("triton")
    except Exception:  # metadata of another build, or half deleted: the package itself is there
        return "of an unknown version"
