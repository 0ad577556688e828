"""Folders and locks of all that attnreg writes: where it goes, what is taken instead, and who says so.

`places` decides folders and `locks` holds files; nothing else of attnreg or its plugins looks at HOME, XDG_* or the
ATTNREG_*_DIR variables, makes folders of its own, or locks files.
"""

from __future__ import annotations

from attnreg.folders.locks import Lock, LockTimeoutError, lacks_flock, locked
from attnreg.folders.places import (
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
