"""`eager_fp8`: the emulation of FP8 attention as a backend, for tests and accuracy studies; only ever by force."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, Hardware, Problem, SearchSpace, scores
from attnreg_eager.build import keep_of, operands
from attnreg_eager.chunks import Operands
from attnreg_eager.fp8 import Descale, QuantisedCall, hadamard, quantise
from attnreg_eager.frame import Frame, padded_frame
from attnreg_eager.gradient import Recomputed
from attnreg_eager.keys import Scales, gather
from attnreg_eager.plan import plan
from attnreg_eager.tile import Tile

__all__ = ["EagerFp8"]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class EagerFp8:
    """Attention with the roundings of `attnreg_eager.fp8`. It is in no written order: nothing but force chooses it."""

    name = "eager_fp8"
    version = "2"

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        """What the kernels that it stands for cannot say either."""
        spec, out = problem.spec, []
        stored = problem.kv_dtype.startswith("float8")
        if not spec.dtype.compute.startswith("float8"):
            out.append(f"dtype.compute is {spec.dtype.compute!r}; this emulates float8_e4m3fn and float8_e5m2")
        if not isinstance(spec.score, (scores.ScaledDot, scores.Dot)):
            out.append(f"score {spec.score!r} is no scaled product of q and k")
        if spec.layout == "thd":
            out.append("layout 'thd': call it a sequence at a time")
        if problem.traced:
            out.append("runs in eager mode only, not under torch.compile, export or torch.func")
        if problem.dtype == "float64" or problem.kv_dtype == "int8":
            out.append(f"q in {problem.dtype} with k and v in {problem.kv_dtype} is not quantised to float8")
        if spec.dtype.rotate and stored:
            out.append("rotate=True, but k is stored in float8 already: rotate before storing")
        wrong = [d for d in (problem.dtype, problem.kv_dtype) if d.startswith("float8") and d != spec.dtype.compute]
        out += [f"dtype.compute is {spec.dtype.compute!r}, but a tensor comes as {d}" for d in wrong]
        return out

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        """The tile of the kernel that is emulated: it sets the blocks of scales and the order of the softmax."""
        return SearchSpace({"block_q": (64, 128, 32, 16), "block_kv": (64, 128, 32, 16)})

    def prepare(self, problem: Problem, config: Mapping[str, Any]) -> Any:
        """A callable for any sizes."""
        spec, block_q, block_kv = problem.spec, int(config["block_q"]), int(config["block_kv"])

        def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Any:
            return attend(spec, q, k, v, tensors, block_q, block_kv)

        return run


def attend(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any], block_q: int, block_kv: int
) -> Any:
    """The output in q's layout and dtype (bfloat16 where q is float8), or (out, lse)."""
    x, rest = operands(q, k, v, tensors)
    table = rest.get("block_table")
    if spec.layout == "bshd":
        x = x._replace(q=q.transpose(1, 2))
    if table is not None:
        x = x._replace(k=gather(k, table), v=gather(v, table))
    elif spec.layout == "bshd":
        x = x._replace(k=k.transpose(1, 2), v=v.transpose(1, 2))
    batch, q_heads, sq, _ = x.q.shape
    kv_heads, skv = x.k.shape[1], x.k.shape[2]
    frame = padded_frame(spec, rest, q.device, batch=batch, q_heads=q_heads, group=q_heads // kv_heads, sq=sq, skv=skv)
    sizes = plan(batch, kv_heads, frame.group, sq, skv, x.k.shape[-1] + x.v.shape[-1], 0)
    call, x = _quantised(x, frame, block_q, block_kv, keep_of(spec, rest, q.device, tracing=False))
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in x):
        out, lse = Recomputed.apply(call, sizes, *x)  # type: ignore[no-untyped-call]  # torch's own
    else:
        out, lse = call.walk(x, sizes)
    out = (out.transpose(1, 2) if spec.layout == "bshd" else out).to(torch.bfloat16 if q.dtype in FLOAT8 else q.dtype)
    return (out, lse.float()) if spec.return_lse else out


def _quantised(x: Operands, frame: Frame, block_q: int, block_kv: int, keep: Any) -> tuple[QuantisedCall, Operands]:
    """The call over fp8 values (steps 1 to 4 for what does not come as fp8) and these values."""
    spec, named = frame.spec, frame.tensors
    dtype: torch.dtype = getattr(torch, spec.dtype.compute)
    scales = Scales.of(spec, named, x.k.shape[2])
    factor = spec.score.factor(x.q.shape[-1])
    if x.q.dtype in FLOAT8:
        q, q_descale = x.q.float(), _stored(named["q_descale"], 1)
    else:
        q = hadamard(x.q.float()) if spec.dtype.rotate else x.q.float()
        q, q_descale = quantise(q, dtype, spec.dtype.scaling, block_q, frame.group)
    if x.k.dtype in FLOAT8:
        k, v = x.k.float(), x.v.float()
        k_descale, v_descale = (_stored(named[n], scales.kv_block) for n in ("k_descale", "v_descale"))
    else:
        used = _in_use(frame).unsqueeze(-1)
        k, v = (torch.where(used, y.float(), 0.0) for y in (x.k, x.v))
        k = hadamard(k) if spec.dtype.rotate else k
        (k, k_descale), (v, v_descale) = (quantise(y, dtype, spec.dtype.scaling, block_kv) for y in (k, v))
        k_descale, v_descale = (Descale(d.value, d.block, by_kv=True) for d in (k_descale, v_descale))
    call = QuantisedCall(
        Tile(spec, Scales({}, "tensor"), torch.float32, factor),
        frame,
        keep=keep,
        dtype=dtype,
        block_kv=block_kv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    return call, x._replace(q=q, k=k, v=v)


def _stored(value: Tensor, block: int) -> Descale:
    """The descale of a call, at full rank: one value, [B, Hkv], or [B, Hkv, N] of `block` keys each."""
    value = value.float()
    if value.numel() == 1:
        return Descale(value.reshape(1, 1, 1), 1 << 62, by_kv=True)
    return Descale(value, block, by_kv=True) if value.dim() == 3 else Descale(value.unsqueeze(-1), 1 << 62, by_kv=True)


def _in_use(frame: Frame) -> Tensor:
    """Step 1: keys [B, Hkv, Skv] that some row may attend."""
    batch, heads, skv = frame.bk.shape[0], frame.h.shape[1], frame.j.shape[-1]
    used = torch.zeros(batch, heads // frame.group, skv, dtype=torch.bool, device=frame.j.device)
    for first in range(0, frame.i.shape[2], 256):
        every = slice(None)
        live = frame.cut(every, every, slice(first, first + 256), every).live()
        if live is None:
            return torch.ones_like(used)
        seen = live[(None,) * (4 - live.dim())].any(2).expand(batch, heads, skv)
        used |= seen.reshape(batch, heads // frame.group, frame.group, skv).any(2)
    return used
