"""Tells from the schedule inputs (timestep, sigma, guidance) whether a call goes on with a request."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch


class Move(Enum):
    """How a call's schedule values follow those of the call before."""

    START = "first call"
    NEXT = "one step on"
    UNSURE = "one step on, in a direction that this request has not gone before"
    EITHER = "one step on for this request, and for the one that it interrupted"
    REPEAT = "same timestep again"
    BACK = "timestep went back"


Direction = tuple[int, ...]

LEAP = 1.5
"""How much longer than the step before a step is that looks as if another request went on."""


class Clock:
    """The schedule of one branch.

    A request moves its values one way: those that move keep moving in their direction, those that rest keep resting.
    Anything else is the start of another request.

    Attributes:
        last: the values of the last call.
        left: those at which the request before was left; it may be under way still, and come back.
        direction: which way the values move.
    """

    def __init__(self) -> None:
        self.last: tuple[float, ...] | None = None
        self.left: tuple[float, ...] | None = None
        self.direction: Direction | None = None
        self._stride: tuple[float, ...] = ()
        self._against: Direction | None = None

    def move(self, values: tuple[float, ...], known: Direction | None) -> Move:
        """Takes the values of a call.

        Args:
            values: the schedule values of this call.
            known: the direction that earlier requests of this graph had, if any.
        """
        move = self.preview(values, known)
        # Against the way that earlier requests went: another request, or the second step of one that goes the other
        # way; then the next step shows it.
        self._against = self._step(values) if move is Move.BACK and self.direction is None else None
        if move in (Move.NEXT, Move.UNSURE):
            self.direction = self._step(values)
        elif move in (Move.START, Move.BACK):
            self.direction, self.left = None, self.last
        before = values if self.last is None or move in (Move.START, Move.BACK) else self.last
        self._stride = tuple(abs(a - b) for a, b in zip(values, before, strict=True))
        self.last = values
        return move

    def preview(self, values: tuple[float, ...], known: Direction | None) -> Move:
        """What `move` would say."""
        if self.last is None or len(self.last) != len(values):
            return Move.START
        step = self._step(values)
        if not any(step):
            return Move.REPEAT
        expected = self.direction or known
        if expected and step not in (expected, self._against):
            return Move.BACK
        if self._passes(step, values):
            return Move.EITHER
        return Move.UNSURE if self.direction is None else Move.NEXT

    def _passes(self, direction: Direction, values: tuple[float, ...]) -> bool:
        """Whether the request before, where it was left, lies between the last call and this one, in a leap."""
        if self.left is None or self.last is None or len(self.left) != len(values):
            return False
        for d, last, left, now, stride in zip(direction, self.last, self.left, values, self._stride, strict=True):
            leaps = not stride or abs(now - last) >= LEAP * stride
            if d and not (leaps and d * last < d * left < d * now):
                return False
        return True

    def _step(self, values: tuple[float, ...]) -> Direction:
        assert self.last is not None
        return tuple((now > before) - (now < before) for now, before in zip(values, self.last, strict=True))


def read_schedule(inputs: Sequence[torch.Tensor]) -> tuple[float, ...] | torch.Tensor:
    """The schedule values of a call: as numbers where they lie on the host, else as a tensor that is read later.

    Of an input with several elements (a timestep for each sample or token) the least and the largest count.
    Values on a device come as one float64 tensor of shape [n], so that no synchronisation happens here.
    """
    if all(t.numel() == 1 and t.is_cpu for t in inputs):
        return tuple(float(v) for t in inputs for v in t.reshape(-1).tolist())
    flat = [t.detach().reshape(-1) for t in inputs if t.numel()]
    parts = [torch.stack(t.aminmax()) if t.numel() > 1 else t for t in flat]
    if all(p.is_cpu for p in parts):
        return tuple(float(v) for p in parts for v in p.tolist())
    device = next(p.device for p in parts if not p.is_cpu)
    return torch.cat([p.to(device, torch.float64) for p in parts])
