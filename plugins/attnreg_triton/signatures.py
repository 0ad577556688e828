"""Compiler input of a launch: the same description that starts a kernel, for a target that is not here.

Types and specialisations follow what Triton's launcher derives from real arguments: None and 1 are compile-time
values, integers and addresses that are multiples of 16 say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
ALIGNED = [["tt.divisibility", 16]]
Path = tuple[int, ...]


@dataclass(frozen=True)
class CompileSpec:
    """What `triton.compile(ASTSource(fn, signature, constexprs, attrs), target, options)` takes, and the grid.

    `options` holds num_warps and num_stages, and waves_per_eu where a HIP configuration sets it.
    """

    name: str
    fn: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[Path, Any]
    attrs: Mapping[Path, Any]
    options: Mapping[str, int]
    grid: int


def compile_spec(launch: Launch) -> CompileSpec:
    """The compiler input of one launch; loads Triton and the kernel, compiles nothing."""
    fn = launch.kernel()
    constexprs: dict[Path, Any] = {}
    attrs: dict[Path, Any] = {}
    signature: dict[str, Any] = {}
    for position, parameter in enumerate(fn.params):
        name, path = parameter.name, (position,)
        if name in launch.constants:
            signature[name] = "constexpr"
            constexprs[path] = launch.constants[name]
            continue
        signature[name] = _describe(launch.arguments[name], path, constexprs, attrs, not parameter.do_not_specialize)
        if parameter.do_not_specialize_on_alignment:
            attrs = {where: what for where, what in attrs.items() if where[0] != position}
    return CompileSpec(fn.__name__, fn, signature, constexprs, attrs, dict(launch.options), launch.grid)


def _describe(value: Any, path: Path, constexprs: dict[Path, Any], attrs: dict[Path, Any], specialise: bool) -> Any:
    """Triton's type of an argument; notes its compile-time value (None, and 1 to `specialise`) or alignment by path."""
    if isinstance(value, tuple):
        leaves = [_describe(leaf, (*path, index), constexprs, attrs, specialise) for index, leaf in enumerate(value)]
        return type(value)(*leaves) if hasattr(value, "_fields") else tuple(leaves)
    if value is None or (specialise and isinstance(value, int) and value == 1):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        attrs[path] = ALIGNED
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if not isinstance(value, int):
        raise TypeError(f"argument {path}: a kernel takes tensors, integers, floats and None, got {value!r}")
    if value % 16 == 0:
        attrs[path] = ALIGNED
    return "i32" if -(2**31) <= value < 2**31 else "i64"
