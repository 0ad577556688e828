"""Search: which candidate to look at next. Seeds first, then all of a small space, or TPE with local descent."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from attnreg.measure import Candidate
from attnreg.tuning.joint import JointSpace
from attnreg.tuning.moves import WORST, Found, Moves
from attnreg.tuning.storage import abandoned, owner

__all__ = ["ENUMERATE", "Proposal", "Search", "make_sampler"]

ENUMERATE = 200
"""Spaces of at most this many points are looked at whole."""
PAYS = 0.995
"""An improvement must be at least this factor to count as one."""
SAMPLED = ("tpe", "mutant", "random")
"""Ways that count: so many candidates in a row that did not pay end the search."""


@dataclass(frozen=True)
class Proposal:
    """A candidate to look at, and why: "default", "seed", "neighbour", "static", "descent", "elite", "tpe",
    "mutant", "random", "all"."""

    candidate: Candidate
    why: str
    trial: optuna.Trial


class Search:
    """Ask for candidates and tell their times; all state is in the study, so that a new process goes on with it.

    space: what to search. seeds: (candidate, why) to try first. limit: stop after so many candidates. enumerate_up_to:
    spaces no larger are looked at whole. patience: stop after so many sampled candidates in a row that did not pay,
    once no neighbour of the best few is left; by default a quarter of the space, but 48 to 128.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: JointSpace,
        seeds: Sequence[tuple[Candidate, str]] = (),
        *,
        limit: int | None = None,
        enumerate_up_to: int = ENUMERATE,
        patience: int | None = None,
        seed: int = 0,
    ) -> None:
        self.study = study
        self.space = space
        self.limit = limit
        self.patience = patience if patience is not None else min(max(space.count(1024) // 4, 48), 128)
        self.rng = random.Random(seed)
        self.whole = space.count(enumerate_up_to + 1) <= enumerate_up_to
        self.found = Found()
        self.moves = Moves(space, self.found, self._fresh, self.rng)
        self._idle = 0
        self._queue: list[tuple[Candidate, str]] = list(seeds)
        self._followed: set[int] = set()
        self._taken: set[str] = set()
        self._waiting: list[tuple[Candidate, str]] = []
        self._adopt()
        if self.whole:
            rest = list(space.points())
            self.rng.shuffle(rest)  # a budget that ends early should not always miss the same end
            self._queue += [(c, "all") for c in rest]

    @property
    def seen(self) -> dict[str, float]:
        """Seconds of what was looked at, by key; WORST for what must not be used."""
        return self.found.seen

    @property
    def best(self) -> tuple[float, Candidate] | None:
        """The fastest so far."""
        return self.found.best

    @property
    def done(self) -> int:
        """How many candidates were looked at, in this process and before."""
        return len(self.seen)

    def ask(self) -> Proposal | None:
        """The next candidate; None when the budget is spent or more cannot pay."""
        while True:
            self._follow()
            if self.limit is not None and self.done >= self.limit:
                return None
            chosen = self._choose()
            if chosen is None:
                return None
            proposal = self._claim(*chosen)
            if proposal is not None and not self._contested(proposal):
                return proposal
            if proposal is not None:
                self.give_up(proposal)

    def _choose(self) -> tuple[Candidate, str] | None:
        """What to look at next, and why; None where nothing is left that could pay."""
        if self._waiting:
            return self._waiting[0]
        while self._queue:
            candidate, why = self._queue.pop(0)
            if self._fresh(candidate):
                return candidate, why
        if self.whole:
            return None
        return self.moves.descend() or self._sample()

    def tell(self, proposal: Proposal, seconds: float | None, **notes: Any) -> None:
        """Keep a result: seconds a call, or None for a candidate that must not be used. notes: plain data to keep."""
        for name, value in notes.items():
            proposal.trial.set_user_attr(name, value)
        if seconds is None:
            proposal.trial.set_constraint("usable", 1.0)
        else:
            proposal.trial.set_constraint("usable", 0.0)
        self.study.tell(proposal.trial, WORST if seconds is None else seconds)
        self._note(proposal.candidate, seconds, proposal.why)

    def reference(self) -> tuple[Candidate, float] | None:
        """The candidate that the study's latest times are relative to, and its seconds."""
        for trial in reversed(self.results()):
            candidate = _candidate_of(trial)
            if candidate is not None and trial.user_attrs.get("reference") and trial.value is not None:
                return candidate, trial.value
        return None

    def give_up(self, proposal: Proposal) -> None:
        """Take a proposal back unjudged, as when the user interrupts: it may be proposed again."""
        self.study.tell(proposal.trial, state=TrialState.FAIL)

    def results(self) -> list[optuna.trial.FrozenTrial]:
        """Finished trials of every process on this study, oldest first."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _note(self, candidate: Candidate, seconds: float | None, why: str) -> None:
        paid = seconds is not None and (self.best is None or seconds < PAYS * self.best[0])
        self.found.note(candidate, seconds)
        if why in ("descent", "elite", *SAMPLED):
            self._idle = 0 if paid else self._idle + (why in SAMPLED)

    def _follow(self) -> None:
        """Take note of what other processes on this study found, and of what they are at."""
        for trial in self.results():
            if trial.number in self._followed:
                continue
            self._followed.add(trial.number)
            candidate = _candidate_of(trial)
            if candidate is not None and candidate.key not in self.seen:
                usable = trial.value is not None and trial.value < WORST
                self._note(candidate, trial.value if usable else None, trial.user_attrs.get("why", ""))
        claims = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        said = [(c, t) for c, t in ((_candidate_of(t), t) for t in claims) if c is not None]
        self._taken = {c.key for c, _ in said}
        self._waiting = [(c, t.user_attrs.get("why", "")) for c, t in said if t.state == TrialState.WAITING]

    def _claim(self, candidate: Candidate, why: str) -> Proposal | None:
        """Put a candidate up in the study and take one: as a rule this one, else one that waited there; None if another
        process took it first.

        A claim appears in the study together with its number and its candidate, in one step. So whoever looks after
        that sees every claim that is older than its own.
        """
        if candidate.key not in (c.key for c, _ in self._waiting):
            named = {"backend": candidate.backend, "config": dict(candidate.config)}
            attrs = {"owner": owner(), "why": why, "candidate": named}
            self.study.enqueue_trial(self.space.to_params(candidate), user_attrs=attrs)
        trial = self._quietly_ask()
        taken = _candidate_of(trial)
        if taken is None or not self.space.contains(taken):
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        trial.set_user_attr("owner", owner())
        self.space.suggest(trial)  # what was put up becomes the trial's parameters
        return Proposal(taken, trial.user_attrs["why"], trial)

    def _contested(self, proposal: Proposal) -> bool:
        """Did another process claim the same candidate before? The oldest claim keeps it."""
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        others = self.study.get_trials(deepcopy=False, states=states)
        return any(t.number < proposal.trial.number and _candidate_of(t) == proposal.candidate for t in others)

    def _adopt(self) -> None:
        """Take over what the study holds, and requeue what a dead process was at."""
        self._follow()
        self._idle = 0
        for trial in abandoned(self.study):
            self.study.tell(trial.number, state=TrialState.FAIL)
            candidate = _candidate_of(trial)
            if candidate is not None:
                self._queue.insert(0, (candidate, "again"))

    def _sample(self) -> tuple[Candidate, str] | None:
        """Past the tops of the backends: beside the other elites, what TPE says, and mutants, in turn.

        Where the last of these do not pay, what lies beside the elites is looked at to its end: two searches that
        stop on one plateau should have seen the same of it.
        """
        if self._idle >= self.patience:
            return self.moves.beside_elites()
        ways = (self.moves.beside_elites, self._by_model, self.moves.mutant)
        turn = self.done % len(ways)
        for way in (*ways[turn:], *ways[:turn], self.moves.anywhere):
            found = way()
            if found is not None:
                return found
        return None

    def _by_model(self) -> tuple[Candidate, str] | None:
        """What TPE says, unless it repeats itself or breaks a constraint."""
        for _ in range(8):
            trial = self._quietly_ask()
            waited = _candidate_of(trial)
            candidate = self.space.suggest(trial)
            self.study.tell(trial, state=TrialState.FAIL)  # only to hear the sampler: claims are made in one step
            if waited is not None:
                return waited, trial.user_attrs["why"]
            if self._fresh(candidate):
                return candidate, "tpe"
        return None

    def _fresh(self, candidate: Candidate) -> bool:
        new = candidate.key not in self.seen and candidate.key not in self._taken
        return new and self.space.contains(candidate)

    def _quietly_ask(self) -> optuna.Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self.study.ask()


def make_sampler(seed: int) -> optuna.samplers.TPESampler:
    """TPE that models what is common to a backend's parameters together, each backend apart (group)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=10)


def _candidate_of(trial: optuna.trial.FrozenTrial | optuna.Trial) -> Candidate | None:
    said = trial.user_attrs.get("candidate")
    return Candidate(said["backend"], said["config"]) if said else None
