"""How kernels multiply: by multiply-adds, by the dot instruction of bfloat16 pairs, or by AMX."""

from __future__ import annotations

import ctypes
import functools

from attnreg import Hardware
from attnreg_cpu import build

PRODUCTS = ("fma", "dot", "amx")  # in the order of the kernels' numbers
# arch_prctl of Linux on x86-64, its request for a feature of extended state, and that of the tile registers' data.
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def products_of(dtype: str, hardware: Hardware) -> list[str]:
    """The ways to multiply this dtype, best first."""
    ways = ["fma"]
    if dtype == "bfloat16" and has_bfloat_dot(hardware):
        ways.insert(0, "dot")
        if has_tiles(hardware) and not refused():
            ways.insert(0, "amx")
    return ways


def has_bfloat_dot(hardware: Hardware) -> bool:
    """Does the CPU multiply bfloat16 pairs in one instruction that the kernels use?"""
    return "avx512_bf16" in hardware.isa and hardware.arch in ("avx512", "amx")


def has_tiles(hardware: Hardware) -> bool:
    """Does the CPU multiply blocks of bfloat16 in tile registers?"""
    return {"amx_tile", "amx_bf16"} <= set(hardware.isa)


@functools.cache
def refused() -> bool:
    """Asks the operating system for the tile registers of this CPU, if it has any; True where it says no.

    The permission is the process's, and its children's. Linux also refuses where a thread's alternative signal stack is
    too small for them.
    """
    if "amx_bf16" not in build.cpu_identity():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) != 0
