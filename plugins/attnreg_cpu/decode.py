"""The decode path: few query rows over a long or quantised cache, by kernels that read keys and values once."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import Hardware, Problem, SearchSpace, block_of, scores, sparsity
from attnreg_cpu import build, params
from attnreg_cpu.arguments import Arguments, dense_rows, longest
from attnreg_cpu.conjunction import read_conjunction
from attnreg_cpu.toolchain import BuildError
from attnreg_cpu.variant import check_status

__all__ = ["Decode", "decode_space", "decode_supports"]

MOST_ROWS = 64  # of a KV head that one task takes
ONE_PASS = 4  # rows that the products take at once
LARGE_CACHE = 1 << 27  # bytes, more than a last-level cache keeps of it between two calls
WIDEN_ROWS = 9  # from which a narrow cache is widened once a block, unless tuned otherwise
CACHES = {
    "float32": "float",
    "float16": "half_t",
    "bfloat16": "bfloat_t",
    "float8_e4m3fn": "e4m3_t",
    "float8_e5m2": "e5m2_t",
    "int8": "int8_t",
}
Q_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}
SCALES = ("q_descale", "k_descale", "v_descale")
_end_packer = struct.Struct("=20q")


def decode_supports(problem: Problem) -> list[str]:
    """Every reason against the decode path, but for those that hold for all native kernels; empty if there is none."""
    spec = problem.spec
    reasons = []
    if problem.needs_grad:
        reasons.append(f"gradients of {', '.join(sorted(problem.grads))}: decoding has none")
    if problem.dtype not in Q_TYPES:
        reasons.append(f"dtype {problem.dtype}: decoding takes {', '.join(Q_TYPES)}")
    if problem.kv_dtype not in CACHES:
        reasons.append(f"k and v of {problem.kv_dtype}: decoding takes {', '.join(CACHES)}")
    if not isinstance(spec.score, (scores.ScaledDot, scores.Dot)):
        reasons.append(f"score {spec.score!r}: only scaled and plain dot products")
    if spec.dropout_p:
        reasons.append(f"dropout_p={spec.dropout_p}: the native kernels draw no random numbers")
    if max(problem.sq, problem.skv) >= 2**31:
        reasons.append(f"{max(problem.sq, problem.skv)} rows: positions are 32-bit in the kernels")
    if read_conjunction(spec.mask) is None:
        reasons.append(f"mask {spec.mask!r}: no conjunction of intervals")
    if not isinstance(spec.sparsity, sparsity.Dense):
        reasons.append(f"sparsity {spec.sparsity!r}: decoding walks no block layouts")
    return reasons


def decode_space(problem: Problem, hardware: Hardware) -> SearchSpace:
    """Choices: kv_splits (pieces that the longest cache is cut into; 0: by the number of threads), block_kv (keys at a
    time), prefetch (bytes that are asked for in advance), streams (above 1: all of the next block is asked for
    instead, in so many places in turn), kv_heads (KV heads that one task walks together: what lies side by side in
    memory is then read so) and widen_rows (query rows from which a narrow cache is widened to float32 once a block,
    not once a pair of rows).
    """
    heads = [n for n in (1, 2, 4, 8, 16, 32) if n < problem.kv_heads] + [problem.kv_heads]
    beside = problem.spec.layout != "bhsd" and problem.spec.page_size is None
    default = {
        "kv_splits": 0,
        "block_kv": _default_block(problem),
        "kv_heads": heads[-1] if beside else 1,
        "widen_rows": WIDEN_ROWS,
        "prefetch": _default_prefetch(problem, hardware),
        "streams": _default_streams(problem, hardware),
    }
    narrow = problem.kv_dtype != "float32"
    return SearchSpace(
        choices={
            "kv_splits": [0, 1, 2, 4, 8, 16, 32],
            "block_kv": [32, 64, 128, 256, 512, 1024, 2048],
            "kv_heads": heads,
            "prefetch": [0, 1024, 2048, 4096, 8192, 16384, 32768],
            "streams": [1, 2, 4, 8],
            "widen_rows": [1, 2, 3, 5, WIDEN_ROWS] if narrow else [WIDEN_ROWS],
        },
        default=default,
        constraints=[
            (
                "what is used again of a block fits in the L2 cache",
                lambda c: _scratch(problem, c) <= (hardware.caches[1] or 2**19) or c == default,
            ),
            (
                "what is asked for in streams has no distance",
                lambda c: c["streams"] == 1 or c["prefetch"] == default["prefetch"],
            ),
        ],
        seeds=[
            default,
            {**default, "streams": 4 if default["streams"] == 1 else 1},
            {**default, "block_kv": 128},
            {**default, "prefetch": 4096},
        ],
    )


def _default_block(problem: Problem) -> int:
    """Keys at a time: what lies in the L2 cache with room to spare, as it is read more than once."""
    narrow = getattr(torch, problem.kv_dtype).itemsize
    row = problem.head_dim * (4 if problem.sq * problem.group >= WIDEN_ROWS else narrow)
    return next((n for n in (512, 256, 128) if n * row <= 64 * 1024), 64)


def _default_prefetch(problem: Problem, hardware: Hardware) -> int:
    """Bytes ahead: more arithmetic between two rows needs more of them under way on AMD's cores."""
    if hardware.vendor == "intel":
        return 4096  # measured on an Emerald Rapids
    if problem.sq * problem.group >= 3:
        return 16384
    return 4096 if problem.kv_dtype == "float32" else 8192


def _default_streams(problem: Problem, hardware: Hardware) -> int:
    """Places in turn: faster where memory is slow to answer, for elements of 32 and 16 bits but not of 8.

    Measured on a Zen 3, and on an Emerald Rapids, where what the last cache holds comes faster in order.
    """
    size = getattr(torch, problem.kv_dtype).itemsize
    if size == 1:
        return 1
    if hardware.arch == "avx2":
        return 4
    few = problem.sq * problem.group < WIDEN_ROWS  # with more, memory waits for arithmetic
    cache = problem.batch * problem.kv_heads * problem.skv * (problem.head_dim + problem.head_dim_v) * size
    return 8 if hardware.vendor == "intel" and few and cache >= LARGE_CACHE else 1


def _scratch(problem: Problem, config: Mapping[str, Any]) -> int:
    """Bytes of a block that are used more than once: scores, and keys and values that further rows read again."""
    rows = min(problem.sq * problem.group, MOST_ROWS)
    size: int = getattr(torch, problem.kv_dtype).itemsize
    widened = 4 if size < 4 and rows >= int(config["widen_rows"]) else 0
    again = widened or (size if rows > ONE_PASS else 0)
    return int(config["block_kv"]) * (4 * rows + (problem.head_dim + problem.head_dim_v) * again)


class Decode:
    """run(q, k, v, **tensors) of one prepared problem: the output, or (output, lse).

    Compiles (or finds) the kernel. Raises BuildError without a working compiler.
    """

    def __init__(self, problem: Problem, config: Mapping[str, int | str | float | bool]) -> None:
        mask = read_conjunction(problem.spec.mask)
        assert mask is not None, "decode_supports() refuses other masks"
        settings = {"block_kv": int(config["block_kv"]), "splits": int(config["kv_splits"])}
        self._kernel = _kernel(CACHES[problem.kv_dtype])
        self._arguments = Arguments(problem, mask, settings)
        spec = problem.spec
        self._layout = spec.layout
        self._page_size = spec.page_size
        self._scaling = spec.dtype.scaling
        self._return_lse = spec.return_lse
        self._out_dtype = problem.out_dtype
        self._head_dim_v = problem.head_dim_v
        self._like_q = problem.head_dim == problem.head_dim_v and str(problem.out_dtype) == f"torch.{problem.dtype}"
        self._end = (
            Q_TYPES[problem.dtype],
            Q_TYPES[str(problem.out_dtype).removeprefix("torch.")],
            problem.head_dim,
            problem.head_dim_v,
            int(config["kv_heads"]),
            int(config["widen_rows"]),
            int(config["prefetch"]),
            int(config["streams"]),
        )
        self._plain_end = _end_packer.pack(*[0] * 12, *self._end)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
        out, lse, _ = self.compute(q, k, v, tensors)
        return out if lse is None else (out, lse)

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], for_backward: bool = False
    ) -> tuple[Tensor, Tensor | None, None]:
        """out, and lse or None; see attnreg's Kernels. Decoding has no gradients, so nothing is for a backward pass."""
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        if not self._like_q or (out := torch.empty_like(q)).stride(-1) != 1:  # of overlapping rows it is not dense
            out = q.new_empty(*q.shape[:-1], self._head_dim_v, dtype=self._out_dtype)
        lse = self._empty_lse(q) if self._return_lse else None
        if self._page_size is not None:
            skv = tensors["block_table"].shape[1] * self._page_size
        else:
            skv = k.shape[-2 if self._layout == "bhsd" else -3]
        batch = tensors["cu_seqlens_q"].shape[0] - 1 if self._layout == "thd" else q.shape[0]
        end, kept = self._plain_end, list[Tensor]()
        if "k_descale" in tensors:
            end = self._scale_end(tensors, kept, skv)
            tensors = {name: x for name, x in tensors.items() if name not in SCALES}
        tail, more_kept = self._arguments.tail(tensors)
        check_status(self._kernel(self._arguments.head(q, k, v, out, lse, batch, skv) + tail + end))
        del kept, more_kept  # the bytes pointed into them
        return out, lse, None

    def _empty_lse(self, q: Tensor) -> Tensor:
        *batch, a, b = q.shape[:-1]
        return q.new_empty(*batch, *((a, b) if self._layout == "bhsd" else (b, a)), dtype=torch.float32)

    def _scale_end(self, tensors: Mapping[str, Any], kept: list[Tensor], skv: int) -> bytes:
        """The struct's end with the scales' places, which `kept` keeps alive."""
        pointers: list[int] = []
        strides: list[int] = []
        keys_a_scale = 0
        for name in SCALES:
            x = tensors.get(name)
            if x is None:
                pointers.append(0)
                strides += [0, 0] if name == "q_descale" else [0, 0, 0]
                continue
            x = x.detach().float()
            kept.append(x)
            pointers.append(x.data_ptr())
            if self._scaling == "tensor":
                x = x.reshape(1, 1)
            own = [0 if n == 1 else st for n, st in zip(x.shape, x.stride(), strict=True)]
            strides += own[:2] if name == "q_descale" else [*own, 0][:3]
            if x.dim() == 3:
                keys_a_scale = self._page_size or block_of(_longest(tensors, skv), x.shape[-1])
        return _end_packer.pack(*pointers, *strides, keys_a_scale, *self._end)


def _longest(tensors: Mapping[str, Any], skv: int) -> int:
    """Keys of the longest sequence, which the blocks of scaling="block" cut."""
    return skv if tensors.get("cu_seqlens_k") is None else longest(tensors, "k")


@functools.cache
def _kernel(cache: str) -> Callable[[bytes], int]:
    library = build.library("decode.cpp", {"ATTNREG_CACHE": cache})
    size = library.attnreg_decode_params_size
    size.restype = ctypes.c_int64
    packed = params.SIZE + _end_packer.size
    if size() != packed:
        raise BuildError(f"decode_plan.h has {size()} bytes where decode.py packs {packed}")
    entry = library.attnreg_decode
    entry.argtypes = [ctypes.c_char_p]
    entry.restype = ctypes.c_int64
    return entry
