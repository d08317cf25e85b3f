"""Tells whether a call goes on with a request: from its timestep, its latent, and what is said about it.

Whatever a call does not show beyond doubt, it does not show: then the step computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch

from fx_cache.runtime.follow import Look, helped, rests, straight, strayed


class Move(Enum):
    """How a call follows the one before it."""

    START = "first call of a request"
    FIRST = "one step on, for the first time"
    NEXT = "one step on, as before"
    EITHER = "one step on for this request, and for the one that it interrupted"
    REPEAT = "same time again"
    LATE = "one step on for a request whose first call was the one before"


FIRST_MOVE = "which way the timestep goes is not known yet"
REPEATED = "same timestep twice: which request it belongs to is not known"
RESTED = "same latent twice: which pass it belongs to is not known"
STEP_REPEATED = "same step twice"
EITHER = "may belong to the request that was left before this one began"

LEAP = 1.5
"""How much longer than the step before a step is that looks as if another request went on."""

FLOOR = 0.1
"""What of a latent may be left over at any step (see `fx_cache.runtime.follow`)."""

FACTOR = 3.0
"""How much more than at the request's other steps may be left over at one."""

MOST = 0.9
"""What is left over of a latent that has nothing to do with the one before; less where a sampler adds much noise."""

SAME = 0.02
"""What is left over, at most, of a latent that is a multiple of another one, in low precision."""

ROUNDING = 1e-6
"""What is left over by rounding alone."""

Values = tuple[float, ...]
Direction = tuple[int, ...]

PARTS = 3
"""Numbers that a schedule input is known by."""

FEW = 64
"""Elements of a schedule input on a device up to which all of them are read."""

BOTH_WAYS = 2
"""The direction of an input one part of which rises while another one falls."""


@dataclass(frozen=True)
class Sign:
    """What one call shows of its place in a request.

    Attributes:
        values: of each schedule input (timestep, sigma, guidance) the least and the largest element, and a number for
            how all are arranged; while some lie on a device, for each input these or a tensor (`read_schedule`).
        grams: what tells whether its latents follow from the call before (`Look.since`); a tensor while it lies on a
            device, None: nothing does.
        sizes: what that is made of.
        times: numbers of the schedule inputs that are known to tell the time, beside others; none: that is not known.
        together: whether all of these move at every step, and not some of them.
        path: the same as `grams` of the latents of the two calls before, where it may be asked for.
        back: the same as `grams` of each latent that the request may have begun with.
        look: what is to be remembered of its latents, or None.
        said: number of the step as somebody gives it, or None.
        named: whether somebody says to which request the call belongs.
        apart: whether somebody says to which pass of the request it belongs.
        begins: whether it is known to be the first call of a request.
        counted: whether it may be, as far as the calls of its pass were counted.
        renewed: whether its conditioning is another one than at the last call of its program that showed it; only asked
            of a branch that is named.
        step: number of the step where the caller counts; then nothing else is looked at.
    """

    values: Values | list[Values | torch.Tensor] = ()
    grams: tuple[float, ...] | torch.Tensor | None = None
    sizes: tuple[int, ...] = ()
    said: int | None = None
    named: bool = False
    apart: bool = False
    begins: bool = False
    counted: bool = False
    renewed: bool = False
    step: int | None = None
    times: tuple[int, ...] = ()
    together: bool = False
    path: tuple[float, ...] | torch.Tensor | None = None
    back: tuple[tuple[float, ...] | torch.Tensor, ...] = ()
    look: Look | None = None

    @property
    def late(self) -> list[torch.Tensor]:
        """What of it lies on a device."""
        values = self.values if isinstance(self.values, list) else ()
        return [part for part in (*values, self.grams, self.path, *self.back) if isinstance(part, torch.Tensor)]

    def read(self, numbers: Iterator[float]) -> Sign:
        """The same with what lies on a device as numbers, which come in the order of `late`."""

        def host(part: Any) -> Any:
            return tuple(next(numbers) for _ in range(part.numel())) if isinstance(part, torch.Tensor) else part

        values = self.values
        if isinstance(values, list):
            values = tuple(v for p in values for v in (_known_by(p, host(p)) if isinstance(p, torch.Tensor) else p))
        grams, path = host(self.grams), host(self.path)
        return replace(self, values=values, grams=grams, path=path, back=tuple(map(host, self.back)))

    @cached_property
    def strayed(self) -> float | None:
        """The part of the latent that does not follow from the call before; None: unknown."""
        assert not isinstance(self.grams, torch.Tensor)
        return None if self.grams is None else strayed(self.grams, self.sizes)

    @cached_property
    def rests(self) -> bool:
        """Whether its latents are those of the call before."""
        assert not isinstance(self.grams, torch.Tensor)
        return self.grams is not None and rests(self.grams, self.sizes)

    @cached_property
    def helped(self) -> bool:
        """Whether its latents follow from what came out of the call before, and not from its latents alone."""
        assert not isinstance(self.grams, torch.Tensor)
        return self.grams is not None and helped(self.grams, self.sizes)

    @cached_property
    def straight(self) -> bool:
        """Whether its latents go on in the direction in which those of the call before have come."""
        assert not isinstance(self.path, torch.Tensor)
        return self.path is not None and straight(self.path, [3] * (len(self.path) // 9))

    @cached_property
    def apart_from_start(self) -> float | None:
        """The part of the latent that is not a multiple of one that the request began with; None: unknown."""
        found = [strayed(b, [2] * (len(b) // 4)) for b in self.back if not isinstance(b, torch.Tensor)]
        return min(found, default=None)


@dataclass
class Clock:
    """Where one branch is in its request. `move` takes its calls, one after another.

    A request moves its schedule one way: inputs that move keep moving in their direction, those that rest keep
    resting. Its latents follow from each other. One move is no evidence of either: another request may have begun.

    Attributes:
        doubt: why the present step computes; None: its place in the request is certain.
        comes_late: whether its first move is no evidence, whatever is said: its first call may be a later step of a
            request that other clocks know of, or of one that was given up. What time has done before is not known here.
    """

    doubt: str | None = None
    comes_late: bool = False
    _last: Values | None = None
    _left: Values | None = None
    _said: int | None = None
    _direction: Direction | None = None
    _formerly: Direction | None = None
    _stride: Values = ()
    _moves: int = 0
    _strayed: list[float] = field(default_factory=list)
    _tried: bool = False
    _lasting: str | None = None
    _moved: set[frozenset[int]] = field(default_factory=set)
    _helped: bool = False

    def move(self, sign: Sign) -> Move:
        """Takes a call."""
        move = self.preview(sign)
        values, strays = _values(sign), sign.strayed
        still = self._still(sign)
        again = still or self._again(sign)
        before = self._last
        self._moved = self._moved_with(sign)
        self.doubt = None
        if move is Move.REPEAT and self._moves == 0 and not sign.apart:
            move = Move.START  # most likely the call before was a try
        if move is Move.START:
            self._formerly = (None if self._unproven else self._direction) or self._formerly
            # Behind two calls at one time, one that moves may go on with either.
            self._moves, self._direction, self._strayed, self._lasting = 0, None, [], None
            self._tried, self._left = again, before
            # Where more is known of the time than before, what it has done until now is not.
            self.comes_late = self.comes_late if before is None else len(before) != len(values)
        elif move is Move.REPEAT:
            repeated = STEP_REPEATED if self._again(sign) else REPEATED if values and values == before else RESTED
            self.doubt = repeated
            if not sign.apart:
                self._lasting = repeated
        else:
            assert before is not None
            if move is Move.LATE:
                self._moves, self._strayed, self._lasting, self._tried = 0, [], None, False
            if move is Move.EITHER:
                self._lasting = EITHER
            if not still:
                self._direction = directions(before, values)
            self._moves += 1
            self._strayed += [] if strays is None else [strays]
            if move in (Move.FIRST, Move.LATE):
                self.doubt = FIRST_MOVE
        self.doubt = self.doubt or self._lasting
        self._stride = tuple(abs(a - b) for a, b in zip(values, before, strict=True)) if move in _ON and before else ()
        self._last, self._said, self._helped = values, sign.said, sign.helped
        return move

    def preview(self, sign: Sign) -> Move:
        """What `move` would say."""
        values = _values(sign)
        if sign.begins or self._last is None or len(self._last) != len(values):
            return Move.START
        if sign.said is not None and self._said is not None and sign.said < self._said:
            return Move.START
        if not sign.apart and (self._strays(sign) or self._starts_over(sign)):
            return Move.START
        if self._again(sign):
            return Move.REPEAT
        if self._still(sign):
            return self._again_at(sign) if sign.apart else Move.REPEAT
        step = directions(self._last, values)
        if BOTH_WAYS in step or (sign.apart and sign.renewed and self._turns(step) and not self._ahead(sign)):
            return Move.START
        if self._direction is not None and step != self._direction:
            return Move.LATE if self._unproven else Move.START
        if self._unproven and not sign.apart and self._strayed_before(sign.strayed):
            return Move.LATE
        several = len(self._moved_with(sign)) > 1
        sure = sign.apart or self._ahead(sign) or (not several and (self._tells(sign) or self._goes_on(sign)))
        if not sure and self._moves:
            return Move.LATE if self._unproven else Move.START
        if not sign.named and self._passes(step, values):
            return Move.EITHER
        return Move.FIRST if self._moves == 0 and not (sure and self._trusts(sign, step)) else Move.NEXT

    def begins(self, sign: Sign) -> bool:
        """Whether a call of another pass begins a request, as its time says beside the last call of this one.

        A number that rests in this pass may be another one in that: guidance, the place of a window.
        """
        values = _values(sign)
        if sign.begins or self._last is None or len(self._last) != len(values):
            return True
        if sign.said is not None and self._said is not None and sign.said < self._said:
            return True
        if self._again(sign):
            return False
        step = directions(self._last, values)
        if self._direction is None:
            return BOTH_WAYS in step and not any(self._resting(sign).values())
        return any(going and goes not in (0, going) for going, goes in zip(self._direction, step, strict=True))

    def goes_back(self, sign: Sign) -> bool:
        """Whether time turns, which was seen to go one way: that shows beyond doubt that a request begins."""
        values = _values(sign)
        if self._last is None or self._direction is None or len(self._last) != len(values):
            return False
        step = directions(self._last, values)
        return any(going * goes < 0 for going, goes in zip(self._direction, step, strict=True))

    def may_go_on(self, sign: Sign) -> bool:
        """Whether a call of another pass, or of another program, may be a later step of this one's request."""
        values = _values(sign)
        if self._last is None or sign.begins:
            return False
        return len(self._last) != len(values) or (self._last != values and not self.begins(sign))

    @property
    def first(self) -> bool:
        """Whether it has taken no call yet."""
        return self._last is None

    @property
    def at(self) -> tuple[Values | None, int | None]:
        """What its last call showed of the time."""
        return self._last, self._said

    @property
    def moves(self) -> int:
        """How many of the request's calls went on in time."""
        return self._moves

    @property
    def tried(self) -> bool:
        """Whether the call before the request's first one was at the same time: the request may have begun with it."""
        return self._tried and self._moves == 0

    @property
    def puzzled(self) -> bool:
        """Whether numbers that may tell the time were seen to move apart: which of them does is not known."""
        return len(self._moved) > 1

    @property
    def doubts(self) -> bool:
        """Whether the rest of the request computes."""
        return self._lasting is not None

    @property
    def _unproven(self) -> bool:
        """Whether the call before was the first move, and computed: that it may just as well have begun a request."""
        return self._moves == 1 and self.doubt is not None

    def _trusts(self, sign: Sign, step: Direction) -> bool:
        """Whether what is said leaves no doubt about a first move; where two inputs move, it may be a pass.

        A call that comes late, or turns, leaves one whatever is said, but for a step that is counted.
        """
        if (self.comes_late or self._turns(step)) and not self._ahead(sign):
            return False
        said = sign.named or self._ahead(sign)
        return sign.apart or (said and not self._tried and sum(map(bool, step)) <= 1)

    def _again_at(self, sign: Sign) -> Move:
        """How a call of a named pass goes on at the time of the call before: the same number may be no time.

        With other conditioning, or another number beside it, it is another request's first one.
        """
        return Move.NEXT if not sign.renewed and _values(sign) == self._last else Move.START

    def _turns(self, step: Direction) -> bool:
        """Whether time goes the other way than in the request before: that may have been given up, and one begun."""
        before = self._formerly or ()  # the direction that was known last, before the request began
        return len(before) == len(step) and any(a * b < 0 for a, b in zip(before, step, strict=True))

    def _ahead(self, sign: Sign) -> bool:
        """Whether somebody says that a step has passed."""
        return sign.said is not None and self._said is not None and sign.said > self._said

    def _again(self, sign: Sign) -> bool:
        return sign.said is not None and sign.said == self._said

    def _still(self, sign: Sign) -> bool:
        """Whether the time is that of the call before, or the latent: two calls of one step, if of one request."""
        values, last = _values(sign), self._last
        if last is None or len(values) != len(last):
            return False
        if not sign.apart and sign.rests:
            return True
        resting = self._resting(sign).values()
        return bool(resting) and (any(resting) if sign.together else all(resting))

    def _resting(self, sign: Sign) -> dict[int, bool]:
        """Of each number of the schedule that may tell the time, whether it is that of the call before."""
        values, last = _values(sign), self._last or ()
        times = sign.times or range(len(values) // PARTS)
        return {i: values[i * PARTS : (i + 1) * PARTS] == last[i * PARTS : (i + 1) * PARTS] for i in times}

    def _strays(self, sign: Sign) -> bool:
        """Whether a latent cannot have come out of the call before."""
        allowed = _allowed(self._strayed) if self._strayed else MOST
        return sign.strayed is not None and not sign.strayed <= allowed

    def _tells(self, sign: Sign) -> bool:
        """Whether time has gone on beyond doubt, and not that of several numbers only some have moved, or none is."""
        resting = self._resting(sign).values()
        return bool(resting) and (sign.together or not any(resting))

    def _moved_with(self, sign: Sign) -> set[frozenset[int]]:
        """Which numbers that may tell the time have moved since the call before, at this call and at earlier ones.

        If some have moved without others, and once with them, either may be the time, as long as there is this clock.
        """
        last = self._last
        if last is None or len(last) != len(_values(sign)):
            return set()
        if sign.begins or sign.together:
            return self._moved
        if (sign.strayed is not None and not sign.strayed <= MOST) or self._starts_over(sign):
            return self._moved
        moved = frozenset(i for i, rests in self._resting(sign).items() if not rests)
        return self._moved | {moved} if moved else self._moved

    def _goes_on(self, sign: Sign) -> bool:
        """Whether the latent itself shows, for the second time, that a call goes on with the last one.

        Windows that are alike take turns: once a step the last one's next latent could be that of the first one.
        """
        return self._moves > 0 and ((sign.helped and self._helped) or sign.straight)

    def _starts_over(self, sign: Sign) -> bool:
        """Whether a latent is the one that the request began with: another request has the same prompt and seed."""
        back, strayed = sign.apart_from_start, sign.strayed
        if self._moves == 0 or back is None or strayed is None:
            return False
        return back <= SAME and back < strayed and strayed > ROUNDING

    def _strayed_before(self, strayed: float | None) -> bool:
        """Whether it was at the move before that a latent came out of nowhere."""
        return strayed is not None and max(self._strayed, default=0.0) > _allowed([strayed])

    def _passes(self, step: Direction, values: Values) -> bool:
        """Whether the request before, where it was left, lies between the last call and this one, in a leap."""
        if self._left is None or self._last is None or len(self._left) != len(values):
            return False
        for i, (last, left, now) in enumerate(zip(self._last, self._left, values, strict=True)):
            if i % PARTS == PARTS - 1:
                continue
            d = step[i // PARTS]
            leaps = not self._stride or not self._stride[i] or abs(now - last) >= LEAP * self._stride[i]
            if d and last != now and not (leaps and d * last < d * left < d * now):
                return False
        return bool(values)


_ON = {Move.FIRST, Move.NEXT, Move.EITHER, Move.LATE, Move.REPEAT}


def _allowed(strayed: Sequence[float]) -> float:
    return min(MOST, max(FLOOR, FACTOR * max(strayed)))


def _values(sign: Sign) -> Values:
    assert not isinstance(sign.values, list)
    return sign.values


def directions(before: Values, now: Values) -> Direction:
    """Which way each schedule input goes, of which `values` holds `PARTS` numbers: 1, -1, or 0 if none.

    Elements of one input (a timestep for each frame) begin and end on their own: some may rest. Where the least and the
    largest do, all have to.
    """
    found = []
    for i in range(0, len(now), PARTS):
        low, high, _ = ((b > a) - (b < a) for a, b in zip(before[i : i + PARTS], now[i : i + PARTS], strict=True))
        arranged = low or high or before[i + 2] == now[i + 2]
        found.append(BOTH_WAYS if low * high < 0 or not arranged else low or high)
    return tuple(found)


def read_schedule(inputs: Sequence[torch.Tensor]) -> Values | list[Values | torch.Tensor]:
    """The schedule values of a call: of each input the least and the largest element, and a number for how all lie.

    Where some lie on a device, a list of what there is of each input: these, or a float64 tensor on its device, so that
    nothing is waited for here: its elements, shape [n], or, of many, what `shown` says of them, shape [1, PARTS].
    """
    found: list[Values | torch.Tensor] = []
    for t in inputs:
        if not t.is_cpu:
            found.append(_on_its_device(t))
        elif t.numel() == 1:
            (x,) = t.reshape(-1).tolist()
            found.append((float(x), float(x), 0.0))
        else:
            found.append(tuple(shown(t).tolist()))
    late = any(isinstance(part, torch.Tensor) for part in found)
    return found if late else tuple(v for part in found for v in part)


@torch.no_grad()
def _on_its_device(value: torch.Tensor) -> torch.Tensor:
    few = value.numel() <= FEW  # then one copy is all that the device has to do
    return value.detach().reshape(-1).to(torch.float64, copy=True) if few else shown(value).unsqueeze(0)


def _known_by(part: torch.Tensor, numbers: Values) -> Values:
    """What a schedule input is known by, of a tensor of `read_schedule` and the numbers in it."""
    if part.ndim == 2:
        return numbers
    least, largest = min(numbers, default=0.0), max(numbers, default=0.0)
    return least, largest, sum((x - least) * math.sin(i) for i, x in enumerate(numbers, 1))


def is_counted(value: torch.Tensor) -> bool:
    """Whether a tensor holds real numbers that can be looked at."""
    plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
    return plain and not value.is_complex() and value.dtype is not torch.bool


@torch.no_grad()
def shown(value: torch.Tensor) -> torch.Tensor:
    """What a schedule input is known by: least, largest, and how all are arranged; shape [PARTS], in float64."""
    flat = value.detach().reshape(-1).to(torch.float64)
    if flat.numel() <= 1:
        return torch.nn.functional.pad(flat.expand(2) if flat.numel() else flat, (0, PARTS - 2 * flat.numel()))
    least, largest = flat.aminmax()
    weights = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device).sin()
    return torch.stack([least, largest, ((flat - least) * weights).sum()])
