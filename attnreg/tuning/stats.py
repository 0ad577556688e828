"""Intervals on paired differences: the Hodges-Lehmann estimate and the exact signed-rank interval around it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "interval", "least_rounds", "log_ratios"]

Interval = tuple[float, float, float]
_EXACT = 60


def interval(differences: Sequence[float], confidence: float) -> Interval:
    """(low, estimate, high) of the centre of paired differences.

    The estimate is the median of all pairwise means (Hodges and Lehmann 1963); the interval inverts Wilcoxon's
    signed-rank test (1945), exactly up to 60 differences and by its normal approximation beyond. It needs no
    normal noise, only that a difference is as likely to lie above the centre as below; a few disturbed samples
    barely move it. With too few differences for the confidence the interval is infinite.
    """
    x = np.asarray(differences, dtype=np.float64)
    n = len(x)
    if n == 0:
        return -math.inf, 0.0, math.inf
    first, second = np.triu_indices(n)
    means = np.sort((x[first] + x[second]) / 2)
    middle = float(np.median(means))
    cut = _cut(n, round(1 - confidence, 12))
    if cut < 1:
        return -math.inf, middle, math.inf
    return float(means[cut - 1]), middle, float(means[len(means) - cut])


def least_rounds(confidence: float) -> int:
    """The fewest differences that give a finite interval."""
    return next(n for n in range(1, 64) if _cut(n, round(1 - confidence, 12)) >= 1)


def log_ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """log(slow / fast), sample by sample."""
    return [math.log(a / b) for a, b in zip(slow, fast, strict=True)]


@functools.lru_cache(maxsize=1024)
def _cut(n: int, alpha: float) -> int:
    """How many of the outermost pairwise means the interval leaves out on either side, plus one; 0 for none."""
    if n > _EXACT:
        mean, deviation = n * (n + 1) / 4, math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return int(mean - _normal_quantile(1 - alpha / 2) * deviation)
    below = np.cumsum(_signed_rank(n))
    return int(np.searchsorted(below, alpha / 2, side="right"))


def _signed_rank(n: int) -> npt.NDArray[np.float64]:
    """P(W = w) of the signed-rank sum of n differences, w = 0 .. n(n+1)/2."""
    chance = np.ones(1)
    for rank in range(1, n + 1):
        step = np.zeros(rank + 1)
        step[0] = step[rank] = 0.5
        chance = np.convolve(chance, step)
    return chance


def _normal_quantile(p: float) -> float:
    """By bisection on erf: called once a sample size."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < p else (low, middle)
    return (low + high) / 2
