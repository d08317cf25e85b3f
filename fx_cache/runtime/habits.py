"""What the forwards of one compiled model show together: what comes back, and what moves from step to step.

The graphs that a forward is captured in rarely show which input is denoised: code between them hands tensors on. So
that is read off whole forwards: what is denoised has the shape of what the model returns (up to channels), and does not
rest while something else moves with the time. What moves in step with it, and is a number, is the schedule.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_cache.patterns.inputs import differs_in_channels
from fx_cache.runtime.clock import is_counted, shown
from fx_cache.runtime.identity import OwnWrites, StorageHold
from fx_cache.runtime.moves import HISTORY, Call, Learner, Moves, has_few_values

Shape = tuple[int, ...]

DISTINCT = 4
"""Values that a tensor holds at most where it tells the time, of all samples and tokens."""

ENOUGH = 2
"""Times that something has to move the same way with what is denoised, to be taken for the schedule."""


class Habits:
    """What is known of the inputs of a model, by their numbers.

    Attributes:
        told: those that a graph takes for the timestep or the like.
        own: those that forwards write to themselves.
        writes: what they have written.
        put: what the last one has put in the place of inputs, and who was there before.
    """

    def __init__(self) -> None:
        self.told: frozenset[int] = frozenset()
        self.own: frozenset[int] = frozenset()
        self.writes = OwnWrites()
        self.put: dict[int, tuple[StorageHold, Any]] = {}
        self._learned = Moves()
        self._learner = Learner()
        self._history: deque[_Seen] = deque(maxlen=HISTORY)
        self._fit: frozenset[int] | None = None
        self._shapes: Sequence[Shape] = ()
        self._alone: frozenset[int] = frozenset()
        self._resting: set[int] = set()
        self._moving: frozenset[int] = frozenset()
        self._count = 0
        self._lock = threading.Lock()
        self._with_latents: Counter[tuple[Hashable, ...]] = Counter()
        self._schedule: frozenset[int] = frozenset()

    def see(self, inputs: Sequence[Any], keys: Sequence[Hashable | None], timed: Collection[int]) -> None:
        """Takes notice of the inputs of a forward that begins.

        Args:
            inputs: what the user gives it.
            keys: who they are.
            timed: those of which it is known that they tell the time, by more than that they change.
        """
        with self._lock:
            self._see(inputs, keys, timed)

    def _see(self, inputs: Sequence[Any], keys: Sequence[Hashable | None], timed: Collection[int]) -> None:
        self._count += 1
        if self._learner.moves is None:
            self._learned = self._learner.see(Call(inputs, keys, schedule=timed)) or Moves()
        seen = _Seen(inputs, keys)
        for before in self._history:
            self._compare(seen, before, timed)
        self._history.append(seen)
        self._tell_apart([None if i in timed else v for i, v in enumerate(inputs)])

    def _compare(self, now: _Seen, before: _Seen, timed: Collection[int]) -> None:
        different = now.different(before)
        moving = different - set(timed)
        if different & set(timed) and moving & now.floating:
            self._resting |= now.floating - different
        numbers = sorted(different - self._alone)
        self._moving |= different & set(timed)
        # Parts of one step; as long as a number rests that may be the time, they may be that too.
        if (self.times and not self.times & different) or (timed and not self.times and self._count <= HISTORY):
            return
        if self._alone and self._alone <= different and numbers:
            ways = [now.way(before, i) for i in numbers]
            if None not in ways:
                moved = tuple(zip(numbers, ways, strict=True))
                self._with_latents[moved] += 1
                if self._with_latents[moved] >= ENOUGH:
                    self._schedule = self._schedule or frozenset(numbers)

    def came_back(self, inputs: Sequence[Any], shapes: Sequence[Shape]) -> None:
        """Takes notice of what a forward made of its inputs: the shapes of all tensors."""
        fit = fitting(inputs, shapes).any
        self._fit = fit if self._fit is None else self._fit & fit
        self._shapes = shapes
        self._tell_apart(inputs)

    def _tell_apart(self, inputs: Sequence[Any]) -> None:
        """Which of the inputs that fit what came back is denoised, once the others are known to rest."""
        if self._fit is not None and not self._alone <= self._fit - self._resting:
            self._alone = frozenset()
        moving = [None if i in self._resting else v for i, v in enumerate(inputs)]
        self._alone = self._alone or fitting(moving, self._shapes).alone

    def may_come_back(self, inputs: Sequence[Any], shapes: Sequence[Shape]) -> None:
        """The same of a forward of which nothing is known but what its last graph made."""
        if self._fit is None:
            self._shapes = shapes
            self._tell_apart(inputs)

    def latents(self, shown: Collection[int] = ()) -> frozenset[int]:
        """The inputs that are denoised; none where that is not known.

        Args:
            shown: those that a graph shows to be, if any.
        """
        likely = frozenset(shown) - self._resting
        if self._fit is not None:
            likely &= self._fit
        return likely or self._alone or self._moves.latents

    @property
    def alone(self) -> frozenset[int]:
        """The inputs that fit what comes back where it is clear which of them belongs to what."""
        return self._alone

    @property
    def resting(self) -> frozenset[int]:
        """The inputs that have rested while the time, and something else, changed."""
        return frozenset(self._resting)

    @property
    def times(self) -> frozenset[int]:
        """The inputs that are known to tell the time: a graph takes them so, or they look so and have changed."""
        return self.told | self._moving

    @property
    def schedule(self) -> frozenset[int]:
        """The inputs that are numbers, and change from step to step with what is denoised."""
        return self._schedule if self._alone else self._moves.schedule

    @property
    def _moves(self) -> Moves:
        """What changes from step to step, as far as nothing else is known: no other input that fits what comes back."""
        found = self._learned
        return Moves() if found.latents & self._resting or not found.latents <= (self._fit or found.latents) else found


@dataclass(frozen=True)
class Fitting:
    """Inputs that have the shape of something that came back.

    Attributes:
        any: all of them.
        alone: where it is clear which of them belongs to which output, those.
    """

    any: frozenset[int]
    alone: frozenset[int]


def fitting(inputs: Sequence[Any], shapes: Sequence[Shape]) -> Fitting:
    """Inputs of the shapes of some outputs; where none has that of one, those that differ from it in channels only."""
    every: set[int] = set()
    alone: set[int] = set()
    for shape in set(shapes):
        exact = {i for i, v in enumerate(inputs) if _floating(v) and tuple(v.shape) == shape}
        near = {i for i, v in enumerate(inputs) if _floating(v) and differs_in_channels(tuple(v.shape), shape)}
        found = exact or near
        every |= exact | near
        if len(found) <= (shapes.count(shape) if exact else 1):
            alone |= found
    return Fitting(frozenset(every), frozenset(alone))


class _Seen:
    """The inputs of one forward: who they are, and the values of numbers among them. It keeps none of them alive."""

    def __init__(self, inputs: Sequence[Any], keys: Sequence[Hashable | None]) -> None:
        self.floating = {i for i, v in enumerate(inputs) if _floating(v)}
        self._keys = list(keys)
        self._numbers = {i: number for i, v in enumerate(inputs) if (number := _number(v)) is not None}
        self._hold = StorageHold([v if k is not None else None for v, k in zip(inputs, keys, strict=True)])

    def different(self, before: _Seen) -> frozenset[int]:
        return frozenset(i for i, (a, b) in enumerate(zip(self._keys, before._keys, strict=True)) if a != b)

    def way(self, before: _Seen, i: int) -> tuple[int, ...] | None:
        """Which way an input has gone, if it is a number."""
        now, then = self._numbers.get(i), before._numbers.get(i)
        if now is None or then is None or len(now) != len(then):
            return None
        return tuple((a > b) - (a < b) for a, b in zip(now, then, strict=True))


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 0


def _number(value: Any) -> tuple[float, ...] | None:
    """The least and the largest value of what may tell the time, as far as the host knows it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),)
    if not isinstance(value, torch.Tensor) or not is_counted(value) or value.ndim > 2 or not value.is_cpu:
        return None
    if not value.numel() or not has_few_values(value, DISTINCT):
        return None
    least, largest, _ = shown(value).tolist()
    return least, largest
