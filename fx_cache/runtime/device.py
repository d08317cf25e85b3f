"""What the host has to do with an accelerator: what it reads and sends, what it waits for, and streams.

Numbers go through pinned memory both ways, so that the host waits in `Readback.take` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class Readback:
    """The numbers that some tensors hold: one copy for all, which begins here, and is waited for where it is taken."""

    @torch.no_grad()
    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        """
        Args:
            parts: tensors of real numbers, any shapes, on any devices.
        """
        self._event: torch.Event | None = None
        self._numbers: torch.Tensor | None = None
        if not parts:
            return
        device = device_of(parts) or parts[0].device
        flat = [to_device(p.detach(), device).to(torch.float64).reshape(-1) for p in parts]
        joined = torch.cat(flat) if len(flat) > 1 else flat[0]
        if not _pins(device):
            self._numbers = joined
            return
        self._numbers = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
        self._numbers.copy_(joined, non_blocking=True)
        self._event = torch.Event(device=device)
        self._event.record(torch.accelerator.current_stream(device))

    def take(self) -> list[float]:
        """The numbers, one tensor's after the other's; waits for the device, once."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return [] if self._numbers is None else self._numbers.tolist()


class Origin:
    """The stream on which some tensors are made, and with which their memory is freed."""

    def __init__(self, device: torch.device | None) -> None:
        """
        Args:
            device: where they lie; None: on the host.
        """
        self._stream = _current_stream(device)

    def reached(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Lets the present stream wait for what this one has to do yet; the host does not.

        Nothing of another stream may be waited for while a graph is captured; before that, everything has been.

        Args:
            tensors: what of it may be freed while the present stream works on it.
        """
        if self._stream is None:
            return
        now = _current_stream(self._stream.device)
        if now is None or now == self._stream or captured():
            return
        now.wait_stream(self._stream)
        for tensor in tensors:
            if tensor.device == now.device:
                tensor.record_stream(now)


def device_of(values: Iterable[object]) -> torch.device | None:
    """The first device that some of them lie on; None if all lie on the host, or nowhere."""
    return next((v.device for v in values if isinstance(v, torch.Tensor) and not (v.is_cpu or v.is_meta)), None)


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; if it comes from the host, the host does not wait until it is there."""
    if not value.is_cpu or not _pins(device):
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def captured() -> bool:
    """Whether what the host launches is recorded in a graph at present, instead of run: it can wait for nothing."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return False
    module: Any = torch.get_device_module(accelerator)
    if not hasattr(module, "is_current_stream_capturing"):
        return False
    # Of a build for an accelerator that this machine has not, nothing may be asked.
    return module.is_initialized() and module.is_current_stream_capturing()


def _pins(device: torch.device) -> bool:
    """Whether it is an accelerator for which memory of the host can be pinned, and events tell what has arrived."""
    accelerator = None if device.type == "cpu" else torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


def _current_stream(device: torch.device | None) -> torch.Stream | None:
    return torch.accelerator.current_stream(device) if device is not None and _pins(device) else None
