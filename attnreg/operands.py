"""What a call's tensors are: memory that kernels may read, or something that takes another way, or none at all.

One allow-list of types and dispatch keys decides. The hot table asks for both at every hit, so a tensor that only looks
like an earlier one is never taken for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg.errors import DeviceError, DtypeError

__all__ = ["LAZY", "PLAIN", "Kind", "check_device", "dispatch_keys", "is_plain", "kind_of", "settle_all", "settled"]

PLAIN = (Tensor, torch.nn.Parameter)
"""Types that hold data of their own; whatever traces or wraps brings a subclass."""

LAZY = ("Negative", "Conjugate", "ZeroTensor")
"""Dispatch keys of tensors whose memory does not hold the values yet."""

Kind = Callable[[Any], bool]
MOST_KINDS = 1024

_keys: Callable[[Tensor], Any] = torch._C._dispatch_keys
_included: Callable[[], Any] = torch._C._dispatch_tls_local_include_set
_excluded: Callable[[], Any] = torch._C._dispatch_tls_local_exclude_set
_kinds: dict[Any, Kind] = {}


def dispatch_keys(x: Tensor) -> int:
    """The dispatch keys of a tensor as a number: all that tells apart tensors of one type."""
    return _keys(x).raw_repr()  # type: ignore[no-any-return]  # torch has no types here


@functools.lru_cache(maxsize=1024)
def _names(raw: int) -> frozenset[str]:
    text = str(torch._C.DispatchKeySet.from_raw_repr(raw))
    return frozenset(name.strip() for name in text[text.index("(") + 1 : text.rindex(")")].split(",") if name.strip())


@functools.lru_cache(maxsize=1024)
def _keys_are_plain(raw: int) -> bool:
    """Do these keys say dense memory on one device, with or without autograd, and nothing else?"""
    names = _names(raw)
    return any(
        device in names and names <= {device, f"Autograd{device}", f"Autocast{device}", "ADInplaceOrView"}
        for device in ("CPU", "CUDA", "HIP", "XPU", "MPS", "HPU", "XLA", "PrivateUse1")
    )


def is_plain(x: object) -> bool:
    """May a kernel read `x` by its address, shape and strides, and find there what it means?

    False for subclasses, FakeTensors, wrappers of torch.func, functional, meta, nested, masked, sparse and quantised
    tensors, and for a negative or conjugate bit that is not resolved.
    """
    return type(x) in PLAIN and _keys_are_plain(dispatch_keys(x))  # type: ignore[arg-type]  # it is a Tensor


def settled(name: str, x: Tensor) -> Tensor:
    """`x` with lazy bits resolved, and as a Tensor where its subclass changes nothing below `__torch_function__`.

    What has to go through torch's operators, since it holds no memory itself, comes back as it is. Raises DtypeError
    that names the argument for what holds no dense data: nested, masked, sparse and quantised tensors, and wrappers of
    a torch.func transform that has ended.
    """
    if is_plain(x):
        return x
    why = _refusal(x)
    if why:
        raise DtypeError(name, why)
    names = _names(dispatch_keys(x))
    if type(x) not in PLAIN and "Python" not in names:
        x = x.as_subclass(Tensor)
    if "Negative" in names or "Conjugate" in names:
        x = torch.resolve_neg(torch.resolve_conj(x))
    return x.clone() if "ZeroTensor" in names else x


def check_device(name: str, x: Tensor) -> None:
    """Raise DeviceError for a tensor on the meta device, which no kernel can compute with."""
    if x.device.type == "meta" and type(x) in PLAIN:
        raise DeviceError(
            name,
            "expected a tensor that holds data, got one on the meta device; for shapes alone make the call in torch's "
            "FakeTensorMode",
        )


def kind_of(x: Tensor) -> Kind:
    """A test whether another tensor is of the same kind: type, dispatch keys, rank, dtype, device, need of gradients.

    In one step of torch's own, by which torch.compile guards, where this torch has it: 0.1 us. It also fails where the
    thread's dispatch state differs, under autocast for one.
    """
    state = tuple(keys.raw_repr() for keys in (_included(), _excluded()))
    look = _look(x)
    found = _kinds.get((look, state))
    if found is None:
        if len(_kinds) >= MOST_KINDS:
            _kinds.clear()
        found = _kinds[look, state] = _guard(x) or (lambda other: _look(other) == look)
    return found


def _guard(x: Tensor) -> Kind | None:
    free: list[Any] = [[None] * x.dim()]
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards: Any = TensorGuards
        check: Kind = guards(x, dynamic_dims_sizes=free, dynamic_dims_strides=free).check
        return check if check(x) else None
    except (ImportError, TypeError, RuntimeError):
        return None


def _look(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return type(x)
    return type(x), dispatch_keys(x), x.dim(), x.dtype, x.device, x.requires_grad


def settle_all(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The named tensors, each settled; what is no tensor stays."""
    return {name: settled(name, x) if isinstance(x, Tensor) else x for name, x in tensors.items()}


def _refusal(x: Tensor) -> str:
    """Why the tensor cannot be computed with, and what to give instead; empty where it can."""
    kind = type(x).__name__
    if x.is_nested:
        return (
            "expected a dense tensor, got a nested one; give its packed rows, x.values(), under layout='thd' with "
            "cu_seqlens_q and cu_seqlens_k = x.offsets()"
        )
    if _is_masked(x):
        return (
            "expected a dense tensor, got a MaskedTensor; give its get_data(), and its get_mask() as attn_mask under "
            "masks.Dense()"
        )
    if x.layout != torch.strided:
        return f"expected a strided tensor, got layout {x.layout}; to_dense() makes one"
    if x.is_quantized:
        return f"expected a float tensor, got a quantised one ({x.dtype}); dequantize() makes one"
    dead: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_dead_tensor_wrapper", lambda x: False)
    if dead(x):
        return "expected a tensor that is alive, got one of a torch.func transform that has ended"
    odd = {
        name for name in _names(dispatch_keys(x)) - _KNOWN if not name.startswith(("Autograd", "Autocast", "FuncTorch"))
    }
    return f"expected a dense tensor, got {kind} with dispatch keys {', '.join(sorted(odd))}" if odd else ""


_KNOWN = frozenset(
    ("CPU", "CUDA", "HIP", "XPU", "MPS", "HPU", "XLA", "PrivateUse1", "Meta", "ADInplaceOrView", "Python",
     "PythonTLSSnapshot", "Functionalize", *LAZY)
)  # fmt: skip


def _is_masked(x: Tensor) -> bool:
    return any(kind.__name__ == "MaskedTensor" and kind.__module__.startswith("torch.masked") for kind in type(x).mro())
