"""Concrete inputs for any Problem: q, k, v and every named tensor of its spec, in flavours that break weak kernels."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attnreg import scores
from attnreg.problem import Problem
from attnreg.testing.meaning import Place, allowed
from attnreg.testing.named import Draw, named_tensors
from attnreg.testing.quantised import grouped, largest, stored
from attnreg.testing.sequences import as_rows, from_rows, key_rows, shapes
from attnreg.testing.unused import fill_unused
from attnreg.validate import check

__all__ = ["FLAVOURS", "Flavour", "Inputs", "call_tensors", "make_inputs", "real_problem"]

Flavour = Literal["normal", "large", "constant", "empty", "low", "huge", "expanded", "strided", "edges", "unused"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
"""normal: unit noise. large: logits of some tens. constant: all queries and all keys are one row. empty: rows that
attend nothing, wherever the spec has a tensor or a size that can make some. low: lse below -88, where exp(lse)
is 0 in float32. huge: the largest finite values in every key that no query may attend, stale pages included.
expanded: stride 0. strided: last dimension not dense. edges: bias entries of -inf and +-1e4, windows and
prefixes at their ends. low and edges: a row of the bias at the lowest number, where a float32 lse holds no log of a
sum. unused: NaN and infinities wherever a slot is not used, see `attnreg.testing.unused`."""

HUGE_PAIRS = 1 << 26


@dataclass(frozen=True)
class Inputs:
    """One call's arguments. `problem` is the Problem that they really make."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: dict[str, Any]
    problem: Problem
    flavour: Flavour
    seed: int

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that need a gradient, by name."""
        every = {"q": self.q, "k": self.k, "v": self.v, **self.tensors}
        return {n: x for n, x in every.items() if isinstance(x, Tensor) and x.requires_grad}

    def __str__(self) -> str:
        return f"{self.flavour} inputs, seed {self.seed}, of {self.problem}"


def make_inputs(
    problem: Problem, flavour: Flavour = "normal", seed: int = 0, device: torch.device | str | None = None
) -> Inputs:
    """Inputs of the problem's sizes, dtypes, stride classes and named tensors; the same for the same arguments.

    Named tensors that the spec needs and `problem.tensors` does not tell get default dtypes and shapes; those that
    are optional (`seqused_k`) are given where `problem.tensors` names them. Tensors in `problem.grads` are leaves
    that require a gradient.
    """
    return _made(_draw(problem, flavour, seed, device), flavour)


def call_tensors(problem: Problem) -> dict[str, Any]:
    """The named tensors of `make_inputs(problem)`, without its q, k and v."""
    return named_tensors(_draw(problem))


def real_problem(problem: Problem) -> Problem:
    """The Problem that `make_inputs(problem)` really makes, found without the memory of any tensor.

    Raises what `make_inputs` raises where the sizes do not fit the spec.
    """
    spec = problem.spec.model_copy(update={"dropout_p": 0.0})  # a generator is in no Problem, and meta has none
    draw = _draw(replace(problem, spec=spec), device="cpu")
    draw.device = torch.device("meta")  # once the lengths of packed sequences, which are values, are drawn
    made = _made(draw, "normal").problem
    return replace(made, spec=problem.spec, device=torch.device(problem.device).type)


def _draw(
    problem: Problem, flavour: Flavour = "normal", seed: int = 0, device: torch.device | str | None = None
) -> Draw:
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour: expected one of {', '.join(FLAVOURS)}, got {flavour!r}")
    device = torch.device(problem.device if device is None else device)
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(flavour.encode()))
    return Draw(problem, flavour, seed, generator, device)


def _made(draw: Draw, flavour: Flavour) -> Inputs:
    problem, tensors = draw.problem, named_tensors(draw)
    q, k, v = _q_k_v(draw, tensors)
    if flavour == "huge":
        k, v = _huge(problem, q, k, v, tensors)
    elif flavour == "unused":
        k, v, tensors = fill_unused(problem, q, k, v, tensors)
    classes = {"expanded": ("expanded",) * 3, "strided": ("strided",) * 3}.get(flavour, problem.strides)
    q, k, v = (_lay_out(x, cls) for x, cls in zip((q, k, v), classes, strict=True))
    for name in problem.grads:
        if name in ("q", "k", "v"):
            {"q": q, "k": k, "v": v}[name].requires_grad_()
        elif name in tensors:
            tensors[name].requires_grad_()
    with torch.enable_grad():
        made = Problem.of(problem.spec, check(problem.spec, q, k, v, tensors), q, k, v, tensors)
    return Inputs(q, k, v, tensors, made, flavour, draw.seed)


def _q_k_v(draw: Draw, tensors: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors, dense, in the layout of the call."""
    p = draw.problem
    q_rows, k_rows = draw.q_rows, draw.k_rows
    q = draw.normal(*q_rows, p.q_heads, p.head_dim)
    k = draw.normal(*k_rows, p.kv_heads, p.head_dim_k)
    v = draw.normal(*k_rows, p.kv_heads, p.head_dim_v)
    if draw.flavour == "large":
        q, k = 5 * q, 5 * k
    elif draw.flavour == "constant":
        q = q.flatten(0, -3)[:1].expand(q.shape) if q.numel() else q
        k = k.flatten(0, -3)[:1].expand(k.shape) if k.numel() else k
    elif draw.flavour == "low":
        q_size, k_size = _low_sizes(p)
        q, k = q_size * (1 + 0.05 * q), k_size * (1 + 0.05 * k)
    first_q = p.spec.layout == "bhsd"
    first_k = first_q or p.spec.page_size is not None
    out = []
    for x, dtype, heads_first in ((q, p.dtype, first_q), (k, p.kv_dtype, first_k), (v, p.kv_dtype, first_k)):
        kind: torch.dtype = getattr(torch, dtype)
        if stored(kind):
            # Four standard deviations fill the stored range; `named` draws descales that undo this.
            top = largest(kind)
            x = (x * (top / 4)).clamp(-top, top)
            x = x.round() if kind == torch.int8 else x
        out.append((x.transpose(-3, -2) if heads_first else x).to(kind).contiguous())
    return out[0], out[1], out[2]


def _low_sizes(p: Problem) -> tuple[float, float]:
    """What every entry of q and of k must be for logits of about -130."""
    if isinstance(p.spec.score, scores.Additive):
        return 1.0, 1.0
    factor = p.spec.score.factor(p.head_dim) * (1 if isinstance(p.spec.score, scores.General) else p.head_dim)
    if not factor:
        return 1.0, 1.0
    product = -130 / factor
    if stored(getattr(torch, p.kv_dtype)) and not stored(getattr(torch, p.dtype)):
        return product, 1.0  # a stored k cannot grow
    return abs(product) ** 0.5, math.copysign(abs(product) ** 0.5, product)


def _huge(p: Problem, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """k and v with the largest finite values wherever no query of any sequence looks."""
    spec = p.spec
    every = shapes(spec, q, k, tensors)
    if sum(one.sq * one.skv for one in every) * p.q_heads > HUGE_PAIRS:
        raise ValueError(f"huge: finding the keys that nobody may attend takes too long for {p}")
    k_rows, v_rows = as_rows(spec, k).clone(), as_rows(spec, v).clone()
    seen = torch.zeros(k_rows.shape[:2], dtype=torch.bool, device=k.device)
    for one in every:
        rows = torch.arange(one.sq, device=q.device)
        place = Place(one.b, rows, rows + one.offset, p.q_heads, one.skv, spec.layout == "thd")
        may = allowed(spec, place, tensors).expand(p.q_heads, one.sq, one.skv)
        mine = grouped(may, p.group).any(1).any(1).T[: one.used]
        where = key_rows(spec, one, k, tensors)[: one.used]
        seen.index_put_((where,), seen[where] | mine)
    sign = torch.where(torch.arange(k_rows.shape[0], device=k.device) % 2 == 0, 1.0, -1.0)[:, None, None]
    out = []
    for rows, x in ((k_rows, k), (v_rows, v)):
        top = (sign * largest(x.dtype)).expand(rows.shape)
        # float8 has no `where` of its own on every device.
        mixed = torch.where(seen[..., None], rows.double(), top.double()).to(x.dtype)
        out.append(from_rows(spec, mixed, x).contiguous())
    return out[0], out[1]


def _lay_out(x: Tensor, kind: str) -> Tensor:
    """The values of x (for "expanded": some of them) in a tensor of that stride class."""
    make: dict[str, Callable[[Tensor], Tensor]] = {"rows": _row_view, "strided": _every_second, "expanded": _repeated}
    return make[kind](x) if kind in make else x


def _row_view(x: Tensor) -> Tensor:
    """Last dimension dense, the two before it swapped in memory, as a projection's `view(...).transpose` gives."""
    swapped = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if not swapped.is_contiguous():
        return swapped
    wide = torch.cat([x, x], -1)
    return wide[..., : x.shape[-1]]


def _every_second(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _repeated(x: Tensor) -> Tensor:
    """Stride 0 along the first dimension that has more than one entry; the last one stays dense."""
    for dim in range(x.dim() - 1):
        if x.shape[dim] > 1:
            return x.narrow(dim, 0, 1).contiguous().expand(x.shape)
    return x
