"""Torch SDPA plugin: torch.nn.functional.scaled_dot_product_attention, wherever it means what the spec says."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from attnreg import Backend, Finding, Hardware, hookimpl
from attnreg_sdpa.backend import Sdpa

__all__ = ["Sdpa", "attnreg_backends", "attnreg_doctor"]


@hookimpl
def attnreg_backends() -> Iterable[Backend]:
    """The `sdpa` backend."""
    return [Sdpa()]


@hookimpl
def attnreg_doctor(hardware: Hardware) -> Iterable[Finding]:
    """Which of torch's kernels are there."""
    if hardware.kind == "cpu":
        return [Finding("sdpa", True, "torch's CPU kernels: flash and math")]
    names = {"flash": "flash", "efficient": "mem_efficient", "cudnn": "cudnn", "math": "math"}
    kernels = {name: bool(getattr(torch.backends.cuda, f"{torchs}_sdp_enabled")()) for name, torchs in names.items()}
    on = [name for name, enabled in kernels.items() if enabled]
    off = [name for name, enabled in kernels.items() if not enabled]
    if not off:
        return [Finding("sdpa", True, f"torch's kernels: {', '.join(on)}")]
    todo = "torch.backends.cuda.enable_*_sdp(True) turns them on again"
    return [Finding("sdpa", bool(on), f"turned off in this process: {', '.join(off)}; on: {', '.join(on)}", todo)]
