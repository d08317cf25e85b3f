"""How tensors lie in memory, which what is given back from a cache has to keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from fx_cache.overlap import extent, overlap

PartOf = tuple[int, torch.Size, tuple[int, ...], int]
"""A tensor, by number, and of a part of it size, strides, and where it begins, counted from that."""


@dataclass(frozen=True)
class ViewOf:
    """How a tensor lies in the memory of another one.

    Attributes:
        strides: of the other one.
        shape: of the tensor.
        view: its strides, and where it begins, counted from where the other one does.
        dtype: of the tensor.
    """

    strides: tuple[int, ...]
    shape: torch.Size
    view: tuple[tuple[int, ...], int]
    dtype: torch.dtype

    @classmethod
    def made(cls, of: torch.Tensor, part: torch.Tensor) -> ViewOf | None:
        """How one lies in the memory of the other; None if it does not."""
        if of.untyped_storage()._cdata != part.untyped_storage()._cdata:
            return None
        begin = int(part.storage_offset() - of.storage_offset())
        return cls(of.stride(), part.shape, (part.stride(), begin), part.dtype)

    def of(self, value: torch.Tensor) -> torch.Tensor | None:
        """The same view of another tensor; None where that lies otherwise."""
        strides, begin = self.view
        reach = begin + 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        if value.stride() != self.strides or value.dtype != self.dtype or begin < 0 or reach > extent(value):
            return None
        return value.as_strided(self.shape, strides, value.storage_offset() + begin)


def parts_of(
    outputs: Mapping[int, torch.Tensor], streams: Collection[int], anew: Collection[int]
) -> tuple[dict[int, PartOf], bool]:
    """Which outputs of a call are parts of others: whoever writes to the one writes to the other.

    Args:
        outputs: what the call made, by number.
        streams: numbers of those that are streams: nothing that they are a part of is given back.
        anew: numbers of those that are made anew.

    Returns:
        What each such output is a part of. And whether others share memory.
    """
    found: dict[int, PartOf] = {}
    torn = False
    whole = sorted(outputs, key=lambda k: (k not in streams, -extent(outputs[k]), k))
    for n, k in enumerate(whole):
        part = outputs[k]
        for of in (w for w in whole[:n] if w not in found and _share(outputs[w], part)):
            begin = int(part.storage_offset() - outputs[of].storage_offset())
            within = begin >= 0 and begin + extent(part) <= extent(outputs[of]) and part.dtype == outputs[of].dtype
            if {k, of} <= {*anew}:
                continue
            if k in found or not within or k in streams or k in anew or of in anew:
                torn = True
            else:
                found[k] = of, part.shape, part.stride(), begin
    return found, torn


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may have an element in common."""
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and a.numel() > 0 and b.numel() > 0 and overlap(a, b)


def laid_out(value: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The same numbers with other strides: on them it hangs which graph is called next."""
    if value.stride() == tuple(strides):
        return value
    length = 1 + sum((n - 1) * s for n, s in zip(value.shape, strides, strict=True)) if value.numel() else 0
    made = value.new_empty(length).as_strided(value.shape, strides)
    if all(n == 1 or s for n, s in zip(value.shape, strides, strict=True)):
        return made.copy_(value)
    once = tuple(slice(None) if s else slice(0, 1) for s in strides)
    made[once].copy_(value[once])
    return made


def copied(value: torch.Tensor) -> torch.Tensor:
    """The same numbers with the same strides."""
    return laid_out(value.clone(), value.stride())
