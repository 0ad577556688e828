"""Cross-compile the kernels in every form they take; test_flash_compile runs this without the interpreter.

Usage: compile_forms.py ARCH [flash|fp8|odd]. Prints one JSON line a kernel: form, kernel, registers,
spills, shared, instructions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

from attnreg import AttentionSpec, Hardware, Problem, TensorInfo, masks, sparsity
from attnreg_triton.block_sparse import TritonBlockSparse
from attnreg_triton.crosscompile import compile_kernel
from attnreg_triton.flash import TritonDecode, TritonFlash
from attnreg_triton.fp8 import TritonFp8

GPUS = {
    "sm_80": Hardware("cuda", "nvidia", "a100", "sm_80", 108, 0, (), (0, 0, 0), 166912, 65536, 32),
    "sm_90": Hardware("cuda", "nvidia", "h100", "sm_90", 132, 0, (), (0, 0, 0), 232448, 65536, 32),
    "gfx942": Hardware("hip", "amd", "mi300x", "gfx942", 304, 0, (), (0, 0, 0), 65536, 131072, 64),
}
BAND = masks.Causal() & masks.SlidingWindow(100)
ALL = AttentionSpec(
    mask=BAND & masks.Document() & masks.Padding(),
    softcap=30.0, bias=True, alibi=True, sinks=True, dropout_p=0.1, align="offset", return_lse=True,
)  # fmt: skip


Form = tuple[str, TritonFlash | TritonDecode | TritonFp8 | TritonBlockSparse, Problem]


def flash() -> Iterator[Form]:
    """Problems whose kernels differ in code, not only in tiles; sizes of 1 because Triton makes constants of them."""
    train = Problem(
        AttentionSpec(mask=masks.Causal()), 2, 16, 4, 2048, 2048, 64, 64, 64,
        dtype="bfloat16", kv_dtype="bfloat16", device="cuda", grads=frozenset("qkv"),
    )  # fmt: skip
    mla = {"head_dim": 192, "head_dim_k": 192, "head_dim_v": 128, "kv_heads": 16}
    half = {"dtype": "float16", "kv_dtype": "float16"}
    one = {"batch": 1, "q_heads": 1, "kv_heads": 1, "sq": 1, "skv": 1, "grads": frozenset()}
    packed = {"total_q": 3000, "total_k": 4000, "grads": frozenset("qkv")}
    paged = AttentionSpec(mask=BAND, page_size=16, layout="thd")
    yield "train", TritonFlash(), train
    yield "window", TritonFlash(), replace(train, spec=AttentionSpec(mask=BAND, layout="bshd"), **half)
    yield "tail", TritonFlash(), replace(train, **mla)
    yield "everything", TritonFlash(), replace(train, spec=ALL, grads=frozenset({"q", "k", "v", "bias"}))
    one_key = {"spec": AttentionSpec(bias=True), "tensors": (TensorInfo("bias", "bfloat16", (0, 0, 0, 1)),)}
    yield "one bias of all keys", TritonFlash(), replace(train, **one_key, grads=frozenset())
    yield "packed", TritonFlash(), replace(train, spec=AttentionSpec(mask=masks.Causal(), layout="thd"), **packed)
    yield "ones", TritonFlash(), replace(train, **one)
    yield "decode", TritonDecode(), replace(train, sq=1, skv=8192, grads=frozenset())
    yield "paged", TritonDecode(), replace(train, spec=paged, sq=1, total_q=2, pages=300, grads=frozenset())


def fp8() -> Iterator[Form]:
    """q, k and v that come as FP8: an 8-bit product takes 32 columns, which a narrow head, or its tail, has not."""
    stored, descales = "float8_e4m3fn", ("q_descale", "k_descale", "v_descale")
    tensors = tuple(TensorInfo(name, "float32", (1,)) for name in descales)
    for name, head_dim, keys in (
        ("D64", 64, 512),
        ("D16", 16, 512),
        ("D80", 80, 512),
        ("D144", 144, 512),
        ("8 keys", 64, 8),
    ):
        asked = Problem(
            AttentionSpec(), 2, 4, 2, 128, keys, head_dim, head_dim, head_dim, dtype=stored, kv_dtype=stored,
            device="cuda", tensors=tensors,
        )  # fmt: skip
        yield f"stored {name}", TritonFp8(), asked


def odd() -> Iterator[Form]:
    """Heads whose rows 16 does not divide, or whose columns end before their block: loads hold addresses and masks."""

    def asked(spec: AttentionSpec, head_dim: int, head_dim_v: int, grads: str = "", sq: int = 2048) -> Problem:
        return Problem(
            spec, 2, 16, 4, sq, 2048, head_dim, head_dim, head_dim_v, dtype="bfloat16", kv_dtype="bfloat16",
            device="cuda", grads=frozenset(grads),
        )  # fmt: skip

    causal, blocks = AttentionSpec(mask=masks.Causal()), AttentionSpec(sparsity=sparsity.BigBird(64))
    yield "flash D72", TritonFlash(), asked(causal, 72, 72, "qkv")
    yield "flash D96", TritonFlash(), asked(causal, 96, 96, "qkv")
    yield "flash D160", TritonFlash(), asked(causal, 160, 160, "qkv")
    yield "flash D200", TritonFlash(), asked(causal, 200, 200, "qkv")
    yield "decode D100", TritonDecode(), asked(causal, 100, 100, sq=1)
    yield "blocks D72", TritonBlockSparse(), asked(blocks, 72, 72)
    yield "blocks D80", TritonBlockSparse(), asked(blocks, 80, 80, "qkv")
    yield "blocks D16/80", TritonBlockSparse(), asked(blocks, 16, 80, "qkv")


def main(arch: str, which: str = "flash") -> None:
    """Compile every form's default configuration."""
    hardware = GPUS[arch]
    for name, backend, problem in {"flash": flash, "fp8": fp8, "odd": odd}[which]():
        assert backend.supports(problem, hardware) == [], name
        for spec in backend.compile_specs(problem, backend.space(problem, hardware).default):
            binary = asdict(compile_kernel(spec, hardware))
            kernel = binary.pop("name")
            print(json.dumps({"form": name, "kernel": kernel, **binary}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
