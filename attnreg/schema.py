"""The schemas of attnreg's torch operators: what a saved program names, and so what may only grow at its end."""

from __future__ import annotations

from attnreg.problem import GRADS

__all__ = [
    "BACKWARD",
    "BACKWARD_SCHEMA",
    "FORWARD",
    "FORWARD_SCHEMA",
    "LENGTHS",
    "OPTIONAL",
    "RESULTS",
    "SAVED",
    "TEXTS",
]

TENSORS = (
    "attn_mask", "bias", "alibi_slopes", "sinks", "score_weight", "prefix_lengths", "global_mask", "document_ids",
    "kv_lengths", "query_offset", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k", "q_descale",
    "k_descale", "v_descale", "seed",
)  # fmt: skip
LENGTHS = ("max_seqlen_q", "max_seqlen_k")
TEXTS = ("spec", "grads", "backend", "config")
OPTIONAL = (*TENSORS, *LENGTHS)
FORWARD = ("q", "k", "v", *TEXTS, *OPTIONAL)
RESULTS = ("out", "lse", "low")
SAVED = ("q", "k", "v", *TENSORS)
BACKWARD = ("q", "k", "v", *RESULTS, "dout", "dlse", *TEXTS, *OPTIONAL)


def _arguments(names: tuple[str, ...]) -> str:
    kinds = {"dlse": "Tensor? dlse", **{n: f"str {n}" for n in TEXTS}}
    kinds |= {n: f"Tensor? {n}=None" for n in TENSORS} | {n: f"SymInt? {n}=None" for n in LENGTHS}
    return ", ".join(kinds.get(n, f"Tensor {n}") for n in names)


FORWARD_SCHEMA = f"attention({_arguments(FORWARD)}) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = f"attention_backward({_arguments(BACKWARD)}) -> ({', '.join(['Tensor'] * (3 + len(GRADS)))})"
