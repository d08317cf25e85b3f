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
        if captured():
            raise RuntimeError("a graph is captured: the device cannot be waited for")  # before the device is touched
        device = device_of(parts) or parts[0].device
        flat = [to_device(p.detach(), device).to(torch.float64).reshape(-1) for p in parts]
        joined = torch.cat(flat) if len(flat) > 1 else flat[0]
        if not _pins(device):
            self._numbers = joined
            return
        self._numbers = torch.empty(joined.shape, dtype=joined.dtype, device="cpu", pin_memory=True)
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
    """The streams on which some tensors are made, and with which their memory is freed: one for each device."""

    def __init__(self, values: Iterable[object] = ()) -> None:
        """
        Args:
            values: these tensors, made on the present streams; what is no tensor, or lies on the host, has none.
        """
        known = () if torch.accelerator.current_accelerator() is None else filter(_pins, _devices_of(values))
        self._streams = [torch.accelerator.current_stream(device) for device in known]

    def reached(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Lets the present stream wait for what this one has to do yet; the host does not.

        Nothing of another stream may be waited for while a graph is captured; before that, everything has been.

        Args:
            tensors: what of it may be freed while the present stream works on it.
        """
        others = []
        for stream in self._streams:
            now = torch.accelerator.current_stream(stream.device)
            if now != stream:
                others.append((now, stream))
        if not others or captured():
            return
        for now, stream in others:
            now.wait_stream(stream)
        streams = {now.device: now for now, _ in others}
        for tensor in tensors:
            if tensor.device in streams:
                tensor.record_stream(streams[tensor.device])


def device_of(values: Iterable[object]) -> torch.device | None:
    """The first device that some of them lie on; None if all lie on the host, or nowhere."""
    return next(iter(_devices_of(values)), None)


def on_host(value: Any) -> torch.Tensor:
    """A tensor as it is, and a number as a tensor of the host, whatever the default device is."""
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; if it comes from the host, the host does not wait until it is there."""
    if not value.is_cpu or not _pins(device):
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def captured() -> bool:
    """Whether what the host launches is recorded in a graph at present, instead of run: it can wait for nothing."""
    accelerator = torch.accelerator.current_accelerator()
    module: Any = None if accelerator is None else getattr(torch, accelerator.type, None)
    if not hasattr(module, "is_current_stream_capturing"):
        return False
    # Of a build for an accelerator that this machine has not, nothing may be asked.
    ready = not hasattr(module, "is_initialized") or module.is_initialized()
    return bool(ready and module.is_current_stream_capturing())


def _pins(device: torch.device) -> bool:
    """Whether it is an accelerator for which memory of the host can be pinned, and events tell what has arrived."""
    accelerator = None if device.type == "cpu" else torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


def _devices_of(values: Iterable[object]) -> dict[torch.device, None]:
    return {v.device: None for v in values if isinstance(v, torch.Tensor) and not (v.is_cpu or v.is_meta)}
