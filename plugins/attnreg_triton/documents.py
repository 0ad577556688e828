"""Document ids as spans: for each key, the first and the last key of its document."""

from __future__ import annotations

import torch
from torch import Tensor


def spans(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(first, last), int32 [B, Skv], of integer ids [B, Skv] in any order; no device synchronisation.

    Two keys share a document exactly if they share `first`, so it also serves as the id.
    """
    ids = document_ids.to(torch.int64)
    ordered, order = torch.sort(ids, dim=1, stable=True)
    count = ids.shape[1]
    rank = torch.arange(count, device=ids.device).expand_as(ids)
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    change = ordered[:, 1:] != ordered[:, :-1]
    starts = torch.cat([edge[:, :count], change], 1)
    ends = torch.cat([change, edge[:, :count]], 1)
    if count == 0:
        return document_ids.to(torch.int32), document_ids.to(torch.int32)
    # The sort is stable, so a document's lowest and highest rank hold its first and last key.
    lowest = torch.where(starts, rank, 0).cummax(1).values
    highest = torch.where(ends, rank, count).flip(1).cummin(1).values.flip(1)
    back = torch.empty_like(order).scatter_(1, order, rank)
    first = order.gather(1, lowest).gather(1, back)
    last = order.gather(1, highest).gather(1, back)
    return first.to(torch.int32), last.to(torch.int32)
