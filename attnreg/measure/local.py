"""The bench itself: gate, prepare and time candidates in the process that it stands in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from attnreg import registry
from attnreg.errors import AttnregError
from attnreg.hardware import Hardware, detect
from attnreg.measure.candidates import About, Candidate, Opened, Plan, Refusal, Round, Verdict
from attnreg.measure.memory import in_use, peak_over, settle
from attnreg.measure.probes import Probes
from attnreg.measure.timing import Clock, Thunk, bind
from attnreg.testing import check_backend, make_inputs

__all__ = ["LocalBench"]

LEAK_A_CALL = 1024
"""Bytes a call that are a leak where allocators count exactly; objects that Python keeps in pools do not show there."""
LEAK_BYTES = 1 << 20
"""Growth of the process over some calls that is a leak: its pages move by less without one."""
MAX_LEAK_CALLS = 2000
EXACT_CALLS = 16
"""So many calls at most show a leak to an exact count."""


class LocalBench:
    """Measures where it stands; a candidate that crashes takes this process with it. `at` tells who runs now."""

    def __init__(self, plan: Plan, at: Callable[[Candidate], object] = lambda _: None) -> None:
        self.plan = plan
        self.at = at
        self.hardware: Hardware = detect(plan.problem.device)
        if plan.threads and self.hardware.kind == "cpu":
            torch.set_num_threads(plan.threads)
        self.bucket = plan.problem.bucket()  # what a call asks backends about, and prepares
        self.inputs = make_inputs(plan.problem, seed=plan.seed)
        self.clock = Clock(self.hardware, plan.cache, plan.sample_seconds)
        self._probes: Probes | None = None
        self._random = random.Random(plan.seed)
        self._truths: dict[Any, Any] = {}
        self._calls: dict[str, tuple[Thunk, float]] = {}

    def __enter__(self) -> LocalBench:
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.clear()

    def about(self) -> About:
        """See `Bench.about`."""
        return About(registry.current().versions(self.bucket, self.hardware), self.clock.name)

    def gate(self, candidate: Candidate, budget: Literal["quick", "full"] = "quick") -> Verdict:
        """Check against the oracle, on adversarial inputs. A candidate outside its space is refused here."""
        self.at(candidate)
        try:
            entry = registry.current().get(candidate.backend)
            config = entry.backend.space(self.bucket, self.hardware).check(candidate.config)
            r = check_backend(
                entry.backend, self.plan.problem, config, self.hardware, budget=budget, truths=self._truths
            )
        except AttnregError as error:
            return Verdict(False, str(error))
        except Exception as error:
            return Verdict(False, f"raised {type(error).__name__}: {error}")
        if not r.ok:
            return Verdict(False, r.reason)
        return Verdict(True, "", r.error, r.bound, r.grad_error or 0.0, r.grad_bound or 0.0)

    def open(self, candidate: Candidate, give_up: float = 0.0) -> Opened:
        """Prepare, call, and watch what memory each call takes and leaves.

        give_up: a candidate whose calls take longer than this many seconds, and fill a sample, is not looked at further
        (0: never).
        """
        self.at(candidate)
        try:
            backend = registry.current().get(candidate.backend).backend
            config = backend.space(self.bucket, self.hardware).check(candidate.config)
            call = bind(backend.prepare(self.bucket, config), self.inputs)
            call()  # whatever it compiles is no part of its seconds
            seconds = self.clock.once(call)
            if give_up and seconds > max(give_up, self.plan.sample_seconds):
                peak, again = self._peak_and_seconds(call)  # one bad call must not cast out a good candidate
                if again > give_up:
                    return Opened(min(seconds, again), peak, self._leak_told(call, seconds), given_up=True)
            seconds = min(seconds, self.clock.once(call))
            peak, _ = self._peak_and_seconds(call)
            leak = self._leak(call, seconds)
            call, seconds = self.clock.recorded(call, seconds)
        except Exception as error:
            raise Refusal(f"raised {type(error).__name__}: {error}", candidate) from error
        self._calls[candidate.key] = (call, seconds)
        return Opened(seconds, peak, leak)

    def rounds(self, candidates: list[Candidate], count: int) -> list[Round]:
        """Interleaved samples with probes between them; each round in an order of its own."""
        if self._probes is None:
            self._probes = Probes(self.hardware)
        out = []
        for _ in range(count):
            order = list(range(len(candidates)))
            self._random.shuffle(order)
            seconds, quiet = [0.0] * len(order), [False] * len(order)
            before = self._probes.quiet()
            for n in order:
                seconds[n] = self._sample(candidates[n])
                after = self._probes.quiet()
                quiet[n], before = before and after, after
            out.append(Round(tuple(seconds), tuple(quiet)))
        return out

    def close(self, candidate: Candidate) -> None:
        """Forget a candidate and what it holds."""
        self._calls.pop(candidate.key, None)

    def _sample(self, candidate: Candidate) -> float:
        if candidate.key not in self._calls:
            self.open(candidate)
        call, seconds = self._calls[candidate.key]
        self.at(candidate)
        try:
            return self.clock.sample(call, seconds)
        except Exception as error:
            raise Refusal(f"raised {type(error).__name__}: {error}", candidate) from error

    def _peak_and_seconds(self, call: Thunk) -> tuple[int, float]:
        """The most bytes beyond the start while a call ran, and how long that call took."""
        settle(self.clock.device)  # memory that is free but not given back would hide the peak
        took = [0.0]

        def timed() -> None:
            took[0] = self.clock.once(call)

        return peak_over(timed, self.clock.device), took[0]

    def _leak(self, call: Thunk, seconds: float) -> int:
        """Bytes that a call leaves behind, if it does so in each of several windows; else 0.

        A cache or a pool grows in the first window and then stops; a leak goes on. Memory that was mapped past the
        allocators shows in what the process holds, once it is much.
        """
        start, (few, least, _) = time.perf_counter(), self._leak_calls(seconds)
        told = self._leak_told(call, seconds)
        if told:
            return told
        # As slow as it is now: at least one window of `few` calls was just made.
        _, _, count = self._leak_calls(max(seconds, (time.perf_counter() - start) / few))
        held = settle(self.clock.device)
        growth = []
        for _ in range(3):
            for _ in range(count):
                call()
            now = settle(self.clock.device)
            growth.append(now - held)
            held = now
        grew = min(growth)
        return grew // count if grew >= max(LEAK_BYTES, least * count // 2) else 0

    def _leak_told(self, call: Thunk, seconds: float) -> int:
        """What `_leak` finds by what allocators tell, to the byte: few calls suffice however slow the machine is.

        Without a leak that is one window, so that a candidate too slow to look at further can be watched too. What
        looks like one is looked at again.
        """
        few, _, _ = self._leak_calls(seconds)
        if self._growth(call, few, 3) < LEAK_A_CALL * few:
            return 0
        more = min(max(4 * few, 2), EXACT_CALLS)
        exact = self._growth(call, more, 5) // more
        return exact if exact >= LEAK_A_CALL else 0

    def _leak_calls(self, seconds: float) -> tuple[int, int, int]:
        """Of calls of so many seconds: how many make a window that allocators tell, half the bytes of an output, and
        how many make a window that shows in what the process holds."""
        p = self.plan.problem
        rows = (p.total_q or p.batch * p.sq) * p.q_heads
        least = rows * p.head_dim_v * torch.empty(0, dtype=p.out_dtype).element_size() // 2
        wanted = min(MAX_LEAK_CALLS, 2 * LEAK_BYTES // max(least, 1) + 3)
        affordable = max(1, min(int(self.plan.leak_seconds / 4 / max(seconds, 1e-7)), wanted))
        return min(affordable, EXACT_CALLS), least, affordable

    def _growth(self, call: Thunk, count: int, windows: int) -> int:
        """The least by which the memory that allocators handed out grew over `count` calls, in so many windows."""
        growth = []
        before = in_use(self.clock.device)
        for _ in range(windows):
            for _ in range(count):
                call()
            now = in_use(self.clock.device)
            if now is None or before is None:
                return 0
            growth.append(now - before)
            if growth[-1] < LEAK_A_CALL * count:
                return 0
            before = now
        return min(growth)
