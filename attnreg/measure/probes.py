"""Probes: a little arithmetic and a little reading between samples, to see whether the machine is disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from attnreg.hardware import Hardware

__all__ = ["Probes"]

SLOW = 1.5
"""A probe this many times slower than usual says that something else runs. Reading varies by itself where machines
share their memory: undisturbed, one read of seven took 1.4 times the median or more on such a one."""
TRIES = 3
"""Products of one probe, of which the fastest counts: the first may wait for threads to wake up."""


class Probes:
    """Times a matrix product and a read of memory beyond the caches; what is usual is learnt as it goes.

    On a GPU nothing else shares the device as a rule and clocks are its own: there the probes only say "quiet".
    """

    def __init__(self, hardware: Hardware) -> None:
        self.active = hardware.kind == "cpu"
        generator = torch.Generator().manual_seed(0)
        size = min(max(2 * hardware.caches[2], 1 << 24), 1 << 26) if self.active else 4
        self._square = torch.randn(256, 256, generator=generator)
        self._long = torch.zeros(size // 4)
        self._seen: list[tuple[float, float]] = []
        if self.active:
            for _ in range(8):
                self.quiet()

    def quiet(self) -> bool:
        """Run the probes once: are both near their usual speed?"""
        if not self.active:
            return True
        multiply = min(_seconds(lambda: torch.mm(self._square, self._square)) for _ in range(TRIES))
        now = (multiply, _seconds(self._long.sum))
        self._seen.append(now)
        del self._seen[:-4096]
        return all(mine <= SLOW * usual for mine, usual in zip(now, self._usual(), strict=True))

    def _usual(self) -> tuple[float, float]:
        """The fast quarter of what was seen: disturbances only ever slow a probe down."""
        by_kind = [sorted(kind) for kind in zip(*self._seen, strict=True)]
        return by_kind[0][len(by_kind[0]) // 4], by_kind[1][len(by_kind[1]) // 4]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
