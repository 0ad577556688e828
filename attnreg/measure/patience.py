"""Patience: how long to wait for a process, not counting the time in which the machine did not let it run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["Patience", "stopped", "waited"]

SUSPENDED = 5.0
"""Seconds between two looks that tell of a stopped job or a sleeping machine, not of a hung process."""
LOOK = 0.5
"""How often to look whether the process is stopped, in seconds."""
MOST = 5.0
"""However busy the machine is: after so many times the limit, patience ends."""


class Patience:
    """Runs out when a process had `limit` seconds in which it could have run.

    What does not count: while this process itself stood still, while the other one was stopped by a signal, and
    what its threads waited for a processor, the one that waited longest. So a hang ends in time, and a candidate on
    a crowded machine is not taken for one. Where the system does not tell, all time counts.
    """

    def __init__(
        self,
        pid: int,
        limit: float,
        clock: Callable[[], float] = time.monotonic,
        waits: Callable[[int], Mapping[str, float]] | None = None,
        stops: Callable[[int], bool] | None = None,
    ) -> None:
        self.pid = pid
        self.limit = limit
        self._clock = clock
        self._waits = waits or waited
        self._stops = stops or stopped
        now = clock()
        self._looked = self._peeked = now
        self._deadline = now + limit
        self._busy = 0.0
        self._waited = self._waits(pid)

    def over(self) -> bool:
        """Is it at an end? To be asked often: cheap until the limit is near."""
        now = self._clock()
        if now - self._looked > SUSPENDED:
            self._deadline += now - self._looked
            self._peeked = now
        elif now - self._peeked >= LOOK:
            if self._stops(self.pid):
                self._deadline += now - self._peeked
            self._peeked = now
        self._looked = now
        if now <= self._deadline:
            return False
        waits, before = self._waits(self.pid), self._waited
        self._waited = waits
        more = max((seconds - before.get(thread, 0.0) for thread, seconds in waits.items()), default=0.0)
        more = min(more, (MOST - 1) * self.limit - self._busy)
        self._busy += max(more, 0.0)
        self._deadline += max(more, 0.0)
        return now > self._deadline


def waited(pid: int) -> dict[str, float]:
    """Seconds that each thread of a process stood ready and had no processor; empty where the system does not say."""
    out = {}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, IndexError, ValueError):
                out[task.name] = int((task / "schedstat").read_text().split()[1]) * 1e-9
    return out


def stopped(pid: int) -> bool:
    """Is the process stopped, by a signal or a debugger?"""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False
