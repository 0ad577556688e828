"""What a model takes its 4-D mask for: bools, floats that it adds to the scores, or floats that must be a Tensor."""

from __future__ import annotations

import enum
import functools
import inspect
import sys
from typing import Any

__all__ = ["Expected", "expected_mask"]


class Expected(enum.Enum):
    """What the mask of a model stands for."""

    BOOLS = "True where a query may attend, as transformers gives to SDPA"
    FLOATS = "0 or the lowest number, as transformers gives to eager attention"
    TENSOR = "the same floats, and the model asks whether they are a Tensor"


def expected_mask(config: Any) -> Expected:
    """What the model of this config expects; without a config, bools."""
    return _of_type(None if config is None else type(config))


def _of_type(config_class: type | None) -> Expected:
    """A model that does not say that it supports SDPA has only ever been given eager's floats, and may add them."""
    if config_class is None:
        return Expected.BOOLS
    module = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
    return Expected.BOOLS if module is None else _looked_up(config_class, module)


# As torch.compiler.assume_constant_result says it: Dynamo calls it for real and takes the result for a constant.
_of_type._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _looked_up(config_class: type, module: Any) -> Expected:
    models = [cls for cls in vars(module).values() if isinstance(cls, type) and hasattr(cls, "_supports_sdpa")]
    own = [cls for cls in models if cls.__module__ == module.__name__]
    told = [cls for cls in own if getattr(cls, "config_class", None) is config_class] or own
    if not told or any(cls._supports_sdpa for cls in told):
        return Expected.BOOLS
    return Expected.TENSOR if _asks_for_a_tensor(module) else Expected.FLOATS


def _asks_for_a_tensor(module: Any) -> bool:
    """Read off its source, as transformers itself reads there whether a model takes other attention functions."""
    try:
        return "isinstance(attention_mask, torch.Tensor)" in inspect.getsource(module)
    except (OSError, TypeError):
        return False
