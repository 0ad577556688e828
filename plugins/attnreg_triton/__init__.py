"""Triton backends: flash, split-KV decoding, block-sparse, FP8. Importing this package imports no Triton."""

from __future__ import annotations

from collections.abc import Iterable

from attnreg import Backend, Finding, Hardware, hookimpl

__all__ = ["attnreg_backends", "attnreg_doctor"]


@hookimpl
def attnreg_backends() -> list[Backend]:
    """Called once by attnreg; Triton loads when a problem on a capable device needs a kernel."""
    from .block_sparse import TritonBlockSparse
    from .flash import TritonDecode, TritonFlash
    from .fp8 import TritonFp8

    return [TritonFlash(), TritonDecode(), TritonBlockSparse(), TritonFp8()]


@hookimpl
def attnreg_doctor(hardware: Hardware) -> Iterable[Finding]:
    """The Triton package and its device."""
    from .doctor import findings

    return findings(hardware)
