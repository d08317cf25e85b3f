"""Learns from a model's calls which inputs are denoised, and which tell the time, where its graph does not show it.

What changes is no evidence: two passes of a step change the prompt. What is denoised follows from the call before by a
scheduler's step, and moves at every step; what tells the time moves with it, one way. That has to be seen twice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fx_cache.runtime.clock import BOTH_WAYS, MOST, Direction, Values, directions, is_counted, shown
from fx_cache.runtime.follow import Look, strayed
from fx_cache.runtime.identity import SMALL, StorageHold

UNKNOWN_LATENT = "which input is denoised is not known: name the request and its branch with fx_cache.session"

HISTORY = 8
"""Calls that are compared with those that come behind them: passes and requests may be mixed."""

SAMPLED = 256
"""Elements that are looked at first, where different values are counted."""

LIKE = 0.05
"""How much more may be left of latents than where they follow best: parts of one step are alike, and do not follow."""

TIMES = 16
"""Different values that a large tensor has at most, if it tells the time of each of its elements."""


@dataclass(frozen=True)
class Moves:
    """Numbers of the inputs that change from step to step: those that are denoised, and the timestep and the like."""

    latents: frozenset[int] = frozenset()
    schedule: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Step:
    """What changed from one call to another one that may be its next step, and which way the time went.

    Attributes:
        left: what of the latents does not follow from that call.
    """

    moves: Moves
    way: tuple[tuple[int, Direction], ...]
    left: float = field(compare=False)


class Learner:
    """Compares what a model is given with the calls before, until it is clear what changes from step to step."""

    def __init__(self) -> None:
        self.moves: Moves | None = None
        self._history: deque[Call] = deque(maxlen=HISTORY)
        self._moved: frozenset[int] = frozenset()
        self._calls = 0
        self._left: dict[Moves, float] = {}
        self._lock = threading.Lock()

    def see(self, call: Call) -> Moves | None:
        """Takes one more call; what is known then."""
        with self._lock:
            return self._see(call)

    def _see(self, call: Call) -> Moves | None:
        if self.moves is None:
            self._calls += 1
            for before in self._history:
                self._moved |= call.moved_since(before)
            call.steps = [(before, step) for before in self._history if (step := call.step_from(before)) is not None]
            for _, step in call.steps:
                self._left[step.moves] = min(step.left, self._left.get(step.moves, 1.0))
            found = {step.moves for before, step in call.steps if any(step == s for _, s in before.steps)}
            least = min(map(_count, found), default=0)
            fewest = [moves for moves in found if _count(moves) == least]
            # As long as a number rests that may be the time, what moves may tell parts of one step apart.
            clear = self._calls > HISTORY or call.numbers <= self._moved
            follows = len(fewest) == 1 and self._left[fewest[0]] <= min(self._left.values()) + LIKE
            self.moves = fewest[0] if clear and follows else None
            self._history.append(call)
            if self.moves is not None:
                self._history.clear()
        return self.moves


def _count(moves: Moves) -> int:
    return len(moves.latents) + len(moves.schedule)


class Call:
    """What a model was given at one call, and returned.

    Attributes:
        steps: earlier calls whose next step this one may be.
    """

    def __init__(
        self,
        values: Sequence[Any],
        keys: Sequence[Hashable | None],
        *,
        latents: Collection[int] = (),
        schedule: Collection[int] = (),
    ) -> None:
        """
        Args:
            values: the inputs; None for those that are not looked at.
            keys: who each of them is; None: cannot be said.
            latents: those that are known to be denoised; none: that is to be learned.
            schedule: those that are known to tell the time.
        """
        self.steps: list[tuple[Call, _Step]] = []
        known = [v if k is not None else None for v, k in zip(values, keys, strict=True)]
        self._keys = list(keys)
        self._forms = [(v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else None for v in known]
        self._known = frozenset(latents)
        self._schedule = frozenset(schedule)
        self._hold = StorageHold(known)  # so that no other tensor has a key of these
        large = [i for i, v in enumerate(known) if _is_large_float(v) and i not in self._schedule]
        self._looks = {i: Look([values[i]]) for i in (latents or large)}
        self._times = {i for i, v in enumerate(known) if i in self._schedule or _may_tell_time(v)}
        self._extents = {i: extent for i in self._times if (extent := _extent(known[i])) is not None}
        self._fitting: frozenset[int] = frozenset()

    def came_out(self, outputs: Sequence[Any]) -> None:
        """Takes what the model returned. What is denoised has the shape of an output, but for one dimension.

        Where no input has, its values alone tell.
        """
        tensors = [o for o in outputs if isinstance(o, torch.Tensor)]
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

    def step_from(self, before: Call) -> _Step | None:
        """What changed since an earlier call, if this may be its next step."""
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
        # Two calls at one time are never one step apart.
        known = self._schedule & set(self._extents)
        still = bool(known) and not known & moved
        if moved != others or any(BOTH_WAYS in d for _, d in way) or still:
            return None
        left = max(self._left_of(i, before) for i in latents)
        return None if left > MOST else _Step(Moves(latents, moved | self._schedule), way, left)

    def _extent(self, i: int) -> Values:
        """The least and the largest element of an input. On a device this waits for it, as long as nothing is known."""
        extent = self._extents[i]
        if isinstance(extent, torch.Tensor):
            extent = self._extents[i] = tuple(extent.tolist())
        return extent

    def _left_of(self, i: int, before: Call) -> float:
        grams = self._looks[i].since(before._looks[i])
        return MOST + 1.0 if grams is None else strayed(grams.tolist(), before._looks[i].sizes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_large_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > SMALL


def _extent(value: Any) -> Values | torch.Tensor | None:
    if _is_number(value):
        return (float(value), float(value), 0.0)
    if not isinstance(value, torch.Tensor) or not is_counted(value) or not value.numel():
        return None
    extent = shown(value)
    return tuple(extent.tolist()) if extent.is_cpu else extent


def _may_tell_time(value: Any) -> bool:
    """Whether an input may be a timestep: a number, few of them, integers, or a few different ones for many tokens."""
    if not isinstance(value, torch.Tensor):
        return _is_number(value)
    if value.numel() <= SMALL or not value.is_floating_point():
        return is_counted(value)
    return is_counted(value) and value.ndim <= 2 and has_few_values(value, TIMES)


def has_few_values(value: torch.Tensor, most: int) -> bool:
    """Whether a tensor holds no more than so many different values; a few elements tell it of most tensors."""
    flat = value.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // SAMPLED)].to(torch.float64)
    return few.unique().numel() <= most and flat.to(torch.float64).unique().numel() <= most
