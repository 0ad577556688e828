"""attnreg: one front door to attention for PyTorch.

Say what you mean in an `AttentionSpec`; `attention(spec, q, k, v)` runs the fastest backend that is proven
correct on this hardware, and `explain` says why. Importing the package loads no plugin, no Triton, no CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnreg import metadata

with metadata.importing():
    from attnreg import errors, masks, modes, registry, scores, sparsity, store
    from attnreg.autograd import differentiable
    from attnreg.backend import Backend, Finding, StaticReport
    from attnreg.dispatch import attention, prepare, use_backend
    from attnreg.explanation import explain
    from attnreg.hardware import Hardware
    from attnreg.hookspecs import hookimpl, hookspec
    from attnreg.modes import autotune
    from attnreg.operands import is_plain
    from attnreg.operators import recorded
    from attnreg.problem import Problem, TensorInfo
    from attnreg.space import SearchSpace
    from attnreg.spec import AttentionSpec, HeadGrouping, Precision
    from attnreg.tracing import transformable
    from attnreg.validate import block_of

if TYPE_CHECKING:
    from attnreg import blocks, folders, testing
    from attnreg.merge import merge_states
    from attnreg.tuning import record, tune

__version__ = "0.1.0"

__all__ = [
    "AttentionSpec",
    "Backend",
    "Finding",
    "Hardware",
    "HeadGrouping",
    "Precision",
    "Problem",
    "SearchSpace",
    "StaticReport",
    "TensorInfo",
    "attention",
    "autotune",
    "block_of",
    "blocks",
    "differentiable",
    "errors",
    "explain",
    "folders",
    "hookimpl",
    "hookspec",
    "is_plain",
    "masks",
    "merge_states",
    "prepare",
    "record",
    "recorded",
    "scores",
    "sparsity",
    "targets",
    "testing",
    "transformable",
    "tune",
    "use_backend",
]

# The tuner's package is attnreg.tuning, not attnreg.tune: that name is the public function.
# What few programs need is loaded when it is first asked for: the tuner brings Optuna, the kit its oracle.
_LAZY = {
    "blocks": ("attnreg.blocks", None),
    "folders": ("attnreg.folders", None),
    "merge_states": ("attnreg.merge", "merge_states"),
    "record": ("attnreg.tuning", "record"),
    "targets": ("attnreg.targets", None),
    "testing": ("attnreg.testing", None),
    "tune": ("attnreg.tuning", "tune"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'attnreg' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _tune_missed(problem: Problem) -> None:
    from attnreg.tuning import tune_missing

    tune_missing(problem)


modes.set_tuner(_tune_missed)
store.offer(lambda: registry.current().records)
