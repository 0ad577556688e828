"""Pictures: every mark says what its pairs say; thin structures survive at a million tokens; SVG is well formed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from attnreg import AttentionSpec, errors
from attnreg import masks as m
from attnreg import sparsity as s
from attnreg.blocks import block_layout

M = 1 << 20


def marks(picture: str) -> list[str]:
    """The rows of marks."""
    return [line.split("│")[1] for line in picture.splitlines() if "│" in line]


def test_a_small_mask_is_drawn_pair_by_pair() -> None:
    assert (m.Causal() & m.SlidingWindow(1)).show(3, 4) == "\n".join(
        [
            "Causal() & SlidingWindow(left=1, right=0)",
            "query ┌0───2───  key",
            "    0 │████····",
            "    1 │··████··",
            "    2 │····████",
            "",
            "       █ all  ▒ some  · none   each mark 1 x 1 pairs   50% of 3 x 4 attend",
        ]
    )


@pytest.mark.parametrize("mask", [m.longformer(20, (0, 77)), ~m.Dilated(5, 4), m.Causal() & m.Chunked(30)])
@pytest.mark.parametrize(("sq", "skv"), [(100, 130), (130, 100), (1, 200), (200, 1)])
def test_marks_say_what_their_pairs_say(mask: m.Mask, sq: int, skv: int) -> None:
    rows = marks(mask.show(sq, skv, width=40))
    i, j = torch.arange(sq)[:, None], torch.arange(skv)[None]
    dense = mask.allows(m.Coords(torch.tensor(0), torch.tensor(0), i, i + skv - sq, j)).expand(sq, skv)
    height, width = len(rows), len(rows[0])
    assert (height <= 32, width <= 40) == (True, True)
    for r in range(height):
        for c in range(width):
            cell = dense[r * sq // height : (r + 1) * sq // height, c * skv // width : (c + 1) * skv // width]
            assert rows[r][c] == ("█" if cell.all() else "▒" if cell.any() else "·")


def test_thin_structures_survive_at_a_million_tokens() -> None:
    rows = marks((m.SlidingWindow(0) | m.Global((M // 2 + 12345,))).show(M, M))
    assert (len(rows), len(rows[0])) == (32, 64)
    for r, row in enumerate(rows):
        on_the_diagonal = {2 * r, 2 * r + 1}
        seen = {c for c, mark in enumerate(row) if mark != "·"}
        assert on_the_diagonal & seen
        assert seen <= on_the_diagonal | {32} or r == 16
    assert sum(row[32] != "·" for row in rows) == 32
    # One global query in a cell of 32768 rows is seen only where a full column is read: every cell of its row.
    assert all(mark != "·" for mark in rows[16])


def test_offsets_and_alignments() -> None:
    causal = AttentionSpec(mask=m.Causal())
    assert marks(causal.show(2, 4)) == ["██████··", "████████"]
    assert marks(m.Causal().show(2, 4, offset=0)) == ["██······", "████····"]
    assert marks(causal.model_copy(update={"align": "top_left"}).show(2, 4)) == ["██······", "████····"]
    offset = causal.model_copy(update={"align": "offset"})
    assert marks(offset.show(2, 4, query_offset=torch.tensor([1]))) == ["████····", "██████··"]
    padded = AttentionSpec(mask=m.Causal() & m.Padding())
    assert marks(padded.show(2, 4, kv_lengths=torch.tensor([3, 9]))) == ["████····", "██████··"]


def test_spec_draws_mask_and_sparsity() -> None:
    spec = AttentionSpec(mask=m.Causal(), sparsity=s.Blocks(2, 2))
    blocks = torch.tensor([[True, True], [False, True]])[None, None]
    assert marks(spec.show(4, 4, block_mask=blocks, kv_lengths=torch.tensor([1]))) == [
        "██······", "████····", "····██··", "····████",
    ]  # fmt: skip
    assert marks(s.Blocks(2, 2).show(4, 4, block_mask=blocks))[2] == "····████"
    packed = AttentionSpec(mask=m.Document() & m.Causal(), layout="thd")
    assert marks(packed.show(2, 2)) == ["██··", "████"]


def test_what_is_missing_is_named() -> None:
    for draw, name in (
        (lambda: m.Padding().show(4, 4), "kv_lengths"),
        (lambda: AttentionSpec(mask=m.Document()).show(4, 4), "document_ids"),
        (lambda: AttentionSpec(align="offset").show(4, 4), "query_offset"),
        (lambda: s.Blocks(2, 2).show(4, 4), "block_mask"),
    ):
        with pytest.raises(errors.MissingTensorError) as caught:
            draw()
        assert caught.value.argument == name
    for sizes, name in (((0, 4), "sq"), ((4, 0), "skv")):
        with pytest.raises(errors.InputError) as failed:
            m.Causal().show(*sizes)
        assert failed.value.argument == name
    with pytest.raises(errors.InputError) as failed:
        m.Causal().show(4, 4, width=0)
    assert failed.value.argument == "width"


@pytest.mark.parametrize(
    "shown",
    [
        m.Causal(),
        m.longformer(512, (0, 700)),
        AttentionSpec(mask=m.Causal(), sparsity=s.BigBird(64)),
        AttentionSpec(mask=m.Causal() & m.SlidingWindow(4095)),
        AttentionSpec(mask=m.Document(), layout="thd"),
    ],
    ids=repr,
)
def test_svg_is_well_formed_and_small(shown: m.Mask | AttentionSpec) -> None:
    image = shown._repr_svg_()
    assert image is not None
    assert len(image) < 64 << 10
    root = ElementTree.fromstring(image)
    assert root.tag.endswith("svg")
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text
    assert (repr(shown) if isinstance(shown, m.Mask) else repr(shown.mask)) in title.text


def test_svg_of_what_needs_tensors_leaves_the_text_form() -> None:
    assert m.Padding()._repr_svg_() is None
    assert AttentionSpec(mask=m.Padding())._repr_svg_() is None
    assert AttentionSpec(align="offset")._repr_svg_() is None


def test_a_layout_draws_its_blocks() -> None:
    layout = block_layout(m.Causal(), s.BigBird(16), 160, 160, 16, 16, heads=2)
    assert layout.n_heads == 2
    picture = layout.show(head=1)
    rows = marks(picture)
    for r in range(10):
        live = {int(c) for c in layout.col_idx[layout.row_ptr[10 + r] : layout.row_ptr[11 + r]]}
        assert {c for c, mark in enumerate(rows[r]) if mark != "·"} == live
        assert rows[r][r] == "▒"
    assert "head 1" in picture
    with pytest.raises(errors.InputError, match="head"):
        layout.show(head=2)
