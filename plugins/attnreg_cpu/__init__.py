"""Native CPU attention: C++ kernels that the system's compiler builds on first use."""

from __future__ import annotations

from collections.abc import Iterable

from attnreg import Backend, Finding, Hardware, hookimpl

__all__ = ["attnreg_backends", "attnreg_doctor"]


@hookimpl
def attnreg_backends() -> Iterable[Backend]:
    """The prefill kernels."""
    from attnreg_cpu.native import NativeBackend

    return [NativeBackend()]


@hookimpl
def attnreg_doctor(hardware: Hardware) -> Iterable[Finding]:
    """Is there a compiler, does the cache hold files, is torch's thread pool shared?"""
    from attnreg_cpu.doctor import findings

    return findings()
