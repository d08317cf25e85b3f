"""The device that these tests run on: a card, where there is one, or a stand-in for it that computes on the host."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from fx_cache.runtime.device import Readback
from tests.gpu import standin

REAL = torch.cuda.is_available()

needs_card = pytest.mark.skipif(not REAL, reason="needs a CUDA card: CUDA graphs, streams or Triton")
needs_standin = pytest.mark.skipif(REAL, reason="what it counts only the stand-in for a card tells by name")


@dataclass
class Seen:
    """What the host asked of the device.

    Attributes:
        waits: what it waited for.
        launches: what it let the device do; on a card that is not looked at.
    """

    waits: list[str] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)


def device() -> torch.device:
    """The card, or the stand-in."""
    return torch.device("cuda:0") if REAL else standin.device()


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """What happens in a block."""
    seen = Seen()
    if not REAL:
        with standin.watched() as (waits, launches):
            yield seen
        seen.waits, seen.launches = waits, launches
        return
    take = Readback.take

    def counted(self: Readback) -> list[float]:
        if self._event is not None:
            seen.waits.append("an event")  # of these the driver says nothing
        return take(self)

    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found, mock.patch.object(Readback, "take", counted):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen.waits += [str(w.message) for w in found if "synchronizing CUDA operation" in str(w.message)]


class Sent:
    """Puts values on the device; what is one object on the host is one there.

    Attributes:
        dtype: of what holds floating-point numbers; None: its own.
    """

    def __init__(self, dtype: torch.dtype | None = None, to: torch.device | None = None) -> None:
        self.dtype = dtype
        self._device = to or device()
        self._known: dict[int, tuple[Any, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        return tree_map(self._one, value)

    def _one(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self.dtype if value.is_floating_point() else None
        return self._known.setdefault(id(value), (value, value.to(self._device, dtype)))[1]


def called(compiled: nn.Module, step: Mapping[str, Any]) -> tuple[torch.Tensor, Seen]:
    """The output of one call, and what the host asked of the device meanwhile."""
    with watched() as seen:
        output = compiled(**step)[0]
    return output.clone(), seen
