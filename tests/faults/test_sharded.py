"""Law: DTensors sharded by batch or heads compute what one process computes; other placements say what to do."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import attnreg
from attnreg import AttentionSpec, errors, masks, sparsity

RANKS = 2
B, HQ, HKV, S, D = 3, 8, 4, 37, 8
CAUSAL = masks.Causal()
CASES: dict[str, tuple[AttentionSpec, tuple[str, ...]]] = {
    "causal_lse": (AttentionSpec(mask=CAUSAL, return_lse=True), ()),
    "bias_alibi_sinks": (
        AttentionSpec(mask=CAUSAL, bias=True, alibi=True, sinks=True),
        ("bias", "alibi_slopes", "sinks"),
    ),
    "padding_bshd": (AttentionSpec(mask=masks.Padding(), layout="bshd", align="top_left"), ("kv_lengths",)),
    "blocks": (AttentionSpec(sparsity=sparsity.Blocks(16, 16)), ("block_mask",)),
}


def _named(names: tuple[str, ...]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    made = {
        "bias": torch.randn(1, HQ, S, S, generator=draw).requires_grad_(),
        "alibi_slopes": torch.rand(HQ, generator=draw),
        "sinks": torch.randn(HQ, generator=draw).requires_grad_(),
        "kv_lengths": torch.tensor([37, 5, 20]),
        "block_mask": torch.rand(B, HQ, 3, 3, generator=draw) > 0.4,
    }
    return {name: made[name] for name in names}


def _qkv(spec: AttentionSpec, kv_heads: int = HKV) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(B, heads, S, D, generator=draw) for heads in (HQ, kv_heads, kv_heads)]
    return [x.transpose(1, 2).contiguous() if spec.layout == "bshd" else x for x in made]


def _loss(out: Any) -> Tensor:
    parts = out if isinstance(out, tuple) else (out,)
    return sum((x.sin().sum() for x in parts), torch.zeros(()))


def _rank(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for name, (spec, names) in CASES.items():
            heads = 2 if spec.layout == "bshd" else 1
            for placement in (Shard(0), Shard(heads), Replicate()):
                _same(spec, names, mesh, [placement], f"{name} {placement}")
        one = [_qkv(AttentionSpec(), 1), [Shard(1), Replicate(), Replicate()]]
        q, k, v = (distribute_tensor(x, mesh, [p]) for x, p in zip(*one, strict=True))
        torch.testing.assert_close(
            attnreg.attention(AttentionSpec(mask=CAUSAL), q, k, v).full_tensor(),
            attnreg.attention(AttentionSpec(mask=CAUSAL), *one[0]),
        )
        _refusals(mesh)
        Path(folder, f"done{rank}").touch()
    except BaseException:
        Path(folder, f"failed{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def _same(spec: AttentionSpec, names: tuple[str, ...], mesh: Any, placements: list[Any], what: str) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    plain, named = [x.requires_grad_() for x in _qkv(spec)], _named(names)
    want = attnreg.attention(spec, *plain, **named)
    leaves = [*plain, *(x for x in named.values() if x.requires_grad)]
    grads = torch.autograd.grad(_loss(want), leaves)
    parts = [distribute_tensor(x.detach(), mesh, placements).requires_grad_() for x in plain]
    got = attnreg.attention(spec, *parts, **named)
    for one, other in zip(got if spec.return_lse else [got], want if spec.return_lse else [want], strict=True):
        assert isinstance(one, DTensor), what
        torch.testing.assert_close(one.full_tensor(), other, msg=lambda said: f"{what}: {said}")
    loss = _loss(tuple(x.full_tensor() for x in got) if spec.return_lse else got.full_tensor())
    found = torch.autograd.grad(loss, [*parts, *leaves[3:]])
    for one, other in zip(found, grads, strict=True):
        whole = one.full_tensor() if isinstance(one, DTensor) else one
        torch.testing.assert_close(whole, other, rtol=1e-4, atol=1e-5, msg=lambda said: f"{what}: {said}")


def _refusals(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def put(placements: list[Any], spec: AttentionSpec = AttentionSpec(), kv_heads: int = HKV) -> Any:  # noqa: B008 - frozen
        made = (distribute_tensor(x, mesh, [p]) for x, p in zip(_qkv(spec, kv_heads), placements, strict=True))
        return attnreg.attention(spec, *made)

    with pytest.raises(
        errors.InputError, match=r"q: expected Shard\(0\) \(batch\), Shard\(1\) \(heads\).*merge_states"
    ):
        put([Shard(2), Shard(2), Shard(2)])
    with pytest.raises(errors.InputError, match=r"k: expected q, k and v cut alike"):
        put([Shard(0), Replicate(), Replicate()])
    with pytest.raises(errors.InputError, match=r"dropout_p"):
        put([Shard(0)] * 3, AttentionSpec(dropout_p=0.1))
    with pytest.raises(errors.InputError, match=r"BigBird"):
        put([Shard(1)] * 3, AttentionSpec(sparsity=sparsity.BigBird(8)))
    with pytest.raises(errors.InputError, match=r"mask: Custom"):
        put([Shard(1)] * 3, AttentionSpec(mask=masks.Custom(lambda b, h, p, j: p >= j)))
    q = distribute_tensor(torch.randn(B, 6, S, D), mesh, [Shard(1)])
    k = distribute_tensor(torch.randn(B, 3, S, D), mesh, [Shard(1)])
    with pytest.raises(errors.InputError, match=r"number of heads that 2 ranks divide"):
        attnreg.attention(AttentionSpec(), q, k, k)
    with pytest.raises(errors.InputError, match=r"k: expected a DTensor"):
        attnreg.attention(AttentionSpec(), q, torch.randn(B, 3, S, D), k)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    try:
        mp.spawn(_rank, args=(str(tmp_path),), nprocs=RANKS)
    except Exception as error:
        said = "\n".join(path.read_text() for path in sorted(tmp_path.glob("failed*")))
        raise AssertionError(said or str(error)) from error
    assert len(list(tmp_path.glob("done*"))) == RANKS
