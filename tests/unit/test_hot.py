"""Law: the hot table stays bounded, and one bucket's lock lives as long as somebody waits for it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import attnreg
from attnreg import AttentionSpec, errors, hot


def test_every_table_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot.HotTable, "EXACT_LIMIT", 8)
    with hot.fresh_table() as table:
        for width in range(1, 20):
            x = torch.randn(1, 1, 2, width)
            attnreg.attention(AttentionSpec(), x, x, x)
            assert len(table.buckets) <= 8
            assert len(table.exact) <= 8
            assert table.locks == {}
        assert table.buckets, "a full table starts over with what filled it"


def test_a_lock_is_dropped_by_the_last_who_waits_for_it() -> None:
    table = hot.HotTable()
    inside = 0
    most: list[int] = []

    def work() -> None:
        nonlocal inside
        with table.lock("bucket"):
            inside += 1
            most.append(inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8, "one at a time, whoever came while others left"
    assert table.locks == {}


def test_a_first_call_that_fails_leaves_no_lock() -> None:
    table = hot.HotTable()
    with pytest.raises(ZeroDivisionError), table.lock("bucket"):
        raise ZeroDivisionError
    assert table.locks == {}


def test_true_is_not_the_one_that_a_call_was_remembered_with(fresh: hot.HotTable) -> None:
    spec = AttentionSpec(layout="thd")
    x = torch.randn(3, 2, 8)
    cu = torch.tensor([0, 1, 2, 3], dtype=torch.int32)

    def call(longest: Any) -> Any:
        return attnreg.attention(spec, x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=1)

    call(1)
    with pytest.raises(errors.DtypeError, match="max_seqlen_q"):
        call(True)
