"""Score functions: what a query and a key give before softcap, bias and mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnreg._node import Node, check_float
from attnreg.errors import SpecError

__all__ = ["Additive", "Dot", "General", "ScaledDot", "Score"]


class Score(Node):
    """Base of every score function."""

    family: ClassVar[str] = "score"

    def factor(self, head_dim: int) -> float:
        """What the raw score is multiplied by."""
        return 1.0


@dataclass(frozen=True)
class ScaledDot(Score):
    """`scale * q . k`; scale is 1/sqrt(Dqk) unless given (Vaswani et al. 2017, arXiv:1706.03762)."""

    scale: float | None = None
    kind: ClassVar[str] = "scaled_dot"

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_float(self, "scale")
            if abs(self.scale) > 1e38:
                raise SpecError(f"ScaledDot(scale): expected a size that float32 holds, up to 1e38, got {self.scale}")

    def factor(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Dot(Score):
    """`q . k` (Luong et al. 2015, arXiv:1508.04025, "dot")."""

    kind: ClassVar[str] = "dot"


@dataclass(frozen=True)
class General(Score):
    """`q W k` with `score_weight` [Hq or 1, Dq, Dk] (Luong et al. 2015, "general"). Dq may differ from Dk."""

    kind: ClassVar[str] = "general"

    def tensors(self) -> frozenset[str]:
        return frozenset({"score_weight"})


@dataclass(frozen=True)
class Additive(Score):
    """`sum(w * tanh(q + k))` with `score_weight` [Hq or 1, D] (Bahdanau et al. 2014, arXiv:1409.0473).

    q and k are the projected queries and keys of the paper.
    """

    kind: ClassVar[str] = "additive"

    def tensors(self) -> frozenset[str]:
        return frozenset({"score_weight"})
