"""The guard over the other tests here: a kernel that leaves its tensors fails, one that stays inside does not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from memory_guard import guarded


@triton.jit
def copy_kernel(source, target, size, skip, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # device code
    at = tl.arange(0, BLOCK)
    tl.store(target + at + skip, tl.load(source + at, mask=at < size), mask=at < size)


@pytest.mark.parametrize(
    ("size", "skip", "words"), [(10, 0, ""), (11, 0, "load of 1 of 11"), (10, 1, "store of 1 of 10")]
)
def test_an_access_outside_is_found(size: int, skip: int, words: str) -> None:
    # Both are views of longer storage, which the interpreter itself would read and write without a word.
    source, target = torch.arange(32.0)[:10], torch.zeros(32)[:10]
    with guarded() as guard:
        if words:
            with pytest.raises(Exception, match=words):
                copy_kernel[(1,)](source, target, size, skip, BLOCK=16)
        else:
            copy_kernel[(1,)](source, target, size, skip, BLOCK=16)
            assert torch.equal(source, target)
    assert guard.accesses
