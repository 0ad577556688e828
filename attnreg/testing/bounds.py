"""How far from the oracle a candidate may be: twice the plain computation's error and a floor, gradients thrice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnreg.problem import Problem
from attnreg.testing.inputs import Inputs
from attnreg.testing.oracle import Part, attend
from attnreg.testing.quantised import Rounding, stored
from attnreg.testing.second import other_values, transposed
from attnreg.testing.sequences import pick_rows

__all__ = ["Limit", "Truth", "find_truth", "find_truths"]


HALF = (torch.float16, torch.bfloat16)
Solver = tuple[Inputs, Mapping[int, Tensor], Tensor, Tensor | None, Tensor | None, torch.dtype, Rounding | None]


@dataclass(frozen=True)
class Limit:
    """The most that the largest error and (float8 and int8 only) the mean error may be."""

    most: float
    mean: float | None = None


@dataclass(frozen=True)
class Truth:
    """The oracle's answer at the sampled rows, the weights of the backward pass, and the bounds.

    rows: sequence -> query rows. grads: by leaf, in float64. limits: by "out", "lse" and leaf. summed: the weights are
    1 everywhere. changed: which of q, k and v hold other values. after: the truth of the run that follows, with such.
    """

    rows: Mapping[int, Tensor]
    parts: list[Part]
    grads: dict[str, Tensor]
    grad_out: Tensor
    grad_lse: Tensor | None
    limits: dict[str, Limit] = field(default_factory=dict)
    summed: bool = False
    changed: tuple[str, ...] = ()
    after: Truth | None = None

    def weights(self, again: bool = False) -> tuple[Tensor, Tensor | None]:
        """The weights for one backward pass. again: not dense, but transposed in memory.

        Those of a sum have stride 0 in every dimension, as `out.sum().backward()` gives them.
        """
        lay_out = _repeated if self.summed else transposed if again else torch.clone
        return lay_out(self.grad_out), None if self.grad_lse is None else lay_out(self.grad_lse)


def find_truths(
    inputs: Inputs, rows: Mapping[int, Tensor], keep: Tensor | None = None, *, summed: bool = False
) -> Truth:
    """`find_truth` of the inputs, and of what a second run finds at their addresses."""
    # Which weights dropout kept was read off where it could be seen under these queries and keys.
    changed = ("q", "k", "v") if keep is None else ("v",)
    with other_values(inputs, changed):
        after = replace(find_truth(inputs, rows, keep, summed=summed), changed=changed)
    return replace(find_truth(inputs, rows, keep, summed=summed), after=after)


def find_truth(
    inputs: Inputs, rows: Mapping[int, Tensor], keep: Tensor | None = None, *, summed: bool = False
) -> Truth:
    """Compute oracle and plain computation at `rows`; the backward weights are 0 at every other row.

    summed: weights of 1; `rows` must be all rows then.
    """
    p = inputs.problem
    grad_out, grad_lse = _weights(inputs, rows, summed)
    exact: Solver = (inputs, rows, grad_out, grad_lse, keep, torch.float64, None)
    shaken: list[Part] = []
    shaken_grads: dict[str, Tensor] = {}
    if inputs.leaves and p.out_dtype not in HALF:  # there, the plain computation's own rounding is far larger
        shaken, shaken_grads, _ = _solve(*exact, tremble=float(torch.finfo(p.out_dtype).eps))
    parts, grads, floors = _solve(*exact, noise=True, shaken=shaken)
    floors |= {name: floors[name] + 3 * _largest(grad) for name, grad in shaken_grads.items()}
    dtype: torch.dtype = getattr(torch, p.dtype)
    rounding = rounding_of(p)
    work = torch.float32 if rounding is not None else dtype
    plain, plain_grads, _ = _solve(inputs, rows, grad_out, grad_lse, keep, work, rounding)
    limits = _limits(p, parts, plain, rounding is not None, _amplitude(inputs, parts, rows, keep))
    for name, grad in grads.items():
        plain_grad = plain_grads[name].to(inputs.leaves[name].dtype).double()
        limits[name] = _grad_limit(p, grad, plain_grad, floors[name], rounding is not None)
    return Truth(rows, parts, grads, grad_out, grad_lse, limits, summed)


def _amplitude(inputs: Inputs, parts: list[Part], rows: Mapping[int, Tensor], keep: Tensor | None) -> float:
    """What the rounding of `out` is relative to: in float32 the sum of the sizes of its terms, weight * abs(v)."""
    p = inputs.problem
    if p.out_dtype not in HALF:
        q, k, v = inputs.q.detach(), inputs.k.detach(), inputs.v.detach().double().abs()
        with torch.no_grad():
            parts = attend(p.spec, q, k, v, inputs.tensors, rows=rows, keep=keep)
    return _largest(_join([part.out for part in parts]))


def rounding_of(p: Problem) -> Rounding | None:
    """The quantised reference that bounds the problem; None where the plain bound of its dtype holds."""
    if stored(getattr(torch, p.dtype)):
        return Rounding(getattr(torch, p.dtype))
    return None if p.spec.dtype.compute == "same" else Rounding(getattr(torch, p.spec.dtype.compute))


def _repeated(x: Tensor) -> Tensor:
    return x.new_ones(()).expand(x.shape)


def _weights(inputs: Inputs, rows: Mapping[int, Tensor], summed: bool) -> tuple[Tensor, Tensor | None]:
    """Random weights of out and lse in the backward pass, 0 outside the sampled rows; or 1, of a sum."""
    p, spec, q = inputs.problem, inputs.problem.spec, inputs.q
    generator = torch.Generator(q.device).manual_seed(inputs.seed + 77)
    shape = (*q.shape[:-1], p.head_dim_v)
    if summed:
        ones = _repeated(torch.empty(shape, dtype=p.out_dtype, device=q.device))
        row = ones[..., 0] if spec.layout == "bhsd" else ones[..., 0].transpose(-1, -2)
        return ones, _repeated(row.float()) if spec.return_lse else None
    full = torch.randn(shape, generator=generator, device=q.device)
    weight = torch.zeros_like(full)
    heads_last = full.transpose(1, 2) if spec.layout == "bhsd" else full
    target = weight.transpose(1, 2) if spec.layout == "bhsd" else weight
    starts = inputs.tensors["cu_seqlens_q"].tolist() if spec.layout == "thd" else None
    for b, picked in rows.items():
        at = picked.to(q.device)
        if starts is None:
            target[b, at] = heads_last[b, at]
        else:
            target[starts[b] + at] = heads_last[starts[b] + at]
    if not spec.return_lse:
        return weight.to(p.out_dtype), None
    row = weight.sum(-1) / max(p.head_dim_v, 1) ** 0.5
    grad_lse = row if spec.layout == "bhsd" else row.transpose(-1, -2)
    return weight.to(p.out_dtype), grad_lse.float().contiguous()


def _solve(
    inputs: Inputs,
    rows: Mapping[int, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    keep: Tensor | None,
    dtype: torch.dtype,
    rounding: Rounding | None,
    noise: bool = False,
    tremble: float = 0.0,
    shaken: list[Part] | None = None,
) -> tuple[list[Part], dict[str, Tensor], dict[str, float]]:
    """Parts and gradients in `dtype`, and what rounding of `out` alone may do to each gradient.

    shaken: the parts under logits that are off by their rounding, for that.
    """
    p, spec = inputs.problem, inputs.problem.spec
    wide = torch.float64 if dtype == torch.float64 else None
    tensors = dict(inputs.tensors)
    leaves = {}
    for name, x in inputs.leaves.items():
        # A leaf in the working dtype, so that its gradient is not rounded before it is compared.
        leaves[name] = x.detach().to(wide or x.dtype).requires_grad_()
        if name in tensors:
            tensors[name] = leaves[name]
    q, k, v = (leaves.get(n, x.detach()) for n, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)))
    with torch.set_grad_enabled(bool(leaves)):
        parts = attend(spec, q, k, v, tensors, dtype=dtype, rounding=rounding, rows=rows, keep=keep, tremble=tremble)
    grads: dict[str, Tensor] = {}
    floors: dict[str, float] = {}
    if leaves:
        outputs = [part.out for part in parts] + ([part.lse for part in parts] if grad_lse is not None else [])
        weights = [pick_rows(spec.layout, grad_out, part.shape, part.rows).to(part.out.dtype) for part in parts]
        if grad_lse is not None:
            weights += [lse_rows(spec.layout, grad_lse, part).to(part.lse.dtype) for part in parts]
        grads = _backward(outputs, weights, leaves, retain=noise)
        if noise:
            floors = _noise(p, parts, weights[: len(parts)], leaves, shaken or parts)
    detached = [Part(x.shape, x.rows, x.out.detach(), x.lse.detach(), x.empty) for x in parts]
    return detached, grads, floors


def _backward(
    outputs: list[Tensor], weights: list[Tensor], leaves: Mapping[str, Tensor], retain: bool
) -> dict[str, Tensor]:
    live = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not live:
        return {name: torch.zeros_like(x, dtype=torch.float64) for name, x in leaves.items()}
    given = torch.autograd.grad(
        [o for o, _ in live], list(leaves.values()), [w for _, w in live], allow_unused=True, retain_graph=retain
    )
    return {
        name: torch.zeros_like(x) if grad is None else grad.detach()
        for (name, x), grad in zip(leaves.items(), given, strict=True)
    }


def _noise(
    p: Problem, parts: list[Part], grad_out: list[Tensor], leaves: Mapping[str, Tensor], shaken: list[Part]
) -> dict[str, float]:
    """What an `out` rounded to its dtype, or of logits that were rounded in another order, does to each gradient.

    A flash backward pass reads sum(grad_out * out) off the rounded output. An error n of that sum changes the
    gradients exactly as a weight n on lse would; where one key takes a whole row, their true value is 0 and
    nothing but this error is left. Forward and backward may sum a logit in different orders, so that the weights of the
    one are not those of the other: `shaken`, three times as for the gradients themselves.
    """
    eps, units = _eps(p)
    unit = eps * max(units / 2, 1)  # two float32 sums of head_dim products in different orders differ by several eps
    weights = []
    for part, other, weight in zip(parts, shaken, grad_out, strict=True):
        out = part.out.detach()
        size = (weight * out).square().sum(-1).sqrt() * unit
        # Half of three, as the gradients are doubled below.
        size = torch.maximum(size, 1.5 * (weight * (other.out.detach() - out)).sum(-1).abs().nan_to_num())
        sign = 1 - 2 * (torch.arange(size.numel(), device=size.device).reshape(size.shape) % 3 % 2)
        weights.append(torch.where(part.lse == -torch.inf, torch.zeros_like(size), size * sign))
    given = _backward([part.lse for part in parts], weights, leaves, retain=False)
    floors = {name: 2 * _largest(grad) for name, grad in given.items()}
    if "sinks" in floors:
        # The sink's weight may be had as 1 less the others, whose error is no part of its own size.
        single = float(torch.finfo(torch.promote_types(p.out_dtype, torch.float32)).eps) / unit
        total = [weight.square().sum(-1) for weight in weights if weight.numel()]
        floors["sinks"] += single * _largest(torch.stack(total).sum(0).sqrt()) if total else 0.0
    return floors


def lse_rows(layout: str, lse: Tensor, part: Part) -> Tensor:
    """Some rows of one sequence of an lse (or its weight): [Hq, n]."""
    one = part.shape
    mine = lse[:, one.q_start : one.q_start + one.sq] if layout == "thd" else lse[one.b]
    return mine[:, part.rows]


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _eps(p: Problem) -> tuple[float, float]:
    """(machine epsilon, how many of it the floor grants): sums in another order differ by more than one in float32."""
    dtype = p.out_dtype
    return float(torch.finfo(dtype).eps), 0.5 if dtype in HALF else 8.0


def _smallest(p: Problem) -> float:
    """Below this a dtype keeps no relative precision: float32 kernels flush such numbers to 0."""
    info = torch.finfo(p.out_dtype)
    return float(info.smallest_normal) * (1e-3 if p.out_dtype == torch.float16 else 1e3)


def _steepness(p: Problem, parts: list[Part]) -> float:
    """How much a relative error of a logit counts: logits of size 100 make an error of 100 eps in every weight."""
    if p.out_dtype in HALF:
        return 0.0
    finite = [part.lse[part.lse.isfinite()] for part in parts]
    return max((_largest(x) for x in finite), default=0.0)


def _limits(p: Problem, parts: list[Part], plain: list[Part], quantised: bool, amplitude: float) -> dict[str, Limit]:
    wanted = _join([part.out for part in parts])
    errors = (_join([part.out.to(p.out_dtype).double() for part in plain]) - wanted).abs()
    worst, mean = _largest(errors), float(errors.mean()) if errors.numel() else 0.0
    eps, units = _eps(p)
    if quantised:
        limits = {"out": Limit(4 * worst + 1e-5, 3 * mean + 1e-7 * amplitude)}
    else:
        limits = {"out": Limit(2 * worst + eps * amplitude * (units + _steepness(p, parts)) + _smallest(p))}
    lse, lse_plain = _join([part.lse for part in parts]), _join([part.lse for part in plain]).double()
    finite = lse.isfinite() & lse_plain.isfinite()
    worst = _largest((lse - lse_plain)[finite])
    floor = 8 * float(torch.finfo(torch.float32).eps) * max(1.0, _largest(lse[finite]))
    limits["lse"] = Limit((4 if quantised else 2) * worst + floor)
    return limits


def _grad_limit(p: Problem, grad: Tensor, plain: Tensor, noise: float, quantised: bool) -> Limit:
    worst = _largest(plain - grad)
    amplitude, (eps, units) = _largest(grad), _eps(p)
    floor = eps * amplitude * 2 * units + noise + _smallest(p)
    return Limit((4 if quantised else 3) * worst + floor + (1e-5 if quantised else 0.0))


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
