"""What the forwards of one compiled model show together: what comes back, and what moves from step to step.

The graphs that a forward is captured in rarely show which input is denoised: code between them hands tensors on. So
that is read off whole forwards: what is denoised has the shape of what the model returns (up to channels), and does not
rest while something else moves with the time. What moves in step with it, and is a number, is the schedule.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_cache.patterns.inputs import differs_in_channels
from fx_cache.runtime.clock import Values
from fx_cache.runtime.identity import OwnWrites, StorageHold
from fx_cache.runtime.moves import HISTORY, Call, Learner, Moves, extent_of
from fx_cache.runtime.named import named_pass

Shape = tuple[int, ...]

ROUNDED = 2**-7
"""How far two proportions may be from each other by rounding, in bfloat16."""


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
        self._lock = threading.Lock()
        self._embedded: frozenset[int] = frozenset()
        self._made_of: dict[Hashable, _MadeOf] = {}
        self._forwards = 0

    def see(self, inputs: Sequence[Any], keys: Sequence[Hashable | None], timed: Collection[int]) -> Call | None:
        """Takes notice of the inputs of a forward that begins; returns what is to be told what comes back.

        Args:
            inputs: what the user gives it.
            keys: who they are.
            timed: those of which it is known that they tell the time, by more than that they change.
        """
        with self._lock:
            return self._see(inputs, keys, timed)

    def _see(self, inputs: Sequence[Any], keys: Sequence[Hashable | None], timed: Collection[int]) -> Call | None:
        call = None
        self._forwards += 1
        if self._learned.schedule and not self.schedule:  # of what turned out not to be denoised
            self._learner = Learner()
        if not self._learner.settled:
            # Of several numbers that are embedded, or may be, any may be guidance or the like.
            known = self.embedded if len(self.embedded) == 1 and not self._unlinked else ()
            call = Call(inputs, keys, latents=self._alone, schedule=timed, timed=known, of=named_pass())
            self._learned = self._learner.see(call) or Moves()
        seen = _Seen(inputs, keys)
        for before in self._history:
            self._compare(seen, before, timed)
        self._history.append(seen)
        self._tell_apart([None if i in timed else v for i, v in enumerate(inputs)])
        return call

    def _compare(self, now: _Seen, before: _Seen, timed: Collection[int]) -> None:
        different = now.different(before)
        moving = different - set(timed)
        if different & set(timed) and moving & now.floating:
            self._resting |= now.floating - different
        self._moving |= different & set(timed)

    def tell(self, inputs: frozenset[int], embedded: bool) -> None:
        """Takes notice of inputs that a graph takes for the timestep or the like.

        Args:
            inputs: these.
            embedded: whether it embeds them as a time; else they only look so.
        """
        if not inputs <= (self._embedded if embedded else self.told):
            with self._lock:
                self.told |= inputs
                self._embedded |= inputs if embedded else frozenset()

    def embeds(self, place: Hashable, value: torch.Tensor, call: Call | None) -> None:
        """Takes notice of what a graph embeds as a time, and code between graphs has made of one of the inputs.

        Args:
            place: where in a forward a graph is given it.
            value: what it is given.
            call: of the forward's inputs, as long as something is learned from them.
        """
        given, inputs = (None, {}) if call is None else (extent_of(value), call.extents)
        with self._lock:
            made = self._made_of.setdefault(place, _MadeOf())
            made.seen = self._forwards
            if given is not None:
                made.see(given, inputs)

    @property
    def embedded(self) -> frozenset[int]:
        """The inputs that a graph embeds as a time, as they are or as code between graphs has made them."""
        return self._embedded.union(*(made_of.inputs for made_of in self._made_of.copy().values()))

    def came_back(self, inputs: Sequence[Any], shapes: Sequence[Shape]) -> None:
        """Takes notice of what a forward made of its inputs: the shapes of all tensors."""
        fit = fitting(inputs, shapes).any
        with self._lock:
            self._fit = fit if self._fit is None else self._fit & fit
            self._shapes = shapes
            self._tell_apart(inputs)

    def _tell_apart(self, inputs: Sequence[Any]) -> None:
        """Which of the inputs that fit what came back is denoised, once the others are known to rest."""
        resting = self.resting
        if self._fit is not None and not self._alone <= self._fit - resting:
            self._alone = frozenset()
        moving = [None if i in resting else v for i, v in enumerate(inputs)]
        self._alone = self._alone or fitting(moving, self._shapes).alone

    def may_come_back(self, inputs: Sequence[Any], shapes: Sequence[Shape]) -> None:
        """The same of a forward of which nothing is known but what its last graph made."""
        with self._lock:
            if self._fit is None:
                self._shapes = shapes
                self._tell_apart(inputs)

    def latents(self, shown: Collection[int] = ()) -> frozenset[int]:
        """The inputs that are denoised; none where that is not known.

        Args:
            shown: those that a graph shows to be, if any.
        """
        likely = frozenset(shown) - self.resting
        if self._fit is not None:
            likely &= self._fit
        return likely or self._alone or self._moves.latents

    @property
    def alone(self) -> frozenset[int]:
        """The inputs that fit what comes back where it is clear which of them belongs to what."""
        return self._alone

    @property
    def resting(self) -> frozenset[int]:
        """The inputs that have rested while the time, and something else, changed.

        If all that fit what comes back have, it was not the time that changed, but guidance from pass to pass: none.
        """
        return frozenset(self._resting) if self._fit is None or self._fit - self._resting else frozenset()

    @property
    def times(self) -> frozenset[int]:
        """The inputs that are known to tell the time: a graph embeds them so.

        Where none is embedded, or others were seen to tell it, those; else those that a graph takes so, or look so.
        No input, which stands for all, while it is not known of which one something is made that a graph embeds.
        """
        if self.together:
            return self._moves.times
        return frozenset() if self._unlinked else self.embedded or self.told | self._moving

    @property
    def together(self) -> bool:
        """Whether all of these move at every step, and not some of them."""
        return bool(self.schedule) and (self._unlinked or not self.embedded & self._moving)

    @property
    def _unlinked(self) -> bool:
        """Whether a graph embeds something of which it is not known from which input it is made."""
        made = list(self._made_of.copy().values())
        return any(not m.inputs for m in made if self._forwards - m.seen <= HISTORY)

    @property
    def knows_time(self) -> bool:
        """Whether it is known which inputs tell the time, by more than that they look so."""
        return bool(self.schedule or self.embedded)

    @property
    def schedule(self) -> frozenset[int]:
        """The inputs that are numbers, and change from step to step with what is denoised."""
        learned = self._moves
        return learned.schedule if learned.latents == (self._alone or learned.latents) else frozenset()

    @property
    def _moves(self) -> Moves:
        """What changes from step to step, as far as nothing else is known: no other input that fits what comes back."""
        found = self._learned
        return Moves() if found.latents & self.resting or not found.latents <= (self._fit or found.latents) else found


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
    """The inputs of one forward: who they are. It keeps none of them alive."""

    def __init__(self, inputs: Sequence[Any], keys: Sequence[Hashable | None]) -> None:
        self.floating = {i for i, v in enumerate(inputs) if _floating(v)}
        self._keys = list(keys)
        self._hold = StorageHold([v if k is not None else None for v, k in zip(inputs, keys, strict=True)])

    def different(self, before: _Seen) -> frozenset[int]:
        return frozenset(i for i, (a, b) in enumerate(zip(self._keys, before._keys, strict=True)) if a != b)


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 0


class _MadeOf:
    """Of which input something is made: the one number that rests and moves with it, in the same proportion.

    Attributes:
        inputs: that one, once it has done so twice, and as long as it does.
        seen: number of the last forward in which it was.
    """

    def __init__(self) -> None:
        self.inputs: frozenset[int] = frozenset()
        self.seen = 0
        self._last: tuple[Values, dict[int, Values]] | None = None
        self._alike: frozenset[int] | None = None
        self._moves = 0

    def see(self, value: Values, inputs: dict[int, Values]) -> None:
        """Takes notice of it, and of the numbers among the inputs, in one more forward."""
        before, then = self._last or (value, inputs)
        if 0.0 in value[:2]:
            return  # it shows no proportion
        if value == before:
            alike = {i for i, now in inputs.items() if i in then and _near(now, then[i])}
        elif _near(value, before):
            return  # that may be rounding
        else:
            alike = {i for i, now in inputs.items() if i in then and _in_proportion(value, before, now, then[i])}
            self._moves += 1
        self._last = value, inputs
        self._alike = frozenset(alike if self._alike is None else self._alike & alike)
        self.inputs = self._alike if self._moves > 1 and len(self._alike) == 1 else frozenset()


def _in_proportion(a: Values, b: Values, c: Values, d: Values) -> bool:
    """Whether least and largest element went from `b` to `a` in the proportion in which those of `d` did to `c`."""
    pairs = zip(a[:2], b[:2], c[:2], d[:2], strict=True)
    return all(x * y * z != 0 and math.isclose(w * z, x * y, rel_tol=ROUNDED) for w, x, y, z in pairs)


def _near(a: Values, b: Values) -> bool:
    """Whether the least and the largest element are the same but for rounding."""
    return all(math.isclose(x, y, rel_tol=ROUNDED) for x, y in zip(a[:2], b[:2], strict=True))
