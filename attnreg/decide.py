"""Decide: a problem on a hardware -> which backend, with which configuration, and why each other one not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attnreg import registry, store
from attnreg.backend import Backend, error_text, estimate_seconds, versions_for
from attnreg.errors import ConfigError, PluginError, UnsupportedError
from attnreg.hardware import Hardware
from attnreg.problem import Problem
from attnreg.registry import reasons_of, space_of
from attnreg.space import Config
from attnreg.store import Match

__all__ = ["WRITTEN_ORDER", "Candidate", "Decision", "decide", "reasons_of"]

WRITTEN_ORDER = (
    "cpu", "sdpa", "triton_decode", "triton_flash", "triton_block_sparse", "flex", "triton_fp8", "eager",
)  # fmt: skip
"""What may be chosen before anything was measured: backends that this project's own CI holds to the gate.

A backend that is not listed needs a record that passed the gate here, or `use_backend`. Eager is last.
"""


@dataclass(frozen=True)
class Candidate:
    """One backend's standing in a decision.

    reasons: why it refused; empty where it can run. seconds and error: from its record, where there is one,
    else seconds is its own estimate. origin: "measured", "static", "estimate", or "" where nothing is known.
    note: anything else worth saying, such as a record that was passed over and why.
    """

    name: str
    plugin: str
    reasons: tuple[str, ...] = ()
    seconds: float | None = None
    error: float | None = None
    origin: str = ""
    note: str = ""


@dataclass(frozen=True)
class Decision:
    """The choice. source: the rung of the ladder that held; why: one line for people."""

    problem: Problem
    hardware: Hardware
    backend: str
    config: Config
    source: str
    why: str
    candidates: tuple[Candidate, ...]
    match: Match | None = None


def decide(
    problem: Problem,
    hardware: Hardware,
    *,
    forced: str | None = None,
    config: Config | None = None,
    excluded: Mapping[str, str] | None = None,
) -> Decision:
    """Walk the ladder; the first rung that holds decides.

    Forced; user record, exact; plugin record; shipped record; nearest measured bucket; static record; the
    backends' cost estimates; the written order. `excluded` maps backends that failed while being prepared to
    the reason. Raises UnknownBackendError or UnsupportedError (with every reason) where nothing can run.
    """
    entries = registry.current().entries
    if forced is not None:
        registry.current().get(forced)
    reasons = {
        name: [f"failed: {excluded[name]}"]
        if excluded and name in excluded
        else reasons_of(e.backend, problem, hardware)
        for name, e in entries.items()
    }
    ladder = _Ladder(problem, hardware, {n: e.backend for n, e in entries.items()}, reasons)
    picked = ladder.forced(forced, config) if forced is not None else ladder.free()
    if picked is None:
        raise UnsupportedError(f"no backend can run {problem}", _order(reasons))
    name, chosen, source, why, match = picked
    candidates = tuple(ladder.candidate(n, entries[n].plugin) for n in _order(reasons))
    return Decision(problem, hardware, name, chosen, source, why, candidates, match)


def _order(reasons: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The written order first, then whatever else is loaded, by name."""
    rank = {name: n for n, name in enumerate(WRITTEN_ORDER)}
    return {name: reasons[name] for name in sorted(reasons, key=lambda n: (rank.get(n, len(rank)), n))}


Picked = tuple[str, Config, str, str, Match | None]


class _Ladder:
    """The rungs, over one set of backends and their reasons, to which a space that cannot be used adds one."""

    def __init__(
        self,
        problem: Problem,
        hardware: Hardware,
        backends: Mapping[str, Backend],
        reasons: Mapping[str, list[str]],
    ) -> None:
        self.problem = problem
        self.hardware = hardware
        self.backends = backends
        self.reasons = reasons
        self.notes: dict[str, str] = {}
        # Tracing changes who can run, not who is fastest: records are those of the untraced problem.
        untraced = replace(problem, traced=False)
        self.matches = store.current().find(untraced, hardware, versions_for(backends, untraced, hardware))

    def able(self, name: str) -> bool:
        return name in self.reasons and not self.reasons[name]

    def forced(self, name: str, config: Config | None) -> Picked:
        """The named backend, or the error with its reasons; its configuration from a record if none is given."""
        picked = self._forced(name, config) if self.able(name) else None
        if picked is None:
            raise UnsupportedError(
                f"backend {name!r} was asked for and cannot run {self.problem}", {name: self.reasons[name]}
            )
        return picked

    def _forced(self, name: str, config: Config | None) -> Picked | None:
        why = "use_backend with a configuration"
        if config is None:
            for match in self.matches:
                if match.backend == name and not match.stale and (kept := self._usable(match)) is not None:
                    return name, kept, "forced", f"use_backend; configuration from a {match.rung} record", match
            why = "use_backend; the backend's default configuration"
        chosen = self._completed(name, config or {})
        return (name, chosen, "forced", why, None) if chosen is not None else None

    def free(self) -> Picked | None:
        """The first rung that holds."""
        return self.from_records() or self.from_estimates() or self.from_order()

    def from_records(self) -> Picked | None:
        for match in self.matches:
            chosen = self._usable(match)
            if chosen is not None:
                return match.backend, chosen, f"{match.rung} record", match.describe(), match
        return None

    def from_estimates(self) -> Picked | None:
        """The fastest by the backends' own estimates, among those of the written order; eager stays last.

        One that makes no estimate keeps its place: an estimate outranks only what stands behind it.
        """
        able = [n for n in WRITTEN_ORDER[:-1] if self.able(n)]
        known = [(self._estimate(n), n) for n in able]
        ranked = sorted((seconds, n) for seconds, n in known if seconds is not None)
        if not ranked or known[0][0] is None:
            return None
        seconds, name = ranked[0]
        chosen = self._completed(name, {})
        if chosen is None:
            return self.from_estimates()  # it is able no more
        why = f"nothing was measured for this problem; {name} has the lowest estimate, {seconds * 1e3:.3g} ms"
        return name, chosen, "estimate", why, None

    def from_order(self) -> Picked | None:
        for name in WRITTEN_ORDER:
            if self.able(name) and (chosen := self._completed(name, {})) is not None:
                why = (
                    f"nothing was measured or estimated for this problem; {name} is the first able in the written order"
                )
                return name, chosen, "written order", why, None
        return None

    def candidate(self, name: str, plugin: str) -> Candidate:
        match = next((m for m in self.matches if m.backend == name), None)
        note = self.notes.get(name, "")
        if self.reasons[name]:
            return Candidate(name, plugin, tuple(self.reasons[name]), note=note)
        if name not in WRITTEN_ORDER and match is None:
            note = note or "not measured here, so only use_backend or a tuned record can choose it"
        if match is not None:
            seconds, error = match.record.seconds, match.record.error
            return Candidate(name, plugin, (), seconds, error, match.record.origin, note)
        seconds = self._estimate(name)
        return Candidate(name, plugin, (), seconds, None, "estimate" if seconds else "", note)

    def _estimate(self, name: str) -> float | None:
        return estimate_seconds(self.backends[name], self.problem, self.hardware)

    def _completed(self, name: str, config: Config) -> Config | None:
        """The configuration with the space's defaults; a backend whose space cannot be used refuses from then on.

        Raises ConfigError where a usable space does not hold the configuration.
        """
        try:
            return self._checked(name, config)
        except PluginError as error:
            self.reasons[name].append(str(error))
            return None

    def _checked(self, name: str, config: Config) -> Config:
        """Raises ConfigError for a configuration outside the space, PluginError for a space that cannot be used."""
        space = space_of(self.backends[name], self.problem, self.hardware)
        try:
            return space.check(config)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"its space() holds a constraint that raised {error_text(error)}") from error

    def _usable(self, match: Match) -> Config | None:
        """The match's configuration if it may be used here and now; else None, with the cause noted."""
        name = match.backend
        if match.stale:
            cause = f"its {match.rung} record is stale: {', '.join(match.stale)} differ; run attnreg tune again"
        elif name not in self.backends:
            return None
        elif not match.record.passed:
            cause = f"its {match.rung} record did not pass the gate; run attnreg tune again"
        elif self.reasons[name]:
            cause = f"its {match.rung} record cannot be used: it refuses the problem"
        else:
            try:
                return self._checked(name, match.config)
            except ConfigError as error:
                cause = f"its {match.rung} record is outside its search space: {error}"
            except PluginError as error:
                cause = str(error)
        self.notes.setdefault(name, cause)
        return None
