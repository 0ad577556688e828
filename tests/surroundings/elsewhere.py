"""Put a process where attnreg has to do without something: as a user whom nobody knows, beside small or noexec mounts.

All of it is the kernel's own: a mount namespace, which is gone with the process, and a user namespace, in which this
user has another number and no rights over what belongs to others or is closed to its owner.

    python elsewhere.py [--unknown-user] [--mount FOLDER OPTIONS]... -- PROGRAM ARGUMENTS...
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence

UNKNOWN = 54321
NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000
PRIVATE = 1 << 18 | 1 << 14


def unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def map_user(inside: int, outside: int) -> None:
    """No group is mapped, so that the rights of the namespace's owner end at every file."""
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"{inside} {outside} 1")


def enter(conditions: Sequence[str]) -> None:
    """Go there; the process must have one thread."""
    words, unknown, mounts, outside = list(conditions), False, [], os.geteuid()
    while words:
        option = words.pop(0)
        if option == "--unknown-user":
            unknown = True
        else:
            mounts.append((words.pop(0), words.pop(0)))
    if mounts:
        try:
            unshare(NEW_MOUNTS)
        except PermissionError:  # not root: as the root of a user namespace of its own
            unshare(NEW_MOUNTS | NEW_USERS)
            map_user(0, outside)
            outside = 0
        ctypes.CDLL(None).mount(b"none", b"/", None, PRIVATE, None)
    for folder, options in mounts:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    if unknown:
        unshare(NEW_USERS)
        map_user(UNKNOWN, outside)


if __name__ == "__main__":
    split = sys.argv.index("--")
    enter(sys.argv[1:split])
    os.execvp(sys.argv[split + 1], sys.argv[split + 1 :])
