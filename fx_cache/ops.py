"""The functions that a rewritten graph calls. Plain Python: a rewritten graph is run, not traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Branch = Callable[..., Any]
"""A part of a rewritten graph: takes tensors and integers, returns a tuple of tensors."""

Handed = Callable[[list[Any]], Any]
"""A branch that takes its operands in a list, and empties it."""


def version(tensor: Any, write: Any) -> Any:
    """`tensor` as it is behind the operation `write`; stands in no graph that runs (see `fx_cache.versions`)."""
    del write
    return tensor


class Mixed(Protocol):
    """A decision that is not the same for all samples of a batch."""

    def run(
        self,
        reuse: Branch,
        compute: Handed,
        operands: Sequence[Any],
        slot: Sequence[torch.Tensor],
        by_sample: tuple[bool, ...] | None,
    ) -> Any:
        """The results of both branches, put together by sample."""


class Measure:
    """The diff of a step, computed where a gate asks for it."""

    def __init__(
        self, compute: Branch, probe: torch.Tensor, slot: Sequence[torch.Tensor], sizes: tuple[int, ...]
    ) -> None:
        self.compute = compute
        self._probe = probe
        self._slot = slot
        self._sizes = sizes

    @property
    def operands(self) -> tuple[Any, ...]:
        """What it is computed of; of an empty slot there is none."""
        return (self._slot[0], self._probe, *self._sizes)

    def __call__(self) -> torch.Tensor:
        diff: torch.Tensor = self.compute(*self.operands)[0]
        return diff


class Gate(Protocol):
    """Decides one span at one step."""

    def __call__(
        self,
        measure: Measure,
        samples: int = 1,
        separable: bool = False,
        ranks: tuple[tuple[str, ...], torch.device] | None = None,
    ) -> bool | Mixed: ...


def check(
    gate: Gate,
    measure: Callable[..., Any],
    probe: torch.Tensor,
    slot: Sequence[torch.Tensor],
    *sizes: int,
    samples: int = 1,
    separable: bool = False,
    groups: tuple[str, ...] = (),
) -> bool | Mixed:
    """Whether this step may reuse the span.

    Args:
        gate: the policy, bound to this step and slot; it asks for the diff only where it needs it.
        measure: `residual_diff` as ``(previous, probe, *sizes) -> (diff,)``, compiled; with groups `residual_sums`.
        probe: residual of the head's blocks at this step, any shape.
        slot: the probe of the last computed step, same shape, and what was cached with it; nothing in an empty slot.
        sizes: the integers that the probe's dynamic shape is made of.
        samples: how many samples of a batch the probe's rows belong to.
        separable: whether all that the span hands on has one row for each of them.
        groups: names of the process groups whose ranks have a part of each sample; they decide together.
    """
    ranks = (groups, probe.device) if groups else None
    return gate(Measure(measure, probe, slot, sizes), samples, separable, ranks)


def cond(
    hit: bool | Mixed,
    reuse: Branch,
    compute: Handed,
    operands: list[Any],
    slot: list[torch.Tensor],
    *,
    by_sample: tuple[bool, ...] | None = None,
) -> Any:
    """Runs one of two branches over the same operands. The order of arguments is that of ``torch.cond``.

    Where `hit` is not the same for all samples, both, and puts the results together by sample. Where nothing is reused
    the slot is emptied first, so that the old state does not take up memory while the new one is computed, and the
    operands are handed over, so that each is freed where the span needs it no more.

    Args:
        hit: the decision.
        reuse: takes the operands and the tensors of the slot, returns a tuple of tensors.
        compute: takes the list of operands, which it empties, and returns as many tensors.
        operands: tensors and integers.
        slot: the state after the last computed step, or nothing.
        by_sample: which operands have one row for each sample, or are their number; None: `compute` takes no fewer.
    """
    if not isinstance(hit, bool):
        return hit.run(reuse, compute, operands, slot, by_sample)
    if hit:
        return reuse(*operands, *slot)
    slot.clear()
    return compute(operands)


class Keep(Protocol):
    """Keeps what one branch of a request computes once."""

    def __call__(self, compute: Branch, operands: tuple[Any, ...], told_by: tuple[int, ...]) -> tuple[Any, ...]: ...


def once(keep: Keep, compute: Branch, operands: tuple[Any, ...], *, told_by: tuple[int, ...]) -> tuple[Any, ...]:
    """What `compute` makes of the operands, computed at the first step and whenever they are others.

    Args:
        keep: what it was computed with, and what came of it.
        compute: takes the operands, returns a tuple of tensors; nobody writes to them.
        operands: tensors and integers.
        told_by: which of them tell whether they are others; the rest are weights.
    """
    return keep(compute, operands, told_by)


def residual_diff(previous: Any, probe: Any, samples: Any, ndim: int) -> Any:
    """``mean|previous - probe| / mean|previous|`` of each sample; of a batch of one as cache-dit and FBCache have it.

    Args:
        previous: tensor of `ndim` dimensions; dim 0 holds the same number of rows for each sample.
        probe: the same.
        samples: their number.
        ndim: number of dimensions.

    Returns:
        Tensor of shape [samples].
    """

    def mean(x: Any) -> Any:
        return x.abs().unflatten(0, (samples, -1)).mean(tuple(range(1, ndim + 1)))

    return mean(previous - probe) / mean(previous)


def residual_sums(previous: Any, probe: Any, samples: Any, ndim: int) -> Any:
    """The two sums that `residual_diff` is made of, of one rank's part of a probe.

    Returns:
        Tensor of shape [2, samples]: ``sum|previous - probe|`` and ``sum|previous|`` in float32.
    """

    def total(x: Any) -> Any:
        return x.abs().float().unflatten(0, (samples, -1)).sum(tuple(range(1, ndim + 1))).unsqueeze(0)

    return torch.cat((total(previous - probe), total(previous)))
