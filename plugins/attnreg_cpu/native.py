"""The native backend: what it can compute, by which path, and how it is configured."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from attnreg import Hardware, Problem, SearchSpace, differentiable, scores
from attnreg_cpu import build, library_files
from attnreg_cpu.decode import CACHES, decode_space
from attnreg_cpu.estimate import estimate
from attnreg_cpu.general import Weighted, dotted
from attnreg_cpu.paths import decodes
from attnreg_cpu.prefill import prefill_supports
from attnreg_cpu.run import kernels_of
from attnreg_cpu.traced import traced, traced_reasons
from attnreg_cpu.tuning_space import every_shape, kernel_space, ready_shapes
from attnreg_cpu.variant import variants_of

SOURCES = ("forward.cpp", "backward.cpp", "decode.cpp")


class NativeBackend:
    """Attention by C++ kernels compiled for this CPU."""

    name = "cpu"

    def __init__(self) -> None:
        self.version = _digest(*SOURCES)  # changes with any kernel source

    def version_for(self, problem: Problem, hardware: Hardware) -> str:
        """Changes with the sources of the path that serves the problem."""
        problem = dotted(problem)
        if decodes(problem, hardware):
            return f"decode-{_digest('decode.cpp')}"
        if problem.needs_grad:
            return f"backward-{_digest('forward.cpp', 'backward.cpp')}"
        return f"forward-{_digest('forward.cpp')}"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """Every reason why the problem cannot be computed exactly as said; empty if it can."""
        problem = dotted(problem)
        reasons = _machine_reasons(problem)
        reasons += traced_reasons(problem)
        decoded = decodes(problem, hardware)
        # What decoding does not take, prefill may; its reasons count where both refuse.
        reasons += [] if decoded else prefill_supports(problem)
        if not reasons and build.lacking():
            reasons = _lacking_kernels(problem, hardware, decoded)
        return reasons

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """The choices of the path that serves the problem."""
        problem = dotted(problem)
        if decodes(problem, hardware):
            return decode_space(problem, hardware)
        return kernel_space(problem, hardware)

    def estimate(self, problem: Problem, hardware: Hardware) -> float:
        """Seconds of a call, from the live pairs and the bytes that must move."""
        problem = dotted(problem)
        return estimate(problem, hardware, decodes(problem, hardware))

    def prepare(self, problem: Problem, config: Mapping[str, int | str | float | bool]) -> Callable[..., Any]:
        """Compile (or find) the kernels and return run(q, k, v, **tensors)."""
        if problem.traced:
            return traced(problem, config)
        rest = dotted(problem)
        kernels: Any = kernels_of(rest, config)
        whole: Any = kernels if rest is problem else Weighted(problem, kernels)
        return differentiable(self.name, whole, problem) if problem.needs_grad else whole

    def build_ahead(self, hardware: Hardware, **options: Any) -> int:
        """Compile what calls would compile at first use; see ahead.build_all. Returns how many libraries there are."""
        from attnreg_cpu.ahead import build_all

        return build_all(hardware, **options)


def _digest(*sources: str) -> str:
    digests = "".join(build.source_digest(source) for source in sources)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def _machine_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"device {problem.device}: the native kernels run on the CPU only")
    if not sys.platform.startswith("linux"):
        reasons.append(f"platform {sys.platform}: the native kernels are built on Linux only")
    return reasons


def _lacking_kernels(problem: Problem, hardware: Hardware, decoded: bool) -> list[str]:
    """Why the problem cannot be computed without a compiler; empty where its kernels lie ready."""
    wanted: list[tuple[str, dict[str, int | str]]]
    if decoded:
        wanted = [("decode.cpp", {"ATTNREG_CACHE": CACHES[problem.kv_dtype]})]
        ready = build.ready(*wanted[0]) is not None
        what, how = f"decode kernels of {problem.kv_dtype} caches", "run `attnreg build`"
    else:
        d, d_v, shapes = problem.head_dim, problem.head_dim_v, every_shape(problem, hardware)
        wanted = [(one.source, one.defines()) for shape in shapes for one in variants_of(problem, *shape)]
        ready = bool(ready_shapes(problem, hardware))
        what = f"{'backward' if problem.needs_grad else 'forward'} kernels of {problem.dtype}, head_dim {d} and {d_v}"
        # `attnreg build` takes one size for q, k and v, and builds products.
        plain = d == d_v and not isinstance(problem.spec.score, scores.Additive)
        how = f"run `attnreg build --head-dims {d} --dtypes {problem.dtype}`" if plain else "make such a call"
    if ready:
        return []
    lack = f"{library_files.where()} holds no {what}"
    there = [path for one in wanted for path in build.candidates(*one)]
    damaged = [path.name for path in there if not library_files.is_whole(path)]
    if damaged:
        lack += f" but damaged ones, which can be deleted ({', '.join(damaged)})"
    refused = [f"{path.name} {why}" for path in there if (why := library_files.why_refused(path))]
    if refused:
        lack += f" but {'; '.join(refused)}"
    return [f"{build.lacking()}, and {lack}: {how} {build.ELSEWHERE}, or {build.INSTALL_HINT}"]
