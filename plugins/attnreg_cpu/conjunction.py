"""Read a mask as a conjunction of what the kernels bound by intervals; anything else goes through a block layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnreg import masks

NO_BOUND = -1


@dataclass(frozen=True)
class Conjunction:
    """A mask that lets each query see one interval of keys, cut further by documents and a dense tensor.

    causal: j < max(prefix, p + 1); prefix_tensor: the prefix comes from `prefix_lengths`. window_left, window_right:
    NO_BOUND or a distance. chunk: 0 or the chunk size. padding, document, dense: the call's tensors say more.
    """

    causal: bool = False
    prefix: int = 0
    prefix_tensor: bool = False
    window_left: int = NO_BOUND
    window_right: int = NO_BOUND
    chunk: int = 0
    padding: bool = False
    document: bool = False
    dense: bool = False


def read_conjunction(mask: masks.Mask) -> Conjunction | None:
    """The mask as a Conjunction, or None: a union, a complement, dilation, global tokens, code, two chunk sizes."""
    found: Conjunction | None = Conjunction()
    for part in mask.parts() if isinstance(mask, masks.And) else (mask,):
        found = None if found is None else _add(found, part)
    return found


def _add(found: Conjunction, part: masks.Mask) -> Conjunction | None:
    match part:
        case masks.Full():
            return found
        case masks.Causal():
            return replace(found, causal=True, prefix=0, prefix_tensor=False)
        case masks.PrefixLM(length=length):
            return _add_prefix(found, length)
        case masks.SlidingWindow(left=left, right=right):
            return replace(
                found, window_left=_nearer(found.window_left, left), window_right=_nearer(found.window_right, right)
            )
        case masks.Chunked(size=size):
            return replace(found, chunk=size) if found.chunk in (0, size) else None
        case masks.Padding():
            return replace(found, padding=True)
        case masks.Document():
            return replace(found, document=True)
        case masks.Dense():
            return replace(found, dense=True)
    return None


def _add_prefix(found: Conjunction, length: int | None) -> Conjunction | None:
    """Of two prefixes only the shorter counts; a fixed one beside one that the call gives cannot be told in advance."""
    if found.causal and not found.prefix_tensor and found.prefix == 0:
        return found
    if not found.causal:
        return replace(found, causal=True, prefix=length or 0, prefix_tensor=length is None)
    if length is None or found.prefix_tensor:
        return found if found.prefix_tensor and length is None else None
    return replace(found, prefix=min(found.prefix, length))


def _nearer(bound: int, distance: int) -> int:
    return distance if bound == NO_BOUND else min(bound, distance)
