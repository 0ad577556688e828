"""Triton backends: flash and split-KV decoding. Importing this package imports no Triton."""

from __future__ import annotations

from attnreg import Backend, hookimpl


@hookimpl
def attnreg_backends() -> list[Backend]:
    """Called once by attnreg; Triton loads when a problem on a capable device needs a kernel."""
    from .flash import TritonDecode, TritonFlash

    return [TritonFlash(), TritonDecode()]
