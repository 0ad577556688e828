"""The three hooks of attnreg's plugin contract (entry-point group `attnreg`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

from attnreg.backend import Backend, Finding
from attnreg.hardware import Hardware

hookspec = pluggy.HookspecMarker("attnreg")
hookimpl = pluggy.HookimplMarker("attnreg")


@hookspec
def attnreg_backends() -> Iterable[Backend]:  # type: ignore[empty-body]  # a specification has no body
    """Backends of this plugin. Called once, at the first call that needs a choice; keep it cheap."""


@hookspec
def attnreg_records() -> Iterable[dict[str, Any]]:  # type: ignore[empty-body]  # as above
    """Tuning records that the plugin ships, as the plain data of `tuning_db` lines. Ranks below user records."""


@hookspec
def attnreg_doctor(hardware: Hardware) -> Iterable[Finding]:  # type: ignore[empty-body]  # as above
    """What `attnreg doctor` should say of this plugin: what it needs, what is missing, what to do."""
