"""Folders and locks of all that attnreg writes: where it goes, what is taken instead, and who says so.

`choice` decides folders, by what `system` says of them, and `locks` holds files. Nothing else of attnreg or its plugins
looks at HOME, XDG_* or the ATTNREG_*_DIR variables, or locks files.
"""

from __future__ import annotations

from attnreg.folders.choice import (
    KINDS,
    Fault,
    Kind,
    Report,
    child_environ,
    chosen,
    expand,
    full,
    named,
    places,
    ready,
    refuse,
    report,
    scratch_file,
    tell,
    temporary,
    to_read,
)
from attnreg.folders.locks import Lock, LockTimeoutError, lacks_flock, locked

__all__ = [
    "KINDS",
    "Fault",
    "Kind",
    "Lock",
    "LockTimeoutError",
    "Report",
    "child_environ",
    "chosen",
    "expand",
    "full",
    "lacks_flock",
    "locked",
    "named",
    "places",
    "ready",
    "refuse",
    "report",
    "scratch_file",
    "tell",
    "temporary",
    "to_read",
]
