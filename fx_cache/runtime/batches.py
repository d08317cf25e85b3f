"""Lets some samples of a batch reuse a span while the others compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_cache.ops import Branch, Handed
from fx_cache.runtime.device import to_device

LEAST = 2
"""Samples that a graph is given at least: one that was captured for any number of them holds for two or more."""


class Separation:
    """How one span of a graph is run for some samples of a batch only.

    The samples that miss are computed as a batch of their own where the graph takes fewer. That each sample is computed
    by itself is not taken on trust: at first the span is run twice, the second time with other values in the rows of
    the samples that hit, and the results of the others have to be bit for bit the same. Where they are not, or where
    the graph takes no fewer, the whole batch is computed, and each sample that misses takes its own rows.
    """

    def __init__(self, fewer: bool) -> None:
        """
        Args:
            fewer: whether the graph was captured for any number of samples.
        """
        self._fewer = fewer
        self._independent: bool | None = None

    def compute(
        self, branch: Handed, operands: Sequence[Any], misses: Sequence[int], by_sample: Sequence[bool] | None
    ) -> list[torch.Tensor]:
        """The results of the branch that computes, rows of the samples `misses` only."""
        samples = next((o.shape[0] for o, taken in zip(operands, by_sample or (), strict=False) if taken), 0)
        fewer = [*misses, *[misses[0]] * (LEAST - len(misses))]
        if by_sample is None or not self._fewer or self._independent is False or len(fewer) >= samples:
            return _rows(branch(list(operands)), misses)
        if self._independent is None:
            whole = _rows(branch(list(operands)), misses)
            others = [i if i in misses else misses[0] for i in range(samples)]
            again = _rows(branch(_taken(operands, others, by_sample)), misses)
            self._independent = all(map(torch.equal, whole, again))
            return whole
        return _rows(branch(_taken(operands, fewer, by_sample)), range(len(misses)))


@dataclass(frozen=True)
class MixedHit:
    """A decision that is not the same for all samples: those of `misses` compute, the others reuse."""

    misses: tuple[int, ...]
    separation: Separation

    def run(
        self,
        reuse: Branch,
        compute: Handed,
        operands: Sequence[Any],
        slot: Sequence[torch.Tensor],
        by_sample: tuple[bool, ...] | None,
    ) -> tuple[torch.Tensor, ...]:
        reused = reuse(*operands, *slot)
        computed = self.separation.compute(compute, operands, self.misses, by_sample)
        index = _index(self.misses, reused[0])
        return tuple(old.index_copy(0, index.to(old.device), new) for old, new in zip(reused, computed, strict=True))


def _index(rows: Sequence[int], beside: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(list(rows), device="cpu"), beside.device)


def _rows(results: Sequence[torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    index = _index(rows, results[0])
    return [r.index_select(0, index.to(r.device)) for r in results]


def _taken(operands: Sequence[Any], rows: Sequence[int], by_sample: Sequence[bool]) -> list[Any]:
    """Of the operands that have a row for each sample some rows; of the number of samples how many."""
    taken = []
    index = _index(rows, next(o for o in operands if isinstance(o, torch.Tensor)))
    for operand, apart in zip(operands, by_sample, strict=True):
        if not apart:
            taken.append(operand)
        elif isinstance(operand, torch.Tensor):
            index = index.to(operand.device)
            taken.append(_take(operand, index))
        else:
            taken.append(len(rows))
    return taken


def _take(operand: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Some rows of an operand, laid out as it is: compiled code relies on that."""
    count = index.numel()
    if operand.stride(0) == 0:
        return operand[:count]
    once = operand
    for dim in range(1, operand.ndim):
        if operand.stride(dim) == 0:
            once = once.narrow(dim, 0, 1)
    taken = torch.empty_strided((count, *once.shape[1:]), once.stride(), dtype=operand.dtype, device=operand.device)
    torch.index_select(once, 0, index, out=taken)
    return taken.expand(count, *operand.shape[1:])
