"""The reference backend: plain torch, everything the spec can say, forward and backward, on any device."""

from __future__ import annotations

from attnreg import Backend, hookimpl


@hookimpl
def attnreg_backends() -> list[Backend]:
    """Called once by attnreg."""
    from attnreg_eager.backend import Eager
    from attnreg_eager.fp8_backend import EagerFp8

    return [Eager(), EagerFp8()]
