"""Learns from a model's calls which inputs are denoised, and which tell the time, where its graph does not show it.

What changes is no evidence: two passes of a step change the prompt. What is denoised follows from the call before by a
scheduler's step, and moves at every step; what tells the time moves with it, one way. That has to be seen twice.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fx_cache.runtime.clock import BOTH_WAYS, MOST, SAME, Direction, Values, directions, is_counted, shown
from fx_cache.runtime.device import Origin
from fx_cache.runtime.follow import Look, helped, rests, straight, strayed
from fx_cache.runtime.identity import SMALL, StorageHold

UNKNOWN_LATENT = "which input is denoised is not known: name the request and its branch with fx_cache.session"
UNKNOWN_TIME = "which input tells the time is not known: name the request and its branch with fx_cache.session"

HISTORY = 8
"""Calls that are compared with those that come behind them: passes and requests may be mixed."""

PASSES = 64
"""Passes with a name whose last calls are known."""

PATIENCE = 64
"""Calls behind which numbers that have moved together, or rested, are taken to do so always."""

SAMPLED = 256
"""Elements that are looked at first, where different values are counted."""

LIKE = 0.05
"""How much more may be left of latents than where they follow best: parts of one step are alike, and do not follow."""

ALIKE = 0.25
"""What may be left of a latent that does not follow, where one number alone may be the time."""

TIMES = 16
"""Different values that a large tensor has at most, if it tells the time of each of its elements."""


@dataclass(frozen=True)
class Moves:
    """Numbers of the inputs that change from step to step.

    Attributes:
        latents: those that are denoised.
        schedule: the timestep, and what looks like one.
        times: those of the schedule that were seen to move: all of them, at every step.
    """

    latents: frozenset[int] = frozenset()
    schedule: frozenset[int] = frozenset()
    times: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Step:
    """What changed from one call to another one that may be its next step, and which way the time went.

    Attributes:
        left: what of the latents does not follow from that call.
        sure: whether it is one beyond doubt, if seen twice: a known time moved, or what came out made the latents.
        start: the latents of that call.
    """

    moves: Moves
    way: tuple[tuple[int, Direction], ...]
    left: float = field(compare=False)
    sure: bool = field(compare=False)
    start: Mapping[int, Look] = field(compare=False)


class Learner:
    """Compares what a model is given with the calls before, until it is clear what changes from step to step."""

    def __init__(self) -> None:
        self.moves: Moves | None = None
        self._history: deque[Call] = deque(maxlen=HISTORY)
        self._moved: frozenset[int] = frozenset()
        self._last: OrderedDict[Hashable, Call] = OrderedDict()
        self._calls = 0
        self._left: dict[Moves, float] = {}
        self._lock = threading.Lock()

    def see(self, call: Call) -> Moves | None:
        """Takes one more call; what is known then."""
        with self._lock:
            return self._see(call)

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to learn. Of several numbers that have moved together one may tell the time."""
        return self.moves is not None and (len(self.moves.times) == 1 or self._calls > PATIENCE)

    def _see(self, call: Call) -> Moves | None:
        if not self.settled:
            self._calls += 1
            for before in self._history:
                self._moved |= call.moved_since(before)
            # What only looks like a time, and has rested for so long, is guidance or the like.
            resting = call.unsure - self._moved if self._calls > HISTORY else frozenset()
            # Of a pass that somebody names, one call is a step on from the last, whatever else is called between.
            last = self._last.pop(call.of, None)
            earlier = [b for b in self._history if b is not last] + ([last] if last is not None else [])
            for before in (*self._history, *earlier):
                before.origin.reached()  # what is made of them is read here: nothing is freed under another stream
            steps = [(before, call.step_from(before, self._history, resting, self._moved)) for before in earlier]
            call.steps = [step for _, step in steps if step is not None]
            for step in call.steps:
                self._left[step.moves] = min(step.left, self._left.get(step.moves, 1.0))
            # As long as a number rests that may be the time, what moves may tell parts of one step apart.
            clear = self._calls > HISTORY or call.numbers <= self._moved
            found = {
                step.moves
                for before, step in steps
                if step is not None
                and (clear or (call.of is not None and call.of == before.of))
                and any(call.goes_on(before, first, step) for first in before.steps)
            }
            least = min(map(_count, found), default=0)
            fewest = [moves for moves in found if _count(moves) == least]
            follows = len(fewest) == 1 and self._left[fewest[0]] <= min(self._left.values()) + LIKE
            if follows and (self.moves is None or least < _count(self.moves)):
                self.moves = fewest[0]
            self._history.append(call)
            call.lock = self._lock  # what it returns is added by its own thread, on its own stream
            if call.of is not None:
                self._last[call.of] = call
            if len(self._last) > PASSES:
                self._last.popitem(last=False)
            if self.settled:
                self._history.clear()
                self._last.clear()
        return self.moves


def _count(moves: Moves) -> int:
    return len(moves.latents) + len(moves.schedule) + len(moves.times)


class Call:
    """What a model was given at one call, and returned.

    Attributes:
        steps: how it may be the next step of earlier calls.
        unsure: the inputs that are taken to tell the time because they look so.
        of: the pass that it belongs to, if somebody names it.
        lock: held while what came out is taken, and while others look at it.
    """

    def __init__(
        self,
        values: Sequence[Any],
        keys: Sequence[Hashable | None],
        *,
        latents: Collection[int] = (),
        schedule: Collection[int] = (),
        timed: Collection[int] = (),
        of: Hashable | None = None,
    ) -> None:
        """
        Args:
            values: the inputs; None for those that are not looked at.
            keys: who each of them is; None: cannot be said.
            latents: those that are known to be denoised; none: that is to be learned.
            schedule: those that are taken to tell the time.
            timed: those among them that are embedded as a time is; the others only look so.
            of: the pass that it belongs to, if somebody names it.
        """
        self.steps: list[_Step] = []
        self.of = of
        known: list[Any] = [v if k is not None else None for v, k in zip(values, keys, strict=True)]
        self._keys = list(keys)
        self._forms = [(v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else None for v in known]
        self._known = frozenset(latents)
        self._schedule = frozenset(schedule)
        self.unsure = self._schedule - frozenset(timed)
        self._hold = StorageHold(known)  # so that no other tensor has a key of these
        large = [i for i, v in enumerate(known) if _is_large_float(v) and i not in self._schedule]
        self._looks = {i: Look([values[i]]) for i in (latents or large)}
        self._times = {i for i, v in enumerate(known) if i in self._schedule or may_tell_time(v)}
        beside = {i: v for i, v in enumerate(known) if i not in self._times | self._known and _is_large_float(v)}
        self._beside = frozenset(beside)
        self._alone = len(self._times - self._known) == 1 and not any(map(_may_embed, beside.values()))
        self._extents = {i: extent for i in self._times if (extent := _extent(known[i])) is not None}
        self._fitting: frozenset[int] = frozenset()
        self.origin = Origin(known)
        self.lock = threading.Lock()

    def came_out(self, outputs: Sequence[Any]) -> None:
        """Takes what the model returned. What is denoised has the shape of an output, but for one dimension.

        Where no input has, its values alone tell.
        """
        tensors = [o for o in outputs if isinstance(o, torch.Tensor)]
        with self.lock:
            for look in self._looks.values():
                look.came_out(tensors)
            self._fitting = frozenset(i for i, look in self._looks.items() if all(size > 2 for size in look.sizes))

    @property
    def numbers(self) -> frozenset[int]:
        """The inputs that may tell the time."""
        return frozenset(self._times)

    def moved_since(self, before: Call) -> frozenset[int]:
        """The inputs that are others than at an earlier call of the same form."""
        if self._forms != before._forms:
            return frozenset()
        return frozenset(i for i, (a, b) in enumerate(zip(self._keys, before._keys, strict=True)) if a != b)

    def step_from(
        self, before: Call, history: Iterable[Call], resting: Collection[int], moving: frozenset[int]
    ) -> _Step | None:
        """What changed since an earlier call, if this may be its next step.

        Args:
            before: the earlier call.
            history: all earlier ones, among which there may be other passes of its step.
            resting: inputs that look as if they told the time, and do not.
            moving: inputs that were seen to change.
        """
        if self._forms != before._forms or self._schedule != before._schedule:
            return None
        different = self.moved_since(before)
        if self._known:
            latents = self._known
        else:
            fitting = before._fitting or self._looks.keys()
            latents = frozenset(i for i in self._looks if i in different and i in fitting)
        others = different - latents
        if not latents or not others or not others <= self._times:
            return None
        way = tuple((i, d) for i in sorted(others) if any(d := directions(before._extent(i), self._extent(i))))
        moved = frozenset(i for i, _ in way)
        # Two calls at one time are never one step apart; of a pass with a name what looks like a time may rest.
        named = self.of is not None and self.of == before.of
        known = (self._schedule & set(self._extents)) - set(resting) - (self.unsure if named else set())
        still = bool(known) and not known & moved
        if moved != others or any(BOTH_WAYS in d for _, d in way) or still:
            return None
        looks = {i: before._with_passes(i, history) for i in latents}
        left = max(self._left_of(i, look) for i, look in looks.items())
        # Windows of one step may be alike, and be numbered: then they have nothing of what came out for the one before.
        # The elements of an embedding go both ways in the end.
        plain = all(self._extent(i)[0] == self._extent(i)[1] for i in moved)
        sure = bool((named and plain) or (self._schedule - self.unsure) & moved)
        # What else changes may be an embedding of the time.
        alone = self._alone and not self._beside & moving - latents
        if left > (MOST if sure else ALIKE if alone else SAME):
            return None
        sure = sure or all(self._helped(i, look) for i, look in looks.items())
        if not (sure or alone):
            return None
        start = {i: before._looks[i].start() for i in latents if i in before._looks}
        return _Step(Moves(latents, moved | self._schedule, moved), way, left, sure, start)

    def goes_on(self, before: Call, first: _Step, step: _Step) -> bool:
        """Whether a step goes on with one before it: beyond doubt, or since the latents go on where they were going.

        Args:
            before: the call that it is a step from.
            first: how that may be the next step of an earlier one.
            step: the step.
        """
        if first != step:
            return False
        return (first.sure and step.sure) or all(self._straight(before, first, i) for i in step.moves.latents)

    def _straight(self, before: Call, first: _Step, i: int) -> bool:
        look, earlier = before._looks.get(i), first.start.get(i)
        grams = None if look is None else self._looks[i].since(look.behind(earlier))
        return grams is not None and straight(grams.tolist(), (math.isqrt(len(grams)),))

    @property
    def extents(self) -> dict[int, Values]:
        """Of all that may tell the time the least and the largest element, and how all are arranged."""
        return {i: self._extent(i) for i in self._extents}

    def _extent(self, i: int) -> Values:
        """Those of one input. On a device this waits for it, as long as nothing is known."""
        extent = self._extents[i]
        if isinstance(extent, torch.Tensor):
            extent = self._extents[i] = tuple(extent.tolist())
        return extent

    def _with_passes(self, i: int, history: Iterable[Call]) -> Look | None:
        """A latent, and what came out for it: at this call, and at others that were given the same one."""
        look = self._looks.get(i)
        same = [c for c in history if c is not self and c._forms == self._forms and c._keys[i] == self._keys[i]]
        return None if look is None else look.beside([c._looks[i] for c in same if i in c._looks])

    def _helped(self, i: int, before: Look | None) -> bool:
        """Whether a latent follows from what came out of an earlier call, and not from the latent alone."""
        grams = self._looks[i].since(before)
        return grams is not None and helped(grams.tolist(), (math.isqrt(len(grams)),))

    def _left_of(self, i: int, before: Look | None) -> float:
        """What of a latent does not follow from an earlier one; more than all of it if that cannot be, as it rests."""
        grams = self._looks[i].since(before)
        if grams is None:
            return MOST + 1.0
        numbers = grams.tolist()
        sizes = (math.isqrt(len(numbers)),)
        return MOST + 1.0 if rests(numbers, sizes) else strayed(numbers, sizes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_large_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > SMALL


def _may_embed(value: torch.Tensor) -> bool:
    """Whether an input may be an embedding of the time, which has no tokens."""
    return value.ndim == 2 or sum(size > 1 for size in value.shape[1:]) <= 1


def extent_of(value: Any) -> Values | None:
    """What `Call.extents` says of an input, if it is a number or holds some. On a device this waits for it."""
    extent = _extent(value)
    return tuple(extent.tolist()) if isinstance(extent, torch.Tensor) else extent


def _extent(value: Any) -> Values | torch.Tensor | None:
    if _is_number(value):
        return (float(value), float(value), 0.0)
    if not isinstance(value, torch.Tensor) or not is_counted(value) or not value.numel():
        return None
    extent = shown(value)
    return tuple(extent.tolist()) if extent.is_cpu else extent


def may_tell_time(value: Any) -> bool:
    """Whether an input may be a timestep: a number, few of them, integers, or a few different ones for many tokens."""
    if not isinstance(value, torch.Tensor):
        return _is_number(value)
    if not is_counted(value) or not value.is_floating_point():
        return is_counted(value)
    # One for each sample and frame or token; what has channels besides holds as many values as elements.
    listed = sum(size > 1 for size in value.shape[1:]) <= 1
    if value.numel() <= SMALL:
        return listed or has_few_values(value, TIMES)
    return value.ndim <= 2 and has_few_values(value, TIMES)


def has_few_values(value: torch.Tensor, most: int) -> bool:
    """Whether a tensor holds no more than so many different values; a few elements tell it of most tensors."""
    flat = value.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // SAMPLED)].to(torch.float64)
    return few.unique().numel() <= most and flat.to(torch.float64).unique().numel() <= most
