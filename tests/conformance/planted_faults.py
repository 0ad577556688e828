"""Backends with one planted fault each, around a right one: what the kit must catch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg import Hardware, Problem, SearchSpace
from attnreg.testing.oracle import attend
from attnreg.testing.sequences import put_together

Result = Any
Fault = Callable[[Callable[..., Result], Tensor, Tensor, Tensor, dict[str, Any]], Result]


def prepare_right(problem: Problem) -> Callable[..., Result]:
    """A right backend: the kit's own plain computation in float32 (float64 for float64)."""
    spec = problem.spec

    def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> Result:
        keep = None
        if spec.dropout_p:
            shape = (*q.shape[:3], k.shape[2])
            keep = torch.rand(shape, generator=tensors["generator"]) >= spec.dropout_p
        dtype = q.dtype if q.dtype == torch.float64 else torch.float32
        parts = attend(spec, q, k, v, tensors, dtype=dtype, keep=keep)
        out, lse = put_together(spec.layout, q, [(part.out, part.lse) for part in parts], v.shape[-1])
        out = out.to(problem.out_dtype)
        return (out, lse.float()) if spec.return_lse else out

    run.problem = problem  # type: ignore[attr-defined]  # what it was prepared for, for a fault that bakes it in
    return run


class Planted:
    """A right backend with a fault. `reasons` are what it refuses with, if anything."""

    version = "1"

    def __init__(self, fault: Fault, reasons: list[str] | None = None) -> None:
        self.name = f"planted_{fault.__name__}"
        self.fault = fault
        self.reasons = reasons or []

    def supports(self, problem: Problem, hardware: Hardware) -> list[str]:
        return self.reasons

    def space(self, problem: Problem, hardware: Hardware) -> SearchSpace:
        return SearchSpace()

    def prepare(self, problem: Problem, config: Any) -> Callable[..., Result]:
        right = prepare_right(problem)
        return lambda q, k, v, **tensors: self.fault(right, q, k, v, tensors)


def none(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    return right(q, k, v, **tensors)


def _split(result: Result) -> tuple[Tensor, tuple[Tensor, ...]]:
    return (result[0], result[1:]) if isinstance(result, tuple) else (result, ())


def _join(out: Tensor, rest: tuple[Tensor, ...]) -> Result:
    return (out, *rest) if rest else out


class _ScaledGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.001


def wrong_grad(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """A tenth of a percent too much gradient for k; the forward pass is right."""
    return right(q, _ScaledGrad.apply(k), v, **tensors)


def no_grad(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """The graph is cut at v."""
    return right(q, k, v.detach(), **tensors)


def nan_below_88(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """What exp(lse) in float32 makes of a row whose every logit is below -88."""
    out, rest = _split(right(q, k, v, **tensors))
    if rest:
        lse = rest[0][..., None] if out.shape[:3] == rest[0].shape else rest[0].transpose(-1, -2)[..., None]
        out = torch.where((lse.detach() < -88) & lse.detach().isfinite(), out * float("nan"), out)
    return _join(out, rest)


def wrong_at_half_tile(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Wrong only where the keys fill half of the last 128-wide tile: its last key is lost."""
    out, rest = _split(right(q, k, v, **tensors))
    if k.dim() == 4 and k.shape[2] % 128 == 64:
        out = out * 0.99
    return _join(out, rest)


def wrong_at_one_length(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Right at the prepared size, wrong at others of the bucket: a length baked into the kernel."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out if q.shape[2] == 129 else out + 1e-3, rest)


def changes_inputs(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Scales q in place."""
    result = right(q, k, v, **tensors)
    with torch.no_grad():
        q.mul_(0.5)
    return result


def touches_inputs(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Writes to v and puts it back."""
    result = right(q, k, v, **tensors)
    with torch.no_grad():
        v.mul_(2.0)
        v.mul_(0.5)
    return result


class _Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if x.shape[2] > 1:
            out[:, :, :-1] = x[:, :, :-1]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def unwritten(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """The last row of the output is memory that nobody wrote."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(_Unwritten.apply(out), rest)


def unwritten_workspace(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """One entry of a workspace of native code, of a size that no result has, is added before anybody wrote it."""
    out, rest = _split(right(q, k, v, **tensors))
    size = 8 * 1013 * 4
    buffer = ctypes.CDLL(None).malloc
    buffer.restype, buffer.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    address = buffer(size)
    read = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.float32)[1013].clone()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return _join(out + (read * 1e-30).to(out.dtype), rest)


def wrong_dtype(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """float32 whatever q is."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out.float(), rest)


def wrong_shape(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Heads and rows swapped."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out.transpose(1, 2), rest)


def forgets_lse(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    return _split(right(q, k, v, **tensors))[0]


def log2_lse(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """lse in the wrong base."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out, tuple(x * 1.4426950408889634 for x in rest))


def leaves_a_trace(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Masks by adding -1e9: a huge key that nobody may attend still shows."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out + 0 * (k.detach().float() * 1e38).sum().to(out.dtype), rest)


def reads_behind_lengths(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Multiplies every value by its weight, which is 0 behind the lengths: finite values leave no trace, NaN does."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out + (0 * v.detach()[..., :1].float() / 1e30).sum().to(out.dtype), rest)


def empty_rows_average(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """A row that attends nothing gives the mean of v, as softmax of equal scores does."""
    out, rest = _split(right(q, k, v, **tensors))
    empty = (out.detach() == 0).all(-1, keepdim=True)
    return _join(torch.where(empty, torch.ones_like(out) * v.detach().float().mean().to(out.dtype), out), rest)


def raises(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    raise RuntimeError("no kernel image is available")


def returns_input(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Right for one key, and a view of v: whoever writes to the output writes to the input."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(v.expand_as(out) if k.shape[2] == 1 and q.shape[1] == k.shape[1] else out, rest)


_turn = iter(range(1 << 30))


def unrepeatable(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Another last bit at every call, as atomics give."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out * (1 + (next(_turn) % 2) * 2**-22), rest)


def one_batch(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """The batch that it was prepared for, which is the bucket's, baked in."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out if q.shape[0] == right.problem.batch else out * 0.5, rest)


class _DenseGrad(torch.autograd.Function):
    """Reads the gradient's memory in order, whatever its strides are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        memory = torch.empty(0, dtype=grad.dtype).set_(grad.untyped_storage())[: grad.numel()]
        return torch.cat([memory, memory.new_zeros(grad.numel() - len(memory))]).view(grad.shape)


def dense_grad(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Takes the output's gradient for dense."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(_DenseGrad.apply(out), rest)


def dense_grad_of_lse(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Takes the gradient of lse for dense."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(out, tuple(_DenseGrad.apply(x) for x in rest))


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class _NoRepeats(_Copies):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if grad.stride()[-1] else torch.zeros_like(grad)


def no_sums(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Right under gradients of any strides but 0, which out.sum() gives."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(_NoRepeats.apply(out), rest)


class _Scales(_Copies):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        kept = grad.clone()
        if 0 not in grad.stride():
            grad.mul_(1.5)
        return kept


def changes_upstream(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Uses the gradient that it is given as scratch, which a residual connection shares."""
    out, rest = _split(right(q, k, v, **tensors))
    return _join(_Scales.apply(out), rest)


_buffers: dict[Any, Tensor] = {}


def one_buffer(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Returns the same memory at each call: the next one overwrites what the last one gave."""
    out, rest = _split(right(q, k, v, **tensors))
    buffer = _buffers.setdefault((out.shape, out.dtype), torch.empty_like(out))
    return _join(buffer.copy_(out.detach()), rest)


_seen: dict[Any, Tensor] = {}


def remembers_keys(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Keeps a copy of k by its address: other keys at the same place are not seen."""
    old = _seen.setdefault((k.data_ptr(), k.shape, k.dtype), k.detach().clone())
    return right(q, k + (old - k).detach(), v, **tensors)


class Kinds(Planted):
    """A backend that is right with plain tensors, and does `fault` with others. Its gradients are torch's own."""

    def __init__(self, fault: Callable[[Callable[..., Result], bool, Tensor, Tensor, Tensor], Result]) -> None:
        super().__init__(none)
        self.name = f"planted_{fault.__name__}"
        self.kind = fault

    def prepare(self, problem: Problem, config: Any) -> Callable[..., Result]:
        right = prepare_right(problem)
        return lambda q, k, v, **tensors: self.kind(lambda *x: right(*x, **tensors), problem.traced, q, k, v)


def reads_past_operators(right: Any, traced: bool, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Makes plain results of whatever it is given."""
    return torch.zeros(q.shape, dtype=q.dtype) if traced else right(q, k, v)


def forgets_fakes(right: Any, traced: bool, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Right of wrappers, but of FakeTensors with another shape."""
    return q[:, :1].clone() if traced and type(q).__name__ == "FakeTensor" else right(q, k, v)


def reads_bits(right: Any, traced: bool, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Its backward pass reads the upstream gradient as it lies in memory."""
    return _Raw.apply(right(q, k, v))  # type: ignore[no-untyped-call]  # torch's own


class _Raw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch._neg_view(grad).clone() if grad.is_neg() else grad


class _TimesKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, times: Tensor) -> Tensor:
        ctx.save_for_backward(times)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0].to(grad.dtype), None


def rounded_lse(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """The backward makes weights of lse in float32: where it holds the lowest number alone, each of them is 1."""
    out, rest = _split(right(q, k, v, **tensors))
    far = tensors["bias"].detach().amax(-1, keepdim=True) < -1e30
    return _join(_TimesKeys.apply(out, torch.where(far, float(k.shape[2]), 1.0)), rest)


class _FirstOnly(torch.autograd.Function):
    """x, whose derivative is taken for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


def drops_derivatives(right: Any, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> Result:
    """Gives no tangent of q and no gradient of its gradient, and says that it has both."""
    return right(_FirstOnly.apply(q), k, v, **tensors)
