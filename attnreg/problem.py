"""Problem: everything a choice of backend may depend on, as frozen data: spec, sizes, dtypes, strides, gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attnreg.blocks.cost import LivePairs, live_pairs
from attnreg.errors import RecordError
from attnreg.operands import needs_grad
from attnreg.spec import AttentionSpec, HeadGrouping
from attnreg.validate import FLOAT8, Sizes

__all__ = ["Problem", "TensorInfo", "bucket_size", "stride_class"]

SIZES = ("batch", "sq", "skv", "total_q", "total_k", "pages")
DIFFERENTIABLE = ("bias", "sinks", "score_weight")
"""Named tensors whose gradient a backend is expected to have: what the conformance kit asks of each."""
GRADS = (*DIFFERENTIABLE, "alibi_slopes")
"""All named tensors that a result depends on smoothly: those that a problem's `grads` may name."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype of a named call tensor, and which of its dimensions are broadcast: 1 where the size is 1, else 0."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One attention problem, as a backend and the tuner see it.

    Sizes are ints; sq and skv are bounds on the longest sequence under layout thd, total_q and total_k its
    packed rows, pages the pages of a paged cache (0 elsewhere). Dtypes are torch's names without the prefix.
    strides: one class each for q, k, v (see `stride_class`). grads: the names that need a gradient.
    square: sq == skv. traced: recorded (torch.compile, torch.export, make_fx, a dispatch mode), inside a torch.func
    transform, or made with tensors that hold no memory; sizes may then be symbolic at run time, so `run` serves every
    size and reads no value. device: "cpu", or "cuda" (HIP devices are "cuda" to torch).
    tangents: the names that carry a forward-mode tangent. order: how often the result is differentiated, as far as it
    is known when the call is made: 2 or more inside nested torch.func transforms.

    A backend is asked about the bucket, whose sizes are rounded up: read `square`, not sq == skv.
    """

    spec: AttentionSpec
    batch: int
    q_heads: int
    kv_heads: int
    sq: int
    skv: int
    head_dim: int
    head_dim_k: int
    head_dim_v: int
    total_q: int = 0
    total_k: int = 0
    pages: int = 0
    dtype: str = "float32"
    kv_dtype: str = "float32"
    device: str = "cpu"
    strides: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    tensors: tuple[TensorInfo, ...] = ()
    grads: frozenset[str] = frozenset()
    square: bool = False
    traced: bool = False
    tangents: frozenset[str] = frozenset()
    order: int = 1

    @staticmethod
    def of(
        spec: AttentionSpec,
        sizes: Sizes,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Mapping[str, Any],
        *,
        traced: bool = False,
        hint: Callable[[Any], int] | None = None,
        tangents: frozenset[str] = frozenset(),
        order: int = 1,
    ) -> Problem:
        """The problem of a call whose sizes `validate.check` returned.

        hint: turns a symbolic size into a number without a guard, under tracing. tangents, order: see Problem.
        """
        named = {name: x for name, x in sorted(tensors.items()) if isinstance(x, Tensor)}
        grads: set[str] = set()
        if torch.is_grad_enabled():
            grads = {n for n, x in (("q", q), ("k", k), ("v", v)) if needs_grad(x)}
            grads |= {n for n in GRADS if n in named and needs_grad(named[n])}
        return Problem(
            spec=spec,
            **{f.name: getattr(sizes, f.name) for f in fields(Sizes)},
            dtype=_name(q.dtype),
            kv_dtype=_name(k.dtype),
            device=q.device.type,
            strides=(stride_class(q, hint), stride_class(k, hint), stride_class(v, hint)),
            tensors=tuple(
                TensorInfo(n, _name(x.dtype), tuple(1 if d == 1 else 0 for d in _ints(x.shape, hint)))
                for n, x in named.items()
            ),
            grads=frozenset(grads),
            square=sizes.sq == sizes.skv,
            traced=traced,
            tangents=tangents,
            order=order,
        )

    @property
    def heads(self) -> HeadGrouping:
        """The head grouping, read off the tensors."""
        return HeadGrouping(q=self.q_heads, kv=self.kv_heads)

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def scale(self) -> float:
        """What the raw score is multiplied by."""
        return self.spec.score.factor(self.head_dim)

    @property
    def needs_grad(self) -> bool:
        """Does any input need a gradient?"""
        return bool(self.grads)

    @property
    def out_dtype(self) -> torch.dtype:
        """q's dtype; bfloat16 where q is float8."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.bfloat16 if dtype in FLOAT8 else dtype

    def info(self, name: str) -> TensorInfo | None:
        """What is known of a named call tensor; None where the call has none of that name."""
        return next((t for t in self.tensors if t.name == name), None)

    @property
    def live_pairs(self) -> LivePairs:
        """Pairs that attend, of one head and one sequence of sq queries on skv keys; see `blocks.live_pairs`.

        `query_offset` is taken as bottom-right, and tensors that mask pairs as masking none: upper bounds.
        """
        spec = self.spec
        offset = 0 if spec.align == "top_left" else None
        return live_pairs(spec.mask, spec.sparsity, self.sq, self.skv, offset=offset, packed=spec.layout == "thd")

    @property
    def density(self) -> float:
        """Live pairs of all pairs, within 0 .. 1; an upper bound where call tensors decide."""
        return self.live_pairs.count / max(self.sq * self.skv, 1)

    @property
    def sequences(self) -> float:
        """Sequences of sq queries that the work amounts to: the batch; under thd what the packed rows fill."""
        if self.spec.layout != "thd" or not self.sq:
            return float(self.batch)
        return min(float(self.batch), self.total_q / self.sq)

    @property
    def flops(self) -> float:
        """Floating-point operations over live pairs: the forward's, and with a gradient 2.5 times that in addition.

        Two for each multiply-add of both products; the additive score costs 4 a channel (add, tanh, multiply, add).
        An upper bound where call tensors decide which pairs live.
        """
        kind = self.spec.score.kind
        a_pair = (4 if kind == "additive" else 2) * self.head_dim_k + 2 * self.head_dim_v
        forward = self.sequences * self.q_heads * self.live_pairs.count * a_pair
        if kind == "general":
            forward += self.sequences * self.q_heads * self.sq * 2 * self.head_dim * self.head_dim_k
        return forward * 3.5 if self.needs_grad else forward

    @property
    def bytes(self) -> float:
        """Bytes read and written if each tensor is touched once: the forward's, and with a gradient the backward's.

        Forward: q, out, lse, bias, attn_mask, and the k and v that some query attends. Backward: those again, and
        the gradient of each of q, k, v and out.
        """
        item, kv_item = _itemsize(self.dtype), _itemsize(self.kv_dtype)
        rows = self.sequences * self.q_heads * self.sq
        keys = self.sequences * self.kv_heads * self.live_pairs.keys
        q, out = rows * self.head_dim * item, rows * self.head_dim_v * self.out_dtype.itemsize
        kv = keys * (self.head_dim_k + self.head_dim_v) * kv_item
        lse = rows * 4 if self.needs_grad or self.spec.return_lse else 0
        tables = sum(self._table(name) for name in ("bias", "attn_mask"))
        forward = q + kv + out + lse + tables
        return 2 * forward + q + kv + out if self.needs_grad else forward

    def _table(self, name: str) -> int:
        """Bytes of a tensor that broadcasts to [batch, q_heads, sq, skv]."""
        info = self.info(name)
        if info is None:
            return 0
        sizes = (self.batch, self.q_heads, self.sq, self.skv)[4 - len(info.dims) :]
        return math.prod(1 if one else n for n, one in zip(sizes, info.dims, strict=True)) * _itemsize(info.dtype)

    def bucket(self) -> Problem:
        """The problem with its sizes rounded up to powers of two; 1 stays 1, and sq == skv stays equal.

        All calls of one bucket share a decision and a prepared callable.
        """
        sizes: dict[str, Any] = {name: bucket_size(getattr(self, name)) for name in SIZES}
        return replace(self, **sizes)

    def to_json(self) -> dict[str, Any]:
        """Readable plain data; raises SpecError for a custom mask, which has none."""
        data: dict[str, Any] = {"spec": self.spec.model_dump(mode="json", exclude_defaults=True)}
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                data[field.name] = sorted(value) if isinstance(value, frozenset) else value
        data["strides"] = list(self.strides)
        data["tensors"] = {t.name: [t.dtype, list(t.dims)] for t in self.tensors}
        return data

    @staticmethod
    def from_json(data: object) -> Problem:
        """The problem that `to_json` described. Raises RecordError naming what is wrong."""
        if not isinstance(data, Mapping) or not isinstance(data.get("spec"), Mapping):
            raise RecordError(f"problem: expected an object with a 'spec', got {data!r}")
        known = {field.name: field for field in fields(Problem)}
        extra = set(data) - set(known)
        if extra:
            raise RecordError(f"problem: unknown fields {sorted(extra)}; known: {sorted(known)}")
        values: dict[str, Any] = dict(data)
        try:
            values["spec"] = AttentionSpec.model_validate(dict(data["spec"]))
            values["strides"] = tuple(data.get("strides", ("contiguous",) * 3))
            values["grads"] = frozenset(data.get("grads", ()))
            values["tangents"] = frozenset(data.get("tangents", ()))
            named = data.get("tensors", {})
            values["tensors"] = tuple(TensorInfo(n, str(t[0]), tuple(t[1])) for n, t in sorted(named.items()))
            problem = Problem(**values)
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise RecordError(f"problem: {error}") from error
        problem._check_types()
        return problem

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise RecordError(f"problem: {field.name}: expected an integer >= 0, got {value!r}")
            if field.name in ("dtype", "kv_dtype") and not isinstance(getattr(torch, str(value), None), torch.dtype):
                raise RecordError(f"problem: {field.name}: expected the name of a torch dtype, got {value!r}")

    def key(self) -> str:
        """Canonical text of the problem: equal problems have equal keys, in every process."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        shape = f"B{self.batch} H{self.q_heads}/{self.kv_heads} Sq{self.sq} Skv{self.skv} D{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            shape += f"/{self.head_dim_v}"
        kv = "" if self.kv_dtype == self.dtype else f" kv {self.kv_dtype}"
        grad = f" grad {','.join(sorted(self.grads))}" if self.grads else ""
        grad += f" order {self.order}" if self.order > 1 else ""
        grad += f" tangent {','.join(sorted(self.tangents))}" if self.tangents else ""
        return f"{shape} {self.dtype}{kv} {self.device}{grad} {self.spec!r}"


def bucket_size(n: int) -> int:
    """The power of two at or above n; 0 and 1 stay."""
    return n if n <= 1 else 1 << (n - 1).bit_length()


def _itemsize(name: str) -> int:
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize


def stride_class(x: Tensor, hint: Callable[[Any], int] | None = None) -> str:
    """contiguous; rows (last dimension dense, others any); expanded (a stride 0 over a size > 1); or strided."""
    if hint is None and x.is_contiguous():
        return "contiguous"
    dims = [(n, st) for n, st in zip(_ints(x.shape, hint), _ints(x.stride(), hint), strict=True) if n != 1]
    if any(st == 0 for _, st in dims):
        return "expanded"
    if hint is not None and _is_dense(dims):
        return "contiguous"
    return "rows" if not dims or x.shape[-1] == 1 or dims[-1][1] == 1 else "strided"


def _is_dense(dims: list[tuple[int, int]]) -> bool:
    step = 1
    for n, st in reversed(dims):
        if st != step:
            return False
        step *= n
    return True


def _ints(values: Iterable[Any], hint: Callable[[Any], int] | None) -> tuple[int, ...]:
    return tuple(values) if hint is None else tuple(hint(value) for value in values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
