"""Dense float64 attention, a sequence at a time, written from the meanings in docs/design.md and from nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionSpec, masks, scores, sparsity


def dense(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output in the layout of q and lse ([B, Hq, Sq]; thd: [Hq, T]), float64, by materialising everything."""
    outs, lses = [], []
    thd = spec.layout == "thd"
    count = tensors["cu_seqlens_q"].numel() - 1 if thd else q.shape[0]
    longest = 0
    for b in range(count):
        longest = max(longest, _sequence_k(spec, k, tensors, b).shape[1])
    for b in range(count):
        out, lse = _one(spec, _sequence_q(spec, q, tensors, b), _sequence_k(spec, k, tensors, b),
                        _sequence_k(spec, v, tensors, b), tensors, b, longest)  # fmt: skip
        outs.append(out)
        lses.append(lse)
    if thd:
        return torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1)
    out = torch.stack(outs)
    return out.transpose(1, 2) if spec.layout == "bshd" else out, torch.stack(lses)


def _sequence_q(spec: AttentionSpec, q: Tensor, tensors: dict[str, Any], b: int) -> Tensor:
    """[Hq, Sq, D] of sequence b."""
    if spec.layout == "thd":
        cu = tensors["cu_seqlens_q"]
        return q[int(cu[b]) : int(cu[b + 1])].transpose(0, 1)
    return q[b].transpose(0, 1) if spec.layout == "bshd" else q[b]


def _sequence_k(spec: AttentionSpec, x: Tensor, tensors: dict[str, Any], b: int) -> Tensor:
    """[Hkv, Skv, D] of sequence b, of k or v."""
    if spec.page_size is not None:
        pages = [x[max(int(n), 0)] for n in tensors["block_table"][b]]
        return torch.cat(pages, 1)
    if spec.layout == "thd":
        cu = tensors["cu_seqlens_k"]
        return x[int(cu[b]) : int(cu[b + 1])].transpose(0, 1)
    return x[b].transpose(0, 1) if spec.layout == "bshd" else x[b]


def _one(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Any], b: int, longest: int
) -> tuple[Tensor, Tensor]:
    q, k, v = q.double(), k.double(), v.double()
    hq, sq, d = q.shape
    hkv, skv, _ = k.shape
    group = hq // hkv
    if tensors.get("q_descale") is not None:
        scale = tensors["q_descale"].double()
        scale = scale.reshape(1) if spec.dtype.scaling == "tensor" else scale[b].repeat_interleave(group)
        q = q * scale[:, None, None]
    if tensors.get("k_descale") is not None:
        k = k * _descale(spec, tensors["k_descale"], b, hkv, skv, longest)
        v = v * _descale(spec, tensors["v_descale"], b, hkv, skv, longest)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)

    if isinstance(spec.score, scores.Additive):
        w = tensors["score_weight"].double().expand(hq, d)
        s = (w[:, None, None] * torch.tanh(q[:, :, None] + k[:, None])).sum(-1)
    elif isinstance(spec.score, scores.General):
        s = torch.einsum("hid,hde,hje->hij", q, tensors["score_weight"].double().expand(hq, -1, -1), k)
    else:
        scale = 1.0
        if isinstance(spec.score, scores.ScaledDot):
            scale = 1 / math.sqrt(d) if spec.score.scale is None else spec.score.scale
        s = torch.einsum("hid,hjd->hij", q, k) * scale
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)

    kv_len = skv
    if tensors.get("kv_lengths") is not None:
        kv_len = int(tensors["kv_lengths"][b])
    elif tensors.get("seqused_k") is not None:
        kv_len = int(tensors["seqused_k"][b])
    i = torch.arange(sq)[:, None]
    j = torch.arange(skv)[None, :]
    if spec.align == "top_left":
        p = i
    elif spec.align == "offset":
        p = i + int(tensors["query_offset"][b])
    else:
        p = i + kv_len - sq

    if spec.bias:
        bias = tensors["bias"].double()
        bias = bias[(None,) * (4 - bias.dim())]
        bias = bias[b if bias.shape[0] > 1 else 0]
        s = s + bias[:, : sq if bias.shape[1] > 1 else 1, : skv if bias.shape[2] > 1 else 1]
    if spec.alibi:
        slopes = tensors["alibi_slopes"].double()
        slopes = slopes[b if slopes.shape[0] > 1 else 0] if slopes.dim() == 2 else slopes
        s = s - slopes[:, None, None] * (p - j).abs()

    may = torch.stack([
        _may(spec.mask, tensors, b, h, i, p, j, spec.layout == "thd").expand(sq, skv)
        & _block(spec.sparsity, tensors, b, h, i, p, j, hq, skv).expand(sq, skv)
        for h in range(hq)
    ])  # fmt: skip
    if tensors.get("seqused_k") is not None:
        may = may & (j < int(tensors["seqused_k"][b]))
    s = torch.where(may, s, -math.inf)

    sink = (
        tensors["sinks"].double()[:, None, None].expand(hq, sq, 1) if spec.sinks else s.new_full((hq, sq, 1), -math.inf)
    )
    joint = torch.cat([s, sink], -1)
    empty = (joint == -math.inf).all(-1, keepdim=True)
    joint = torch.where(empty, 0.0, joint)
    weights = torch.where(empty, 0.0, torch.softmax(joint, -1))[..., :-1]
    lse = torch.where(empty[..., 0], -math.inf, torch.logsumexp(joint, -1))
    return weights @ v, lse


def _descale(spec: AttentionSpec, x: Tensor, b: int, hkv: int, skv: int, longest: int) -> Tensor:
    """[Hkv or 1, Skv or 1, 1]."""
    x = x.double()
    if spec.dtype.scaling == "tensor":
        return x.reshape(1, 1, 1)
    row = x[b if x.shape[0] > 1 else 0]
    if row.dim() == 1:
        return row.reshape(-1, 1, 1)
    size = spec.page_size
    if size is None:
        size = 1
        while -(-longest // size) > row.shape[-1]:
            size *= 2
    return torch.stack([row[:, n // size] for n in range(skv)], 1)[..., None] if skv else row[:, :0, None]


def _may(m: masks.Mask, t: dict[str, Any], b: int, h: int, i: Tensor, p: Tensor, j: Tensor, packed: bool) -> Tensor:
    """Bool [Sq, Skv]: the table of masks, one line each."""
    again = lambda part: _may(part, t, b, h, i, p, j, packed)  # noqa: E731  # shorter than a nested def
    yes = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool)
    if isinstance(m, masks.Full):
        return yes
    if isinstance(m, masks.And):
        return torch.stack([again(part) & yes for part in m.of]).all(0)
    if isinstance(m, masks.Or):
        return torch.stack([again(part) & yes for part in m.of]).any(0)
    if isinstance(m, masks.Not):
        return ~again(m.of)
    if isinstance(m, masks.Causal):
        return j <= p
    if isinstance(m, masks.SlidingWindow):
        return (p - m.left <= j) & (j <= p + m.right)
    if isinstance(m, masks.PrefixLM):
        return (j < (int(t["prefix_lengths"][b]) if m.length is None else m.length)) | (j <= p)
    if isinstance(m, masks.Chunked):
        return torch.floor(p / m.size) == torch.floor(j / m.size)
    if isinstance(m, masks.Dilated):
        reach = range(-(m.window // 2), m.window // 2 + 1)
        return torch.stack([j == p + n * m.dilation for n in reach]).any(0)
    if isinstance(m, masks.Global):
        tokens = set(m.tokens) if m.tokens is not None else set(t["global_mask"][b].nonzero().flatten().tolist())
        at_p = torch.tensor([int(x) in tokens for x in p.flatten()], dtype=torch.bool).reshape(-1, 1)
        at_j = torch.tensor([int(x) in tokens for x in j.flatten()], dtype=torch.bool).reshape(1, -1)
        return at_p | at_j
    if isinstance(m, masks.Document):
        if packed:
            return yes
        ids = t["document_ids"][b].tolist()
        mine = [ids[int(x)] if 0 <= int(x) < len(ids) else None for x in p.flatten()]
        return torch.tensor([[x == y for y in ids] for x in mine], dtype=torch.bool).reshape(yes.shape)
    if isinstance(m, masks.Padding):
        return (j < int(t["kv_lengths"][b])) & yes
    if isinstance(m, masks.Dense):
        mask = t["attn_mask"]
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0]
        return mask[: i.shape[0] if mask.shape[0] > 1 else 1, : j.shape[1] if mask.shape[1] > 1 else 1] & yes
    if isinstance(m, masks.Custom):
        return m.mask_mod(torch.tensor(b), torch.tensor(h), p, j) & yes
    raise AssertionError(m)


def _block(
    s: sparsity.Sparsity, t: dict[str, Any], b: int, h: int, i: Tensor, p: Tensor, j: Tensor, hq: int, skv: int
) -> Tensor:
    yes = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool)
    if isinstance(s, sparsity.Dense):
        return yes
    if isinstance(s, sparsity.Blocks):
        mask = t["block_mask"]
        mask = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0]
        return torch.tensor(
            [[bool(mask[int(x) // s.block_q, int(y) // s.block_kv]) for y in j[0]] for x in i[:, 0]], dtype=torch.bool
        ).reshape(yes.shape)
    r, c = torch.floor(p / s.block).long(), j // s.block
    if isinstance(s, sparsity.Strided):
        return ((c <= r) & (c > r - s.local)) | (c % s.stride == 0)
    assert isinstance(s, sparsity.BigBird)
    columns = -(-skv // s.block)
    g = s.global_blocks
    ends = lambda x: ((x >= 0) & (x < g)) | ((x >= columns - g) & (x < columns))  # noqa: E731  # as above
    out = ((r - c).abs() <= s.window // 2) | ends(r) | ends(c)
    if columns:
        drawn = s.random_columns(hq, columns)[h].tolist()  # the draw itself is the pattern's own
        rows = [drawn[int(x)] if 0 <= int(x) < columns else [] for x in r.flatten()]
        random = [[int(y) in row for y in c.flatten()] for row in rows]
        out = out | torch.tensor(random, dtype=torch.bool).reshape(yes.shape)
    return out
