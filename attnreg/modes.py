"""Modes of the process: tune on a miss, record problems, check values; all off unless asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from attnreg.problem import Problem

__all__ = ["autotune", "autotuning", "checking", "on_change", "recording", "seen", "set_tuner", "tune_missed"]

_autotune: ContextVar[bool] = ContextVar("attnreg_autotune", default=False)
_listeners: list[Callable[[], None]] = []
_recorders: list[Callable[[Problem], None]] = []
_tuner: Callable[[Problem], object] | None = None


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` when a mode is entered or left: what was decided before must be decided again."""
    _listeners.append(listener)


def _changed() -> None:
    for listener in _listeners:
        listener()


def checking() -> bool:
    """Does ATTNREG_CHECK=1 ask to check values even where that synchronises with the device?"""
    return _flag("ATTNREG_CHECK")


def autotuning() -> bool:
    """Does this context, or ATTNREG_AUTOTUNE=1, ask to tune problems that have no fresh record?"""
    return _autotune.get() or _flag("ATTNREG_AUTOTUNE")


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0", "false", "no")


@contextlib.contextmanager
def autotune() -> Iterator[None]:
    """Within the block, a call whose problem was never tuned here is tuned first, and its record kept."""
    token = _autotune.set(True)
    _changed()
    try:
        yield
    finally:
        _autotune.reset(token)
        _changed()


def set_tuner(tuner: Callable[[Problem], object]) -> None:
    """Say what tunes a problem; the package does so once, so that nothing below imports the tuner."""
    global _tuner
    _tuner = tuner


def tune_missed(problem: Problem) -> None:
    """Tune a problem that missed the hot table, if a mode asks for it; never while a CUDA graph is captured."""
    if _tuner is not None and autotuning() and not _capturing():
        _tuner(problem)


def _capturing() -> bool:
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]  # torch lacks the annotation


@contextlib.contextmanager
def recording(callback: Callable[[Problem], None]) -> Iterator[None]:
    """Within the block, `callback` gets the problem of every call that misses the hot table, which starts empty."""
    _recorders.append(callback)
    _changed()
    try:
        yield
    finally:
        _recorders.remove(callback)
        _changed()


def seen(problem: Problem) -> None:
    """Tell the recorders of a problem."""
    for callback in tuple(_recorders):
        callback(problem)
