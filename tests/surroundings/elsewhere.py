"""Start a program where attnreg has to do without something: as a user whom nobody knows, beside small or noexec mounts.

    python elsewhere.py [--unknown-user] [--mount FOLDER OPTIONS]... -- PROGRAM ARGUMENTS...

All of it is the kernel's own: a mount namespace, which is gone with the program, and a user namespace, in which this
user has another number and no rights over what belongs to others or is closed to its owner.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

UNKNOWN = 54321
NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000
PRIVATE = 1 << 18 | 1 << 14
LIBC = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    if LIBC.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def map_user(inside: int, outside: int) -> None:
    """No group is mapped, so that the rights of a root of the namespace end at every file."""
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"{inside} {outside} 1")


def main(arguments: list[str]) -> None:
    unknown, mounts, outside = False, [], os.geteuid()
    while arguments[0] != "--":
        option = arguments.pop(0)
        if option == "--unknown-user":
            unknown = True
        else:
            mounts.append((arguments.pop(0), arguments.pop(0)))
    if mounts:
        try:
            unshare(NEW_MOUNTS)
        except PermissionError:  # not root: as the root of a user namespace of its own
            unshare(NEW_MOUNTS | NEW_USERS)
            map_user(0, outside)
            outside = 0
        LIBC.mount(b"none", b"/", None, PRIVATE, None)
    for folder, options in mounts:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    if unknown:
        unshare(NEW_USERS)
        map_user(UNKNOWN, outside)
    program = arguments[1:]
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
