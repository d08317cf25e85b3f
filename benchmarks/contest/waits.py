"""What the host waits for, counted."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

READS = ("item", "tolist", "cpu", "__bool__", "__float__", "__int__")
WARNED, EVENT = "warned", "event"


@contextlib.contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Notes each time that the host reads a tensor, which on a GPU it has to wait for, and each other wait.

    With a GPU only tensors that lie there count as read; `WARNED` is a wait that torch warns of (such reads are among
    them), `EVENT` one for an event, which it does not warn of. Events made before are not seen.
    """
    seen: list[str] = []
    cuda = torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _reading(name, seen, cuda)))
        stack.enter_context(mock.patch.object(torch, "Event", _noting(torch.Event, seen)))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", _noting(torch.cuda.Event, seen)))
        if cuda:
            stack.enter_context(_warned(seen))
        yield seen


def _reading(name: str, seen: list[str], cuda: bool) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_cuda or not cuda:
            seen.append(name)
        return original(self, *args, **kwargs)

    return read


def _noting(kind: type, seen: list[str]) -> type:
    """A kind of event that says when it is waited for: methods of torch.Event itself cannot be replaced."""

    class Noted(kind):
        def synchronize(self) -> None:
            seen.append(EVENT)
            super().synchronize()

    return Noted


@contextlib.contextmanager
def _warned(seen: list[str]) -> Iterator[None]:
    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            seen.append(WARNED)

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
