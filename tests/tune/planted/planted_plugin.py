"""A third-party plugin whose backends are each broken in one way, and one that is right and slow.

All are fast enough to win if anybody timed them without looking. The environment's PLANTED names those to offer; all
unless it is set.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import attnreg

HELD: list[torch.Tensor] = []
SEEN: dict[Any, torch.Tensor] = {}
CALLS = [0]


def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def cheap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v + 0 * (q + k)


class NoGradient(torch.autograd.Function):
    """The right output, and gradients that are 0."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return right(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad * 0, grad * 0, grad * 0


class DenseGradient(torch.autograd.Function):
    """The right output, and gradients that take the output's for dense."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return right(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        memory = torch.empty(0).set_(grad.untyped_storage())[: grad.numel()]
        memory = torch.cat([memory, torch.zeros(grad.numel() - len(memory))])
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            return torch.autograd.grad(right(*leaves), leaves, memory.view(grad.shape))


def remembers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    old = SEEN.setdefault((k.data_ptr(), k.shape), k.detach().clone())
    return right(q, k + (old - k).detach(), v)


def one_buffer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = right(q, k, v).detach()
    return SEEN.setdefault(out.shape, torch.empty_like(out)).copy_(out)


def one_batch(batch: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return right(q, k, v) * (1.0 if q.shape[0] == batch else 0.5)


def low_nan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q.detach() @ k.detach().mT * q.shape[-1] ** -0.5
    scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return torch.where(lse < -88, torch.nan, right(q, k, v))


def wrong_at_64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = right(q, k, v)
    return out * torch.linspace(1, 1.1, out.shape[-2])[:, None] if k.shape[-2] % 128 == 64 else out


def crash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ctypes.string_at(0)
    return right(q, k, v)


def late_crash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    CALLS[0] += 1
    return crash(q, k, v) if CALLS[0] > 60 else right(q, k, v)


def leave(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    os._exit(3)


def hang(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    while True:
        time.sleep(1)


def hog(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    while True:
        HELD.append(torch.ones(1 << 24))


def leak(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = right(q, k, v)
    HELD.append(out.detach().clone())
    return out


def mutate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = right(q, k, v)
    k.data.mul_(0.5)  # past autograd's own watch over in-place changes
    return out


def unwritten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = right(q, k, v)
    tail = torch.empty_like(out[..., -1:, :])
    return torch.cat([out[..., :-1, :], tail + 0 * out[..., -1:, :]], -2)


def raising(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no luck today")


def chatty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    print('{"done": null}', flush=True)
    os.write(1, b'{"refused": "not me"}\n')
    return right(q, k, v)


def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        out = right(q, k, v)
    return out


class Planted:
    version = "1"

    def __init__(self, name: str, run: Callable[..., torch.Tensor]) -> None:
        self.name = name
        self.run = run

    def supports(self, problem: attnreg.Problem, hardware: attnreg.Hardware) -> list[str]:
        if self.name == "planted_unsure":
            raise ValueError("cannot make up its mind")
        plain = problem.spec == attnreg.AttentionSpec(mask=attnreg.masks.Causal()) and problem.square
        return [] if plain else ["only plain causal attention"]

    def space(self, problem: attnreg.Problem, hardware: attnreg.Hardware) -> attnreg.SearchSpace:
        return attnreg.SearchSpace()

    def prepare(self, problem: attnreg.Problem, config: Any) -> Callable[..., torch.Tensor]:
        return functools.partial(one_batch, problem.batch) if self.run is one_batch else self.run


PLANTED = {
    "planted_wrong": cheap,
    "planted_no_gradient": NoGradient.apply,
    "planted_dense_gradient": DenseGradient.apply,
    "planted_remembers": remembers,
    "planted_one_buffer": one_buffer,
    "planted_one_batch": one_batch,
    "planted_low_nan": low_nan,
    "planted_wrong_at_64": wrong_at_64,
    "planted_crash": crash,
    "planted_late_crash": late_crash,
    "planted_leave": leave,
    "planted_hang": hang,
    "planted_hog": hog,
    "planted_leak": leak,
    "planted_mutate": mutate,
    "planted_unwritten": unwritten,
    "planted_raising": raising,
    "planted_unsure": right,
    "planted_chatty": chatty,
    "planted_right_but_slow": slow,
}


@attnreg.hookimpl
def attnreg_backends() -> list[Planted]:
    wanted = os.environ.get("PLANTED", "").split(",")
    return [Planted(name, run) for name, run in PLANTED.items() if wanted == [""] or name in wanted]
