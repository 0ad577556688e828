"""Law: a program that was saved by an earlier release loads and runs, in a process that has imported attnreg alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnreg
from attnreg import schema

SAVED = Path(__file__).parent / "saved"
FIRST = (
    "attention(Tensor q, Tensor k, Tensor v, str spec, str grads, str backend, str config, Tensor? attn_mask=None, "
    "Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? score_weight=None, "
    "Tensor? prefix_lengths=None, Tensor? global_mask=None, Tensor? document_ids=None, Tensor? kv_lengths=None, "
    "Tensor? query_offset=None, Tensor? block_mask=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? block_table=None, Tensor? seqused_k=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, Tensor? seed=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None"
)
"""The schema of the first release: later ones may only add arguments with a default behind it."""


def softmaxed(q: Tensor, k: Tensor, v: Tensor, live: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Output and lse of bhsd tensors in float64, with two query heads a KV head."""
    q, k, v = q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v))
    s = torch.where(live, q @ k.mT / 8**0.5 + bias, -torch.inf)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


@pytest.mark.parametrize(("sq", "skv"), [(7, 12), (1, 40), (30, 33)])
def test_a_window_of_dynamic_lengths(sq: int, skv: int) -> None:
    q, k, v = torch.randn(2, 4, sq, 8), torch.randn(2, 2, skv, 8), torch.randn(2, 2, skv, 8)
    p, j = torch.arange(skv - sq, skv).view(-1, 1), torch.arange(skv)
    want, _ = softmaxed(q, k, v, (j <= p) & (j >= p - 9))
    if sq < 2:
        sq_pair = torch.cat([q, q], 2)  # the program said at least two rows: the last is the one in question
        got = torch.export.load(SAVED / "window.pt2").module()(sq_pair, k, v, {})[:, :, -1:]
    else:
        got = torch.export.load(SAVED / "window.pt2").module()(q, k, v, {})
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_padding_bias_and_lse() -> None:
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    lengths, bias = torch.tensor([5, 11]), torch.randn(1, 4, 7, 12)
    program = torch.export.load(SAVED / "padding_bias_lse.pt2").module()
    out, lse = program(q, k, v, {"kv_lengths": lengths, "bias": bias})
    live = torch.arange(12) < lengths.view(-1, 1, 1, 1)
    want, want_lse = softmaxed(*(x.transpose(1, 2) for x in (q, k, v)), live, bias.double())
    torch.testing.assert_close(out.double(), want.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-5)


def test_another_process_loads_them() -> None:
    code = "import attnreg, torch, sys\nfor path in sys.argv[1:]: torch.export.load(path)\n"
    code += "print(sorted(m for m in sys.modules if m.startswith('attnreg_')))"
    files = [str(path) for path in sorted(SAVED.glob("*.pt2"))]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(files) == 2
    assert done.stdout.strip() == "[]"


def test_schemas_only_grow_at_their_end() -> None:
    assert schema.FORWARD_SCHEMA.startswith(FIRST)
    more = schema.FORWARD_SCHEMA[len(FIRST) :].split(")")[0]
    assert all("=" in argument for argument in more.split(",") if argument.strip())
    for name in ("attention", "attention_backward"):
        arguments = getattr(torch.ops.attnreg, name).default._schema.arguments
        assert [x.name for x in arguments if x.has_default_value()] == list(schema.OPTIONAL)
    assert attnreg.AttentionSpec().model_dump_json(exclude_defaults=True) == "{}"
