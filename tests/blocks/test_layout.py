"""BlockLayout: size at a million tokens, bounded memory, sharing, helpers, errors, and the cache."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnreg import errors
from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks import BlockLayout, block_layout, cached_block_layout, clear_cache
from attnreg.blocks import cache as cache_module

M = 1 << 20


def documents() -> dict[str, Tensor]:
    ids = torch.arange(M) // 1000
    return {"document_ids": ids[None]}


@pytest.mark.parametrize(
    ("mask", "sparsity", "tensors", "entries", "tiles"),
    [
        # 64 blocks of left context, the diagonal block, and one more where the window's edge cuts.
        (m.SlidingWindow(4095), None, dict, 65 * M // 64, 2),
        (m.Causal() & m.SlidingWindow(4095), None, dict, 65 * M // 64, 2),
        (m.SlidingWindow(1000, 1000), None, dict, 34 * M // 64, 8),
        (m.longformer(512, (0, 9)), None, dict, (10 + 1 + 1) * M // 64, 16),
        (m.Causal() & m.Chunked(8192), None, dict, 65 * M // 64, 1),
        (m.Causal() & m.Dilated(512, 3), None, dict, 14 * M // 64, 8),
        (m.Causal() & m.Document(), None, documents, 17 * M // 64, 1200),
        (m.Causal(), s.BigBird(64), dict, 8 * M // 64, 1),
        (m.Causal(), s.Strided(64, 4, 4096), dict, 8 * M // 64, 1),
    ],
    ids=lambda x: repr(x) if isinstance(x, (m.Mask, s.Sparsity)) else "",
)
def test_a_million_tokens_take_megabytes(
    mask: m.Mask, sparsity: s.Sparsity | None, tensors: Callable[[], dict[str, Tensor]], entries: int, tiles: int
) -> None:
    given = tensors()
    tracemalloc.start()
    layout = block_layout(mask, sparsity, M, M, 64, 64, tensors=given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < layout.live_blocks <= entries
    assert layout.n_tiles <= tiles
    assert layout.nbytes < 16 << 20
    assert peak < 256 << 20, "building must stay in megabytes; Sq x Skv bits would be 128 GiB"


def test_a_window_has_the_entries_that_arithmetic_says() -> None:
    layout = block_layout(m.SlidingWindow(4095), None, M, M, 64, 64)
    n = M // 64
    first = sum(min(r, 64) + 1 for r in range(n))
    assert layout.live_blocks == first
    assert layout.partial_blocks == n + (n - 64)  # the diagonal, and the window's far edge
    assert layout.n_tiles == 2
    assert layout.pairs == 4096 * M - 4096 * 4095 // 2
    assert layout.density == layout.pairs / M**2
    assert layout.flops(64) == 2 * layout.pairs * 128
    assert layout.flops(192, 128, backward=True) == 5 * layout.pairs * 320


def test_code_and_dense_masks_are_evaluated_in_bounded_memory() -> None:
    sq = skv = 6144
    seen: list[int] = []

    def mask_mod(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
        out = (p + j) % 5 == 0
        seen.append(out.numel())
        return out

    layout = block_layout(m.Custom(mask_mod), None, sq, skv, 64, 64)
    assert max(seen) <= 1 << 20
    assert sum(seen) == sq * skv + 1, "one pair to see what it reads, then each pair once"
    assert (layout.n_tiles, layout.live_blocks) == (5, (sq // 64) * (skv // 64))

    seen.clear()
    near = block_layout(m.Custom(mask_mod) & m.SlidingWindow(127), None, sq, skv, 64, 64)
    assert sum(seen) <= 3 * 64 * sq, "only the blocks that the window leaves are asked"
    assert near.live_blocks < 3 * sq // 64


@pytest.mark.parametrize(
    ("mask", "sparsity", "tensors", "lead"),
    [
        (m.Causal(), None, {}, (1, 1)),
        (m.Custom(lambda b, h, p, j: j <= p), None, {}, (1, 1)),
        (m.Custom(lambda b, h, p, j: j <= p + h), None, {}, (1, 4)),
        (m.Custom(lambda b, h, p, j: j <= p + b), None, {}, (3, 1)),
        (m.Padding(), None, {"kv_lengths": torch.tensor([9, 40, 100])}, (3, 1)),
        (m.Padding(), None, {"kv_lengths": torch.tensor([40, 40, 40])}, (1, 1)),
        (m.Dense(), None, {"attn_mask": torch.rand(1, 4, 1, 100) < 0.5}, (1, 4)),
        (m.Dense(), None, {"attn_mask": torch.rand(100) < 0.5}, (1, 1)),
        (m.Causal(), s.BigBird(8), {}, (1, 4)),
        (m.Causal(), s.BigBird(8, random_blocks=0), {}, (1, 1)),
        (m.Full(), s.Blocks(10, 10), {"block_mask": torch.rand(3, 1, 10, 10) < 0.5}, (3, 1)),
    ],
    ids=[
        "causal",
        "custom",
        "custom-heads",
        "custom-batch",
        "padding",
        "padding-alike",
        "dense-heads",
        "dense",
        "bigbird",
        "bigbird-not-random",
        "blocks-batch",
    ],
)
def test_batches_and_heads_are_told_apart_only_where_they_differ(
    mask: m.Mask, sparsity: s.Sparsity | None, tensors: dict[str, Tensor], lead: tuple[int, int]
) -> None:
    layout = block_layout(mask, sparsity, 100, 100, 16, 16, batch=3, heads=4, tensors=tensors)
    assert (layout.n_batch, layout.n_heads) == lead


def test_code_that_reads_no_batch_or_head_is_asked_once() -> None:
    pairs = 0
    documents, heads = torch.arange(64) // 9, torch.tensor([3, 5])

    def counted(which: Callable[..., Tensor]) -> m.Custom:
        def mask_mod(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
            nonlocal pairs
            out = which(b, h, p, j)
            pairs += out.numel()
            return out

        return m.Custom(mask_mod)

    for which, lead in (
        (lambda b, h, p, j: documents[p] == documents[j], 1),
        (lambda b, h, p, j: p - j < heads[h], 2),
        (lambda b, h, p, j: torch.stack([p + 0 * j, j + b + 0 * p]).amax(0) < 30, 3),
        (lambda b, h, p, j: (p >= j) & (b.eq(1) | h.bool()), 6),
    ):
        pairs = 0
        layout = block_layout(counted(which), None, 64, 64, 16, 16, batch=3, heads=2)
        assert pairs <= lead * 64 * 64 + 1
        b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (3, 2, 64, 64)), indexing="ij")
        assert torch.equal(layout.to_dense().expand(3, 2, 64, 64), which(b, h, i, j))


def test_padded_tables_hold_the_lists() -> None:
    layout = block_layout(m.longformer(40, (3,)), None, 200, 170, 16, 16, offset=-10)
    for partial in (False, True):
        count, columns = layout.padded(partial=partial)
        wide = layout.padded(partial=partial, width=layout.n_kv)[1]
        assert wide.shape == (1, 1, layout.n_q, layout.n_kv)
        for r in range(layout.n_q):
            start, split, end = int(layout.row_ptr[r]), int(layout.row_split[r]), int(layout.row_ptr[r + 1])
            want = layout.col_idx[split:end] if partial else layout.col_idx[start:split]
            n = int(count[0, 0, r])
            assert torch.equal(columns[0, 0, r, :n], want)
            assert torch.equal(wide[0, 0, r, :n], want)
            assert not wide[0, 0, r, n:].any()


def test_arrays_are_int32_contiguous_and_move_together() -> None:
    layout = block_layout(m.Causal(), None, 100, 100, 16, 40)
    for x in (
        layout.row_ptr, layout.row_split, layout.col_idx, layout.tile_idx, layout.bits,
        layout.col_ptr, layout.col_split, layout.row_idx, layout.col_tile,
    ):  # fmt: skip
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert layout.bits.shape == (layout.n_tiles, 16, 2)
    assert layout.to("cpu") is layout
    assert layout.to("meta").bits.device.type == "meta"


@pytest.mark.parametrize(("sq", "skv"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(sq: int, skv: int) -> None:
    layout = block_layout(m.Causal() | ~m.Global((1,)), s.BigBird(4), sq, skv, 4, 4)
    assert (layout.live_blocks, layout.pairs, layout.density) == (0, 0, 0.0)
    assert layout.to_dense().shape == (1, layout.n_heads, sq, skv)
    assert layout.col_ptr.tolist() == [0] * (layout.n_kv + 1)


@pytest.mark.parametrize(
    ("mask", "sparsity", "tensors"),
    [
        (m.Causal(), s.BigBird(4), {}),
        (m.longformer(4, (0,)) & m.Padding(), None, {"kv_lengths": torch.zeros(0, dtype=torch.int32)}),
        (m.Document() | m.Dense(), None, {"document_ids": torch.zeros(0, 9).int(), "attn_mask": torch.ones(9) > 0}),
        (m.Custom(lambda b, h, p, j: j <= p + b), s.Blocks(4, 4), {"block_mask": torch.ones(0, 2, 2, 3) > 0}),
    ],
    ids=["bigbird", "padding", "documents", "blocks"],
)
def test_no_batch(mask: m.Mask, sparsity: s.Sparsity | None, tensors: dict[str, Tensor]) -> None:
    """An empty list for each row block of the one batch that stands for none."""
    none = torch.zeros(0, dtype=torch.int64)
    for lengths in ({}, {"q_len": none, "kv_len": none, "offset": none}):
        layout = block_layout(mask, sparsity, 6, 9, 4, 4, batch=0, heads=2, tensors=tensors, **lengths)
        assert (layout.batch, layout.n_batch, layout.n_heads) == (0, 1, 1)
        assert (layout.live_blocks, layout.pairs, layout.density, layout.n_tiles) == (0, 0, 0.0, 0)
        assert layout.row_ptr.tolist() == [0, 0, 0]
        assert layout.col_ptr.tolist() == [0, 0, 0, 0]
        assert layout.bits.shape == (0, 4, 1)
        assert not layout.to_dense().any()


def test_lengths_one_a_batch() -> None:
    layout = block_layout(m.Causal(), None, 6, 9, 4, 4, batch=2, q_len=[6, 2], kv_len=[9, 5])
    want = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    for b, (rows, keys) in enumerate(((6, 9), (2, 5))):
        for i in range(rows):
            want[b, 0, i, : keys - rows + i + 1] = True
    assert torch.equal(layout.to_dense(), want)
    assert (layout.offset, layout.q_len, layout.kv_len) == ((3, 3), (6, 2), (9, 5))
    assert torch.equal(
        block_layout(
            m.Causal(), None, 6, 9, 4, 4, batch=2, q_len=torch.tensor([6, 2]), kv_len=torch.tensor([9, 5]).int()
        ).to_dense(),
        want,
    )


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"sq": -1}, errors.InputError, "sq"),
        ({"skv": 2.0}, errors.InputError, "skv"),
        ({"block_q": 0}, errors.InputError, "block_q"),
        ({"block_kv": True}, errors.InputError, "block_kv"),
        ({"heads": 0}, errors.InputError, "heads"),
        ({"batch": -1}, errors.InputError, "batch"),
        ({"mask": m.Padding()}, errors.MissingTensorError, "kv_lengths"),
        ({"mask": m.Padding(), "tensors": {"kv_lengths": torch.ones(3)}}, errors.ShapeError, "kv_lengths"),
        ({"sparsity": s.Blocks(4, 4)}, errors.MissingTensorError, "block_mask"),
        ({"mask": m.Dense(), "tensors": {"attn_mask": torch.ones(7) > 0}}, errors.ShapeError, "attn_mask"),
        ({"mask": m.Dense(), "tensors": {"attn_mask": torch.ones(3, 1, 8, 8) > 0}}, errors.ShapeError, "attn_mask"),
        ({"mask": m.Document(), "tensors": {"document_ids": torch.ones(2, 7)}}, errors.ShapeError, "document_ids"),
        (
            {"sparsity": s.Blocks(4, 4), "tensors": {"block_mask": torch.ones(2, 1, 3, 2) > 0}},
            errors.ShapeError,
            "block_mask",
        ),
        ({"offset": [1, 2, 3]}, errors.ShapeError, "offset"),
        ({"q_len": 9}, errors.InputError, "q_len"),
        ({"kv_len": -1}, errors.InputError, "kv_len"),
        ({"sq": 1 << 22, "skv": 1 << 22, "block_q": 16, "block_kv": 16}, errors.InputError, "sq"),
    ],
    ids=repr,
)
def test_what_does_not_fit_is_named(change: dict[str, object], error: type, argument: str) -> None:
    call: dict[str, object] = {
        "mask": m.Causal(), "sparsity": None, "sq": 8, "skv": 8, "block_q": 4, "block_kv": 4, "batch": 2, **change,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        block_layout(**call)  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.argument == argument


def test_cache_returns_the_same_layout_and_sees_changed_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    spec = (m.Causal() & m.Padding(), s.Dense(), 64, 64, 16, 16)
    lengths = torch.tensor([20])

    def get() -> BlockLayout:
        return cached_block_layout(*spec, tensors={"kv_lengths": lengths})

    first = get()
    assert get() is first
    assert cached_block_layout(*spec, tensors={"kv_lengths": lengths.clone()}) is first
    lengths.numpy()[0] = 50  # written behind torch's back
    second = get()
    assert second.pairs > first.pairs
    assert cached_block_layout(*spec, offset=-3, tensors={"kv_lengths": lengths}) is not second

    code = m.Custom(lambda b, h, p, j: j <= p)
    assert cached_block_layout(code, None, 8, 8, 4, 4) is not cached_block_layout(code, None, 8, 8, 4, 4)

    monkeypatch.setattr(cache_module, "ENTRIES", 3)
    for n in range(1, 8):
        cached_block_layout(m.SlidingWindow(n), None, 8, 8, 4, 4)
    assert len(cache_module._kept) == 3
    clear_cache()
    assert not cache_module._kept


def test_blocks_import_is_light() -> None:
    code = "import sys, attnreg.blocks; print([x for x in ('triton', 'optuna', 'typer', 'rich') if x in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
