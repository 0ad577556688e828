"""Every error that attnreg raises, as one tree.

    AttnregError
    ├── SpecError (ValueError)            the spec contradicts itself or holds a bad value
    ├── InputError (ValueError)           a tensor or argument of the call does not fit
    │   ├── MissingTensorError            the spec asks for a tensor that the call lacks
    │   ├── UnexpectedTensorError         the call has a tensor that the spec does not ask for
    │   ├── ShapeError                    wrong rank or size
    │   ├── DtypeError (TypeError)        wrong dtype, or not a tensor
    │   └── DeviceError                   tensors on different devices
    ├── BackendError (RuntimeError)
    │   ├── UnknownBackendError           no backend has that name
    │   ├── UnsupportedError              the forced backend, or every backend, refused; carries the reasons
    │   ├── OutOfMemoryError (MemoryError)  a kernel found no memory for its own scratch buffers
    │   ├── TransientError                a trouble that may pass: the backend is tried again later
    │   └── ConfigError (ValueError)      a configuration outside a backend's search space
    ├── PluginError (RuntimeError)        a plugin that broke its contract (kept for `attnreg doctor`)
    ├── RecordError (ValueError)          a tuning record or database that cannot be read
    └── TuneError (RuntimeError)          tuning could not start or go on

A message says what happened, why, and what to do next, with the values at hand; a password among them is hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnreg.redaction import redact

__all__ = [
    "AttnregError",
    "BackendError",
    "ConfigError",
    "DeviceError",
    "DtypeError",
    "InputError",
    "MissingTensorError",
    "OutOfMemoryError",
    "PluginError",
    "RecordError",
    "ShapeError",
    "SpecError",
    "TransientError",
    "TuneError",
    "UnexpectedTensorError",
    "UnknownBackendError",
    "UnsupportedError",
]


class AttnregError(Exception):
    """Root of the tree: `except AttnregError` catches whatever attnreg raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class SpecError(AttnregError, ValueError):
    """The spec, or a part of it, holds a value that cannot be meant."""


class InputError(AttnregError, ValueError):
    """A tensor or argument of the call does not fit the spec or the other tensors.

    `argument` is the name of the offending argument.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument = argument

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.argument, str(self)[len(self.argument) + 2 :])


class MissingTensorError(InputError):
    """The spec asks for a tensor that the call lacks."""


class UnexpectedTensorError(InputError):
    """The call has a tensor that the spec does not ask for, or that does not exist."""


class ShapeError(InputError):
    """A tensor has the wrong rank or size."""


class DtypeError(InputError, TypeError):
    """A tensor has the wrong dtype, or something that is no tensor was given for one."""


class DeviceError(InputError):
    """Tensors of one call lie on different devices."""


class BackendError(AttnregError, RuntimeError):
    """A backend cannot be found or will not run."""


class UnknownBackendError(BackendError):
    """No loaded backend has that name."""


class UnsupportedError(BackendError):
    """The forced backend refused the problem, or every backend did.

    `reasons` maps each backend's name to the list of its reasons.
    """

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]]) -> None:
        lines = [message]
        for name, why in reasons.items():
            lines += [f"  {name}: {reason}" for reason in why]
        super().__init__("\n".join(lines))
        self.message = redact(message)
        self.reasons = {name: [redact(reason) for reason in why] for name, why in reasons.items()}

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, list[str]]]]:
        return type(self), (self.message, self.reasons)


class OutOfMemoryError(BackendError, MemoryError):
    """A kernel found no memory for its own scratch buffers. The backend is not broken, and nothing sets it aside."""


class TransientError(BackendError):
    """A trouble that may pass, such as an interrupted compiler: the backend is tried again later."""


class ConfigError(BackendError, ValueError):
    """A configuration lies outside the backend's search space."""


class PluginError(AttnregError, RuntimeError):
    """A plugin broke its contract; it is set aside and named by `attnreg doctor`."""


class RecordError(AttnregError, ValueError):
    """A tuning record or database cannot be read or does not say what it must."""


class TuneError(AttnregError, RuntimeError):
    """Tuning cannot start or go on."""
