"""Turn the tensors of a call into the bytes of the C struct `Params`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem
from attnreg_cpu import params
from attnreg_cpu.conjunction import Conjunction
from attnreg_cpu.threads import thread_count

FIRST = params.INDEX["threads"] + 1  # fields that every call sets; the rest depends on named tensors only
LAST = params.FIELDS[-1][0]  # lse_low: all that gradients add to a forward call without named tensors
ALIGN = {"bottom_right": 0, "top_left": 1, "offset": 2}
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_head_packer = struct.Struct(f"={FIRST}q")
_last_packer = struct.Struct("=q")
Put = Callable[[str, int | float], None]


def dense_rows(x: Tensor) -> Tensor:
    """x itself, or a copy where its last dimension is not dense: kernels read whole rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def longest(tensors: Mapping[str, Any], side: str) -> int:
    """Rows that named tensors of a packed call are sized by: max_seqlen_q or _k where given, else the longest's."""
    given = tensors.get(f"max_seqlen_{side}")
    if given is not None:
        return int(given)
    lengths = tensors[f"cu_seqlens_{side}"].diff()
    return int(lengths.max()) if len(lengths) else 0


class Arguments:
    """Fills params for calls of one prepared problem. Immutable, so that calls may run on several threads at once.

    `settings` are params fields that the configuration fixes (block_kv, tiles, ...).
    """

    def __init__(self, problem: Problem, mask: Conjunction, settings: Mapping[str, int]) -> None:
        spec = problem.spec
        self._layout = spec.layout
        self._paged = spec.page_size is not None
        self._mask = mask
        self._fixed = {
            "align": ALIGN[spec.align],
            "causal": int(mask.causal),
            "window_left": mask.window_left,
            "window_right": mask.window_right,
            "prefix": mask.prefix,
            "chunk": mask.chunk,
            "padding": int(mask.padding),
            "scale": problem.scale,
            "softcap": spec.softcap,
            "page_size": spec.page_size or 0,
            **settings,
        }
        self._plain_tail = self._pack_tail(params.template(self._fixed))

    def head(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, batch: int, skv: int) -> bytes:
        """The fields that change with every call.

        q, k, v, out: dense rows, in the spec's layout; lse: [B, Hq, Sq] or [Hq, T].
        """
        layout = self._layout
        q_b, q_h, q_r = strides_of(q, layout)
        out_b, out_h, out_r = strides_of(out, layout)
        kv_layout = "bhsd" if self._paged else layout
        k_b, k_h, k_r = strides_of(k, kv_layout)
        v_b, v_h, v_r = strides_of(v, kv_layout)
        q_heads, sq = (q.shape[1], q.shape[2]) if layout == "bhsd" else (q.shape[-2], q.shape[-3])
        kv_heads = k.shape[1] if kv_layout != "bshd" else k.shape[2]
        if lse is None:
            lse_at = lse_b = lse_h = lse_r = 0
        else:
            lse_at, lse_r, lse_h = lse.data_ptr(), lse.stride(-1), lse.stride(-2)
            lse_b = lse.stride(0) if layout != "thd" else 0
        return _head_packer.pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse_at,
            q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, out_b, out_h, out_r, lse_b, lse_h, lse_r,
            batch, q_heads, kv_heads, sq, skv, thread_count(),
        )  # fmt: skip

    def tail(self, tensors: Mapping[str, Any], more: Mapping[str, int] | None = None) -> tuple[bytes, list[Tensor]]:
        """The other fields, and the tensors that must outlive the call because the bytes point into them."""
        if not tensors and not more:
            return self._plain_tail, []
        if not tensors and more and more.keys() == {LAST}:
            return self._plain_tail[:-8] + _last_packer.pack(more[LAST]), []
        values = params.template(self._fixed)
        kept: list[Tensor] = []

        def put(name: str, value: int | float) -> None:
            values[params.INDEX[name]] = value

        for name, field, wide in _INTEGERS:
            # A stronger part of the mask may leave a prefix without a meaning.
            if name != "prefix_lengths" or self._mask.prefix_tensor:
                _put_integers(put, kept, tensors.get(name), field, wide)
        if tensors.get("block_table") is not None:
            put("table_row", kept[-1].stride(0) if kept[-1].shape[0] > 1 else kept[-1].shape[1])
        if self._mask.document and tensors.get("document_ids") is not None:
            _put_documents(put, tensors["document_ids"])
        if self._mask.dense:
            _put_pairs(put, tensors["attn_mask"], "mask")
        if tensors.get("bias") is not None:
            _put_pairs(put, tensors["bias"], "bias")
            put("bias_type", FLOAT_TYPES[tensors["bias"].dtype])
        if tensors.get("alibi_slopes") is not None:
            slopes = _float_vector(kept, tensors["alibi_slopes"])
            put("alibi", slopes.data_ptr())
            put("alibi_batch", slopes.stride(0) if slopes.dim() == 2 and slopes.shape[0] > 1 else 0)
        if tensors.get("score_weight") is not None:
            weight = _float_vector(kept, tensors["score_weight"])
            put("weight", weight.data_ptr())
            put("weight_head", weight.stride(0) if weight.shape[0] > 1 else 0)
        if tensors.get("sinks") is not None:
            put("sinks", _float_vector(kept, tensors["sinks"]).data_ptr())
        for name, value in (more or {}).items():
            put(name, value)
        return self._pack_tail(values), kept

    @staticmethod
    def _pack_tail(values: list[int | float]) -> bytes:
        return params.pack(values)[FIRST * 8 :]


_INTEGERS = (
    ("cu_seqlens_q", "cu_q", "wide_cu_q"),
    ("cu_seqlens_k", "cu_k", "wide_cu_k"),
    ("kv_lengths", "kv_lengths", "wide_kv_lengths"),
    ("seqused_k", "seqused", "wide_seqused"),
    ("query_offset", "query_offset", "wide_query_offset"),
    ("prefix_lengths", "prefix_lengths", "wide_prefix"),
    ("block_table", "block_table", "wide_table"),  # last: `tail` reads its stride off the end of `kept`
)


def strides_of(x: Tensor, layout: str) -> tuple[int, int, int]:
    """Strides of batch (or page), head and row."""
    if layout == "bhsd":
        b, h, r, _ = x.stride()
        return b, h, r
    if layout == "bshd":
        b, r, h, _ = x.stride()
        return b, h, r
    r, h, _ = x.stride()
    return 0, h, r


def _put_integers(put: Put, kept: list[Tensor], x: Tensor | None, field: str, wide: str) -> None:
    if x is None:
        return
    x = x.contiguous()
    kept.append(x)
    put(field, x.data_ptr())
    put(wide, int(x.dtype == torch.int64))


def _put_documents(put: Put, ids: Tensor) -> None:
    put("documents", ids.data_ptr())
    put("document_batch", ids.stride(0))
    put("document_row", ids.stride(1))
    put("document_width", ids.element_size())


def _put_pairs(put: Put, x: Tensor, field: str) -> None:
    """A tensor that broadcasts to [B, Hq, Sq, Skv]: strides of 0 where it is broadcast."""
    strides = [0] * (4 - x.dim()) + [0 if n == 1 else st for n, st in zip(x.shape, x.stride(), strict=True)]
    put(field, x.data_ptr())
    for name, stride in zip(("batch", "head", "row", "key"), strides, strict=True):
        put(f"{field}_{name}", stride)


def _float_vector(kept: list[Tensor], x: Tensor) -> Tensor:
    x = x.detach().float().contiguous()
    kept.append(x)
    return x
