"""What this project claims of its CPU backend: for each case, the least ratio of a peer's time to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CLAIMS", "Claim"]


@dataclass(frozen=True)
class Claim:
    """peer: a contestant's name, "best peer", "read" (share of the measured read bandwidth) or another case's name
    (its time over ours). least: the least ratio or share."""

    peer: str
    least: float


def _halves(case: str, *claims: Claim) -> dict[str, tuple[Claim, ...]]:
    return {f"{case} {dtype}": claims for dtype in ("float16", "bfloat16")}


_SDPA, _BEST = "sdpa", "best peer"
CLAIMS: Mapping[str, tuple[Claim, ...]] = {
    "full D64 S2048": (Claim(_SDPA, 1.35), Claim(_BEST, 1.15)),
    "causal D64 S2048": (Claim(_SDPA, 1.35),),
    "causal D128 S2048": (Claim(_SDPA, 1.35),),
    "causal GQA 32/8 D128 S1024": (Claim(_SDPA, 1.45),),
    "causal B8 S128": (Claim(_SDPA, 2.3),),
    "causal S512": (Claim(_SDPA, 1.9),),
    **_halves("causal D64 S2048", Claim(_BEST, 1.3)),
    "decode GQA 32/8 8K float32": (Claim("read", 0.80), Claim(_SDPA, 4.0)),
    "decode MHA 4K float32": (Claim("read", 0.80), Claim(_SDPA, 1.9)),
    "decode GQA 32/8 B8 2K float32": (Claim("read", 0.80), Claim(_SDPA, 4.0)),
    "decode GQA 32/8 8K bfloat16": (Claim("read", 0.75), Claim(_SDPA, 28.0)),
    "decode MHA 4K bfloat16": (Claim("read", 0.75), Claim(_SDPA, 7.0)),
    "decode GQA 32/8 B8 2K bfloat16": (Claim("read", 0.75), Claim(_SDPA, 35.0)),
    **{f"decode {case} float16": (Claim("read", 0.75),) for case in ("GQA 32/8 8K", "MHA 4K", "GQA 32/8 B8 2K")},
    "decode MQA 16K D64": (Claim(_SDPA, 5.0), Claim(_BEST, 3.0)),
    **{
        f"decode {case} {kv} cache": (Claim(f"decode {case} bfloat16", least),)
        for case, least in (("MHA 4K", 1.4), ("GQA 32/8 8K", 1.0))
        for kv in ("float8_e4m3fn", "int8")
    },
    "window 256 S8192": (Claim("sdpa", 30.0), Claim("flex 64", 2.0)),
    "documents 8 x 1024": (Claim("sdpa", 18.0), Claim("documents as a batch", 1.5)),
    "BigBird S8192": (Claim("flex 64", 2.3),),
    "prefix-LM 512 of 4096": (Claim("flex 64", 1.8),),
    "train S1024": (Claim(_SDPA, 1.5),),
    "train S2048": (Claim(_SDPA, 1.3),),
    "train S1024 bfloat16": (Claim(_SDPA, 6.0),),
}
