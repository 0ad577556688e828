"""Which compiled kernel serves a problem: the macros of one library, and loading it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from attnreg import Problem, errors, scores
from attnreg_cpu import build, params, product
from attnreg_cpu.toolchain import BuildError

ELEMENTS = {"float32": "float", "float16": "half_t", "bfloat16": "bfloat_t"}
Kernel = Callable[[bytes], int]
NOT_FINITE = 2  # status of a kernel that cannot compute with what it was given, and may have written to the outputs


@dataclass(frozen=True)
class Variant:
    """One compiled kernel.

    source: its file in csrc. dtype: of q, k, v. vectors: registers of query rows in a tile. product: how it
    multiplies, of product.PRODUCTS. additive: Bahdanau's score instead of a product.
    """

    source: str
    head_dim: int
    head_dim_v: int
    dtype: str
    vectors: int
    product: str = "fma"
    additive: bool = False

    def defines(self) -> dict[str, int | str]:
        """The macros that the source is compiled with."""
        return {
            "ATTNREG_HEAD_K": self.head_dim,
            "ATTNREG_HEAD_V": self.head_dim_v,
            "ATTNREG_ELEMENT": ELEMENTS[self.dtype],
            "ATTNREG_PRODUCT": product.PRODUCTS.index(self.product),
            "ATTNREG_VECTORS": self.vectors,
            "ATTNREG_ADDITIVE": int(self.additive),
        }

    def is_ready(self) -> bool:
        """Does the cache hold its library, by whatever compiler?"""
        return build.ready(self.source, self.defines()) is not None

    def compile(self) -> None:
        """Compile the library unless the cache has it. Raises BuildError."""
        build.build(self.source, self.defines())

    def kernel(self, symbol: str) -> Kernel:
        """The compiled entry point `symbol`, which takes packed params and returns 0 on success."""
        return load_kernel(self, symbol)


def variants_of(problem: Problem, vectors: int, way: str) -> list[Variant]:
    """The kernels that a prefill problem may need under this shape of the micro-kernel."""
    sources = ("forward.cpp", "backward.cpp") if problem.needs_grad else ("forward.cpp",)
    kernels = [variant_of(source, problem, vectors, way) for source in sources]
    if way == "amx_bf16x3":
        kernels.append(variant_of("forward.cpp", problem, vectors, "fma"))  # for values that are not finite
    return kernels


def variant_of(source: str, problem: Problem, vectors: int, way: str) -> Variant:
    """The kernel in `source` for a prefill problem whose forward kernel has this shape and multiplies by `way`."""
    way = product.of_gradients(way) if source == "backward.cpp" else way
    additive = isinstance(problem.spec.score, scores.Additive)
    return Variant(source, problem.head_dim, problem.head_dim_v, problem.dtype, vectors, way, additive)


@functools.cache
def load_kernel(variant: Variant, symbol: str) -> Kernel:
    if variant.product.startswith("amx") and product.refused():
        raise errors.BackendError("attnreg_cpu: the operating system refuses the CPU's tile registers (AMX)")
    library = build.library(variant.source, variant.defines())
    size = library.attnreg_params_size
    size.restype = ctypes.c_int64
    if size() != params.SIZE:
        raise BuildError(
            f"params.h has {size()} bytes where params.py packs {params.SIZE}: a kernel of another release?"
        )
    entry = getattr(library, symbol)
    entry.argtypes = [ctypes.c_char_p]
    entry.restype = ctypes.c_int64
    if variant.product != "amx_bf16x3":
        return entry  # type: ignore[no-any-return]  # ctypes functions are untyped

    def finite_or_else(arguments: bytes) -> int:
        status: int = entry(arguments)
        return status if status != NOT_FINITE else load_kernel(replace(variant, product="fma"), symbol)(arguments)

    return finite_or_else


def check_status(status: int) -> None:
    """Raise OutOfMemoryError where a kernel says that it could not run."""
    if status:
        raise errors.OutOfMemoryError("attnreg_cpu: out of memory for a thread's scratch buffers")
