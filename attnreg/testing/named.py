"""Draw the named call tensors of a problem: masks, lengths, tables, descales, weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg import scores, sparsity
from attnreg.problem import Problem
from attnreg.testing.quantised import largest, stored
from attnreg.validate import FLOAT8, FLOATS

__all__ = ["Draw", "named_tensors"]

OPTIONAL = ("seqused_k", "q_descale", "k_descale", "v_descale")


@dataclass
class Draw:
    """One problem's random numbers. q_lens, k_lens: the lengths of packed sequences, empty elsewhere."""

    problem: Problem
    flavour: str
    seed: int
    generator: torch.Generator
    device: torch.device
    q_lens: list[int] = field(default_factory=list)
    k_lens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        p = self.problem
        if p.spec.layout != "thd":
            return
        self.q_lens = self.compose(p.total_q, p.sq)
        if p.spec.page_size is None:
            same = p.square and p.total_q == p.total_k and self.flavour != "empty"
            self.k_lens = list(self.q_lens) if same else self.compose(p.total_k, p.skv)
            if self.flavour != "empty" and not same:
                # The longest queries meet the longest keys, so that a causal row has something to see.
                order = sorted(range(len(self.q_lens)), key=lambda b: self.q_lens[b])
                self.k_lens = [n for _, n in sorted(zip(order, sorted(self.k_lens), strict=True))]

    @property
    def q_rows(self) -> tuple[int, ...]:
        """Leading dimensions of q, heads left out."""
        return (sum(self.q_lens),) if self.problem.spec.layout == "thd" else (self.problem.batch, self.problem.sq)

    @property
    def k_rows(self) -> tuple[int, ...]:
        """Leading dimensions of k and v, heads left out."""
        p = self.problem
        if p.spec.page_size is not None:
            return self.pages, p.spec.page_size
        return (sum(self.k_lens),) if p.spec.layout == "thd" else (p.batch, p.skv)

    @property
    def table_width(self) -> int:
        """Pages of a sequence."""
        return -(-self.problem.skv // (self.problem.spec.page_size or 1))

    @property
    def pages(self) -> int:
        """Pages of the cache: what the problem says, else two more than are used."""
        return self.problem.pages or self.problem.batch * self.table_width + 2

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float32 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform int64 in low .. high, both included."""
        high = max(low, high)
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device)

    def compose(self, total: int, longest: int) -> list[int]:
        """Uneven lengths of the batch that sum to `total`, one of them `longest`; some empty where there is room."""
        parts = self.problem.batch
        if not parts:
            return []
        total = total or max(longest, (parts * longest * 5) // 8)
        total = min(total, parts * longest)
        lens = [min(longest, total)] + [0] * (parts - 1)
        rest = total - lens[0]
        want = self.uniform(parts).tolist()
        for b in range(1, parts):
            left = parts - 1 - b
            least, most = max(0, rest - left * longest), min(longest, rest)
            lens[b] = int(min(max(round(most * want[b]), least), most))
            rest -= lens[b]
        order = torch.randperm(parts, generator=self.generator, device=self.device).tolist()
        return [lens[b] for b in order]


def named_tensors(draw: Draw) -> dict[str, Any]:
    """Every tensor that the spec needs, and those optional ones that the problem names."""
    p = draw.problem
    names = set(p.spec.tensors()) | {t.name for t in p.tensors if t.name in OPTIONAL}
    if getattr(torch, p.dtype) in FLOAT8:
        names |= {"q_descale", "k_descale", "v_descale"}
    out: dict[str, Any] = {}
    for name in sorted(names, key=lambda n: (n not in ("seqused_k", "kv_lengths"), n)):
        out[name] = _typed(draw, name, MAKERS[name](draw, out))
    if p.spec.layout == "thd" and draw.device.type != "cpu":
        # Reading them off cu_seqlens would synchronise; a serving engine passes them.
        out["max_seqlen_q"] = max(draw.q_lens, default=0)
        if p.spec.page_size is None:
            out["max_seqlen_k"] = max(draw.k_lens, default=0)
    if p.spec.dropout_p:
        out["generator"] = torch.Generator(draw.device).manual_seed(draw.seed)
    return out


def _typed(draw: Draw, name: str, value: Tensor) -> Tensor:
    """The value in the dtype that the problem tells, or the default one."""
    info = draw.problem.info(name)
    if info is not None:
        return value.to(getattr(torch, info.dtype))
    if name in ("bias", "score_weight"):
        dtype = getattr(torch, draw.problem.dtype)
        return value.to(dtype if dtype in FLOATS else torch.float32)
    return value


def _dims(draw: Draw, name: str, default: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    """Concrete shape: 1 where the problem (or the default) says that the dimension is broadcast."""
    info = draw.problem.info(name)
    flags = default if info is None else info.dims
    return tuple(1 if flag else size for flag, size in zip(flags, full[len(full) - len(flags) :], strict=True))


def _scores_shape(draw: Draw) -> tuple[int, ...]:
    p = draw.problem
    sq = max(draw.q_lens, default=0) if draw.q_lens else p.sq
    skv = max(draw.k_lens, default=0) if draw.k_lens else draw.table_width * (p.spec.page_size or 1)
    return p.batch, p.q_heads, sq, skv


def _attn_mask(draw: Draw, made: dict[str, Any]) -> Tensor:
    shape = _dims(draw, "attn_mask", (0, 1, 0, 0), _scores_shape(draw))
    out = draw.uniform(*shape) < 0.7
    if draw.flavour == "empty":
        out[..., ::3, :] = False
        return out
    if shape[-1] and len(shape) > 1:
        out[..., 0] |= ~out.any(-1)
    return out


def _bias(draw: Draw, made: dict[str, Any]) -> Tensor:
    shape = _dims(draw, "bias", (1, 0, 0, 0), _scores_shape(draw))
    out = draw.normal(*shape)
    if draw.flavour == "edges":
        kind = draw.uniform(*shape)
        out = torch.where(kind < 0.15, -torch.inf, torch.where(kind > 0.97, 1e4, torch.where(kind > 0.9, -1e4, out)))
        if out.dim() > 1 and out.shape[-2] > 1:
            out[..., 1, :] = -torch.inf
    if draw.flavour == "low":
        out = 4 * out - 100
    if draw.flavour in ("low", "edges") and out.dim() > 1 and out.shape[-2] > 2:
        out[..., 2, :] = _lowest(draw)
    return out


def _lowest(draw: Draw) -> float:
    """What padding masks hold in each key of a row: the lowest number, of float16 half of it, as it adds no more."""
    info = draw.problem.info("bias")
    kind: torch.dtype = getattr(torch, draw.problem.dtype if info is None else info.dtype)
    if kind == torch.float16:
        return torch.finfo(kind).min / 2
    return torch.finfo(kind if kind == torch.bfloat16 else torch.float32).min


def _alibi_slopes(draw: Draw, made: dict[str, Any]) -> Tensor:
    p = draw.problem
    slopes = 2.0 ** (-8.0 * torch.arange(1, p.q_heads + 1, device=draw.device) / p.q_heads)
    shape = _dims(draw, "alibi_slopes", (0,), (p.batch, p.q_heads))
    if len(shape) == 1:
        return slopes
    return (slopes * torch.arange(1, shape[0] + 1, device=draw.device)[:, None]) / shape[0]


def _sinks(draw: Draw, made: dict[str, Any]) -> Tensor:
    out = draw.normal(draw.problem.q_heads)
    return out - 120 if draw.flavour == "low" else out


def _score_weight(draw: Draw, made: dict[str, Any]) -> Tensor:
    p = draw.problem
    if isinstance(p.spec.score, scores.General):
        full = (p.q_heads, p.head_dim, p.head_dim_k)
        shape = _dims(draw, "score_weight", (0, 0, 0), full)
        shape = (shape[0], *full[1:])
        if draw.flavour == "low":
            return (1 + 0.05 * draw.normal(*shape)) / (p.head_dim * p.head_dim_k)
        return draw.normal(*shape) / math.sqrt(p.head_dim * p.head_dim_k)
    shape = (_dims(draw, "score_weight", (0, 0), (p.q_heads, p.head_dim))[0], p.head_dim)
    out = draw.normal(*shape)
    if draw.flavour == "low":
        return -(1 + 0.05 * out) * 135 / p.head_dim
    return 4 * out if draw.flavour == "large" else out


def _prefix_lengths(draw: Draw, made: dict[str, Any]) -> Tensor:
    p = draw.problem
    out = draw.integers(0, p.skv, p.batch)
    if draw.flavour == "edges" and p.batch:
        out[0] = p.skv + 5
        out[-1] = 0
    return out


def _global_mask(draw: Draw, made: dict[str, Any]) -> Tensor:
    p = draw.problem
    return draw.uniform(p.batch, _scores_shape(draw)[3]) < 0.06


def _document_ids(draw: Draw, made: dict[str, Any]) -> Tensor:
    """Runs of one id, ids negative and repeated; every other sequence in no order at all."""
    p = draw.problem
    skv = _scores_shape(draw)[3]
    runs = (draw.uniform(p.batch, skv) < 4 / max(skv, 1)).long().cumsum(1)
    out = runs * 7 % 5 - 2
    if draw.flavour == "edges" and p.batch:
        out[0] = draw.integers(-3, 3, skv)
    return out


def _most_keys(draw: Draw) -> Tensor:
    """Keys of each sequence, int64 [B]."""
    p = draw.problem
    full = draw.k_lens or [_scores_shape(draw)[3]] * p.batch
    return torch.tensor(full, dtype=torch.int64, device=draw.device)


def _kv_lengths(draw: Draw, made: dict[str, Any]) -> Tensor:
    """At least the queries where there is room, so that a causal row sees something; 0 somewhere under "empty"."""
    p = draw.problem
    most = _most_keys(draw)
    if draw.flavour == "unused":  # one key at least is not used, half of them at most
        return (most - 1 - (most * draw.uniform(p.batch) / 2).long()).clamp_min(0)
    least = torch.tensor(draw.q_lens or [p.sq] * p.batch, device=draw.device).minimum(most).clamp_min(1).minimum(most)
    if draw.flavour == "empty":
        least = torch.zeros_like(most)
    out = least + ((most - least + 1) * draw.uniform(p.batch)).long().minimum(most - least)
    if draw.flavour == "empty" and p.batch:
        out[-1] = 0
    return out


def _query_offset(draw: Draw, made: dict[str, Any]) -> Tensor:
    p = draw.problem
    out = draw.integers(0, max(p.skv - p.sq, 0) + 2, p.batch)
    if draw.flavour == "empty":
        out = out - max(p.sq // 2, 1)
    return out


def _block_mask(draw: Draw, made: dict[str, Any]) -> Tensor:
    p = draw.problem
    pattern = p.spec.sparsity
    assert isinstance(pattern, sparsity.Blocks)
    batch, heads, sq, skv = _scores_shape(draw)
    full = (batch, heads, -(-sq // pattern.block_q), -(-skv // pattern.block_kv))
    shape = (*_dims(draw, "block_mask", (1, 0, 0, 0), full)[:2], *full[2:])
    out = draw.uniform(*shape) < 0.5
    if draw.flavour == "empty":
        out[..., ::2, :] = False
        return out
    if shape[-1]:
        # The diagonal stays, so that causal rows see something.
        row = torch.arange(shape[-2], device=draw.device)
        column = ((row * pattern.block_q + skv - sq).clamp_min(0) // pattern.block_kv).clamp_max(shape[-1] - 1)
        out[:, :, row, column] = True
        out[..., 0] |= ~out.any(-1)
    return out


def _cumulative(lens: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lens], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def _seqused_k(draw: Draw, made: dict[str, Any]) -> Tensor:
    return _kv_lengths(draw, made).to(torch.int32)


def _block_table(draw: Draw, made: dict[str, Any]) -> Tensor:
    """Pages in no order; unused entries are -1 or 0. Where the cache is short, sequences share pages."""
    p, width = draw.problem, draw.table_width
    count = p.batch * width
    pages = torch.randperm(draw.pages, generator=draw.generator, device=draw.device)
    table = pages[torch.arange(count, device=draw.device) % max(draw.pages, 1)].reshape(p.batch, width)
    if made.get("seqused_k") is not None:
        live = -(-made["seqused_k"].long() // (p.spec.page_size or 1))
        unused = torch.arange(width, device=draw.device) >= live[:, None]
        table = torch.where(unused, torch.where(draw.uniform(p.batch, width) < 0.5, -1, 0), table)
    return table.to(torch.int32)


def _descale(name: str) -> Callable[[Draw, dict[str, Any]], Tensor]:
    def make(draw: Draw, made: dict[str, Any]) -> Tensor:
        p = draw.problem
        dtype: torch.dtype = getattr(torch, p.dtype if name == "q_descale" else p.kv_dtype)
        unit = 4 / largest(dtype) if stored(dtype) else 1.0
        info = p.info(name)
        if p.spec.dtype.scaling == "tensor":
            shape: tuple[int, ...] = (1,) * len(info.dims) if info is not None else (1,)
        elif p.spec.dtype.scaling == "head" or name == "q_descale":
            shape = _dims(draw, name, (0, 0), (p.batch, p.kv_heads))
        else:
            skv = _scores_shape(draw)[3]
            block = p.spec.page_size or 32
            shape = _dims(draw, name, (0, 0, 0), (p.batch, p.kv_heads, max(-(-skv // block), 1)))
        return unit * (0.5 + draw.uniform(*shape))

    return make


MAKERS: dict[str, Callable[[Draw, dict[str, Any]], Tensor]] = {
    "attn_mask": _attn_mask,
    "bias": _bias,
    "alibi_slopes": _alibi_slopes,
    "sinks": _sinks,
    "score_weight": _score_weight,
    "prefix_lengths": _prefix_lengths,
    "global_mask": _global_mask,
    "document_ids": _document_ids,
    "kv_lengths": _kv_lengths,
    "query_offset": _query_offset,
    "block_mask": _block_mask,
    "cu_seqlens_q": lambda draw, made: _cumulative(draw.q_lens, draw.device),
    "cu_seqlens_k": lambda draw, made: _cumulative(draw.k_lens, draw.device),
    "block_table": _block_table,
    "seqused_k": _seqused_k,
    "q_descale": _descale("q_descale"),
    "k_descale": _descale("k_descale"),
    "v_descale": _descale("v_descale"),
}
