"""Torch FlexAttention plugin: compiled flex_attention with modifiers and block masks derived from the spec."""

from __future__ import annotations

from collections.abc import Iterable

from attnreg import Backend, Finding, Hardware, hookimpl
from attnreg_flex.backend import Flex, compiler_missing

__all__ = ["Flex", "attnreg_backends", "attnreg_doctor"]


@hookimpl
def attnreg_backends() -> Iterable[Backend]:
    """The `flex` backend."""
    return [Flex()]


@hookimpl
def attnreg_doctor(hardware: Hardware) -> Iterable[Finding]:
    """Whether torch can compile FlexAttention here."""
    missing = compiler_missing() if hardware.kind == "cpu" else _triton_missing()
    if missing:
        return [Finding("flex", False, missing, "FlexAttention is refused until then; other backends serve")]
    what = "a C++ compiler" if hardware.kind == "cpu" else "Triton"
    return [Finding("flex", True, f"torch compiles FlexAttention with {what}")]


def _triton_missing() -> str:
    from torch.utils._triton import has_triton

    return "" if has_triton() else "torch.compile finds no Triton for this device: install triton"
