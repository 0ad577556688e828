"""How kernels multiply: by multiply-adds, by the dot instruction of bfloat16 pairs, or by AMX.

AMX multiplies bfloat16 values; float32 ones it takes as three parts of 8 bits each, whose six greatest products make
one of float32's accuracy ("bf16x3"). Such parts cannot stand for infinity, nor NaN: calls with either go another way.
"""

from __future__ import annotations

import ctypes
import functools

from attnreg import Hardware
from attnreg_cpu import build

PRODUCTS = ("fma", "dot", "amx", "amx_bf16x3")  # in the order of the kernels' numbers
TILES = {"amx_tile", "amx_bf16"}  # flags of a CPU that multiplies blocks of bfloat16 in tile registers
# arch_prctl of Linux on x86-64, its request for a feature of extended state, and that of the tile registers' data.
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def products_of(dtype: str, hardware: Hardware) -> list[str]:
    """The ways to multiply this dtype, best first."""
    tiles = has_tiles(hardware) and not refused()
    if dtype == "float32":
        # How much faster depends on what a core's other thread does (measured on an Emerald Rapids, D 64, 2,048 tokens:
        # 23 to 33 ms, against 31 to 45): that is for the tuner to find out.
        return ["fma", "amx_bf16x3"] if tiles else ["fma"]
    if dtype == "bfloat16" and has_bfloat_dot(hardware):
        return ["amx", "dot", "fma"] if tiles else ["dot", "fma"]
    return ["fma"]


def of_gradients(product: str) -> str:
    """How the backward kernel multiplies where the forward one uses `product`."""
    return "fma" if product == "amx_bf16x3" else product


def takes(product: str, vectors: int, *, gradients: bool) -> bool:
    """Are there kernels with this many registers of query rows? Gradients by AMX sum over whole blocks of rows."""
    return not (gradients and product == "amx" and vectors % 2)


def has_bfloat_dot(hardware: Hardware) -> bool:
    """Does the CPU multiply bfloat16 pairs in one instruction that the kernels use?"""
    return "avx512_bf16" in hardware.isa and hardware.arch in ("avx512", "amx")


def has_tiles(hardware: Hardware) -> bool:
    """Does the CPU multiply blocks of bfloat16 in tile registers?"""
    return set(hardware.isa) >= TILES


def on_this_cpu() -> bool:
    """Has this machine's CPU tile registers?"""
    return set(build.cpu_identity().replace("'", " ").split()) >= TILES


@functools.cache
def refused() -> bool:
    """Asks the operating system for the tile registers of this CPU, if it has any; True where it says no.

    The permission is the process's, and its children's. Linux also refuses where a thread's alternative signal stack is
    too small for them.
    """
    if not on_this_cpu():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) != 0
