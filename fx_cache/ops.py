"""The functions that a rewritten graph calls. Plain Python: a rewritten graph is run, not traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Gate(Protocol):
    """Decides one span at one step."""

    def __call__(self, measure: Callable[[], torch.Tensor]) -> bool: ...


def check(
    gate: Gate, measure: Callable[..., Any], probe: torch.Tensor, previous: torch.Tensor | None, *sizes: int
) -> bool:
    """Whether this step may reuse the span.

    Args:
        gate: the policy, bound to this step and slot; it asks for the diff only where it needs it.
        measure: ``(previous, probe, *sizes) -> (diff,)``, compiled; diff is 0-d,
            ``mean|previous - probe| / mean|previous|``.
        probe: residual of the head's blocks at this step, any shape.
        previous: the probe of the last computed step, same shape; None in an empty slot.
        sizes: the integers that the probe's dynamic shape is made of.
    """
    return gate(lambda: measure(previous, probe, *sizes)[0])


def cond(hit: bool, reuse: Callable[..., Any], compute: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """Runs one of two branches over the same operands. The order of arguments is that of ``torch.cond``."""
    return reuse(*operands) if hit else compute(*operands)
