"""Published tuned choices, and where the static model places them in the space that it ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnreg import masks, registry
from attnreg.errors import TuneError
from attnreg.problem import Problem
from attnreg.spec import AttentionSpec
from attnreg.suites import attention_problem
from attnreg.targets import target as named_target

__all__ = ["PUBLISHED", "Choice", "Standing", "standing"]

NAMES = ("block_m", "block_n", "num_warps", "num_stages")


@dataclass(frozen=True)
class Choice:
    """What a project publishes as fastest for the forward pass of heads of 128 on a part of the target."""

    target: str
    dtype: str
    tile: tuple[int, int, int, int]
    """BLOCK_M, BLOCK_N, warps, stages."""

    @property
    def problem(self) -> Problem:
        """The long causal prefill that such choices are tuned on."""
        spec = AttentionSpec(mask=masks.Causal())
        return attention_problem(spec, (16, 16), 4096, 4096, 128, batch=4, dtype=self.dtype, device="cuda")


PUBLISHED: tuple[Choice, ...] = (
    Choice("sm_80", "bfloat16", (128, 64, 8, 3)),
    Choice("sm_90", "bfloat16", (128, 64, 8, 3)),
    Choice("sm_90", "float16", (128, 128, 8, 3)),
    Choice("sm_100", "bfloat16", (128, 64, 8, 2)),
)
"""Tuned tiles for heads of 128 that the FlexAttention templates of PyTorch ship (A100, H100, B200), read in 2026."""


@dataclass(frozen=True)
class Standing:
    """A published choice among the points of our space, by modelled time.

    place: 1 is the best modelled. percentile: the share of the space's points that the model holds slower, in percent.
    best: the model's own choice, as the choice is written; seconds of both are modelled.
    """

    choice: Choice
    place: int
    points: int
    seconds: float
    best_seconds: float
    best: tuple[Any, ...]

    @property
    def percentile(self) -> float:
        """Share of the other points that are modelled slower, in percent; 100 for the first."""
        return 100.0 * (self.points - self.place) / max(self.points - 1, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "percentile": round(self.percentile, 2)}


def standing(choice: Choice, backend: str = "triton_flash") -> Standing:
    """Where the model of `backend` places a published choice. Raises TuneError where its space does not hold it."""
    loaded: Any = registry.current().get(backend).backend
    problem, hardware = choice.problem, named_target(choice.target)
    space = loaded.space(problem, hardware)
    wanted = {**space.default, **dict(zip(NAMES, choice.tile, strict=True))}
    if space.reasons(wanted):
        raise TuneError(f"{choice.target} {choice.tile}: not in the space: {'; '.join(space.reasons(wanted))}")
    times = {tuple(p[n] for n in NAMES): loaded.foresee(problem, p, choice.target) for p in space.points()}
    mine = times[choice.tile]
    best = min(times, key=lambda tile: times[tile])
    place = 1 + sum(1 for seconds in times.values() if seconds < mine)
    return Standing(choice, place, len(times), mine, times[best], best)
