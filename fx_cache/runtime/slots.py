"""What is remembered of requests: sessions, branches and slots, as data."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fx_cache.config import CacheConfig
from fx_cache.runtime.clock import Clock, Sign
from fx_cache.runtime.device import Origin, captured
from fx_cache.runtime.follow import Look
from fx_cache.runtime.front import OTHER_CALLS, OTHER_NUMBERS, Front, Paces
from fx_cache.runtime.identity import StorageHold
from fx_cache.runtime.policy import Counters


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take up, wherever they lie; what several views show, once."""
    storages = {s._cdata: s.nbytes() for t in tensors if (s := t.untyped_storage())}
    return sum(storages.values())


class Times:
    """Which of several inputs that look like the time is it, by how they move in a request: it does at every step.

    None is as long as two have moved, or fewer than two steps were seen.
    """

    def __init__(self, computed: StorageHold | None = None) -> None:
        self._computed = computed
        self._last: StorageHold | None = None
        self._steps = 0
        self._moved: set[int] = set()
        self._always: set[int] = set()

    def computed(self, now: StorageHold) -> None:
        """The span was computed from these."""
        self._computed = now

    def over(self, now: StorageHold) -> None:
        """A step with these is over."""
        if self._last is not None:
            moved = _different(now, self._last)
            self._always = moved if not self._steps else self._always & moved
            self._moved |= moved
            self._steps += 1
        self._last = now

    def changed(self, now: StorageHold, asked: frozenset[int]) -> bool:
        """Whether any of those asked for, but for the time, is another than when the span was computed."""
        if self._computed is None:
            return True
        changed = asked & _different(now, self._computed)
        if not changed or self._last is None or not self._steps:
            return bool(changed)
        time = self._always & _different(now, self._last)
        others = self._moved - time
        return bool(changed - (time if len(time) == 1 and not others else set()))

    def of_another_request(self) -> Times:
        """The same where a request has begun at the step that computed the span."""
        return Times(self._computed)


def _different(a: StorageHold, b: StorageHold) -> set[int]:
    """The numbers of inputs that are others."""
    if len(a.identity) != len(b.identity):
        return set(range(max(len(a.identity), len(b.identity))))
    return {i for i, (x, y) in enumerate(zip(a.identity, b.identity, strict=True)) if x != y}


@dataclass
class Slot:
    """The cached state of one branch at one span.

    Attributes:
        tensors: [probe, what is stored of each live-out]; nothing while there is no state.
        home: where they were made, while they lie on the host instead.
        lost: why there are none any more, where it is no matter of course.
        control: the inputs that fed only the span, when it was computed.
        times: the same of those that look like the time.
        made_anew: whether the former are made anew at every step; None while that is not known.
        script: where the span lies over several graphs, what each of them gave back.
        front: where a forward is captured in several, what ran before it when it was computed.
        paces: how numbers and weights have moved there from step to step.
        open: whether a span over several graphs has begun and not ended.
        counters: what the policy remembers.
        samples: the same of each sample of a batch, where each is decided by itself.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    home: tuple[torch.device, ...] | None = None
    lost: str | None = None
    control: StorageHold | None = None
    times: Times = field(default_factory=Times)
    made_anew: bool | None = None
    script: Any = None
    front: Front | None = None
    paces: Paces = field(default_factory=Paces)
    open: bool = False
    counters: Counters = field(default_factory=Counters)
    samples: list[Counters] = field(default_factory=list)

    def separate(self, samples: int) -> None:
        """Lets each of some samples go on by itself from where all together are; one: they go on together."""
        if samples != max(1, len(self.samples)):
            self.samples = [copy.deepcopy(self.counters) for _ in range(samples)] if samples > 1 else []

    def handed_on(self) -> Slot:
        """The state with no statistics; none of it is left here."""
        times = self.times.of_another_request()
        taken = replace(self, lost=None, times=times, paces=Paces(), counters=Counters(), samples=[])
        self.tensors, self.home, self.script, self.front, self.control = [], None, None, None, None
        return taken

    @property
    def reused(self) -> bool:
        """Whether any sample has reused anything."""
        return any(c.hits for c in (self.counters, *self.samples))

    @property
    def bytes(self) -> int:
        """What the tensors take up, wherever they lie."""
        return bytes_of(self.tensors)

    def forget(self, why: str) -> None:
        """Lets go of what is cached."""
        self.tensors, self.home, self.script, self.front, self.lost, self.open = [], None, None, None, why, False

    def behind(self, front: Front | None) -> str | None:
        """Why what is cached was computed behind something else than what a forward has run now; None: it was not.

        To be asked once at every step of a request.

        Args:
            front: what it has run; None: it is captured in one graph.
        """
        before, why = self.front, None
        if self.tensors and before is not front:
            if before is None or front is None:
                why = OTHER_CALLS
            else:
                other = self.paces.changed(before, front)
                why = before.differs(front) or (OTHER_NUMBERS if other else None)
        if front is not None:
            self.paces.went_on(front)
        return why

    def offload(self) -> None:
        """Moves the tensors to the host, but for those of a span over several graphs."""
        if self.tensors and self.home is None and self.script is None:
            moved = [t.to("cpu") for t in self.tensors]
            self.home, self.tensors = tuple(t.device for t in self.tensors), moved

    def load(self) -> list[torch.Tensor]:
        """The tensors, where they were made: the list itself, which is emptied when others are to be computed."""
        if self.tensors and self.home is not None:
            self.tensors = [t.to(device) for t, device in zip(self.tensors, self.home, strict=True)]
        self.home = None
        return self.tensors


@dataclass
class Kept:
    """What is computed once, and used at each step.

    Attributes:
        identity: who the inputs were that it was computed from.
        hold: keeps that meaningful.
        tensors: what came of them.
    """

    identity: Hashable
    hold: StorageHold
    tensors: tuple[torch.Tensor, ...]

    @property
    def bytes(self) -> int:
        return bytes_of(self.tensors)


@dataclass
class BranchRecord:
    """One branch of one session, as statistics: its slots hold tensors only while the branch lives.

    Attributes:
        key: by what it is found.
        name: for the reader.
        slots: one for each span.
        step: number of the present step: the caller's, where he numbers them, else counted from 0.
        began: number of the first one.
        kept: what is the same at each step, where that is kept.
        held: bytes of copies of inputs, which may be made anew at each step.
    """

    key: Hashable
    name: str
    slots: list[Slot]
    step: int = 0
    began: int = 0
    kept: Kept | None = None
    held: int = 0

    @property
    def kept_bytes(self) -> int:
        """What is kept beside the slots."""
        controls = sum(slot.control.bytes for slot in self.slots if slot.control is not None)
        return self.held + controls + (0 if self.kept is None else self.kept.bytes)

    @property
    def bytes(self) -> int:
        """What is held where it was made."""
        held = sum(slot.bytes for slot in self.slots if slot.home is None)
        return held + (0 if self.kept is None else self.kept.bytes)


@dataclass
class SessionRecord:
    """One request, as statistics.

    Attributes:
        name: the caller's, or ours.
        named: whether it is the caller's.
        branches: its passes.
        calls: of all branches together.
        refreshed: whether it goes on with a request that was told to start afresh.
    """

    name: str
    named: bool
    branches: list[BranchRecord] = field(default_factory=list)
    calls: int = 0
    refreshed: bool = False


class Count:
    """The calls of one pass where requests have a known number of steps: which of them may be a request's first one.

    So may be one at which its inputs get another shape: a request may have been given up there, or it goes on. What was
    computed before such a call is not reused as many calls later either, until a request shows where it begins: by
    conditioning that is another one at its first call and behind its last one, and nowhere between.

    Attributes:
        last: steps of a request.
        request: number of the request that began last, at the pass's last call.
    """

    def __init__(self, last: int, request: int, calls: int = 0) -> None:
        """
        Args:
            last: steps of a request.
            request: number of the present one.
            calls: how many that had.
        """
        self.last = last
        self.request = request
        self._calls = calls
        self._begins = {0}
        self._doubtful = -1
        self._branch: weakref.ref[Branch] | None = None
        self._renewed: int | None = None

    def may_begin(self, calls: int = 0) -> None:
        """A request may have begun so many calls ago; none: with the next one."""
        begin = self._calls - calls
        if begin % self.last not in self._begins:
            self._begins.add(begin % self.last)
            self._doubtful = begin

    def may_repeat(self) -> None:
        """The last call was broken off: the next one may be the same step again, or whatever comes behind it."""
        self._begins |= {(begin + 1) % self.last for begin in self._begins}

    def one_more(self, branch: Branch, renewed: bool) -> bool:
        """Counts a call; whether a request begins with it, if one began as many calls before as it has steps.

        Args:
            branch: the branch that it belongs to: of those of a pass, each knows its own conditioning.
            renewed: whether that is another one than at the branch's last call, or its first.
        """
        call = self._calls
        begins = call > 0 and call % self.last in self._begins and call != self._doubtful
        before = self._renewed if self._branch is not None and self._branch() is branch else None
        if begins and renewed and before == call - self.last:
            self._begins = {call % self.last}
        self._branch, self._renewed, self._calls = weakref.ref(branch), call if renewed else before, call + 1
        return begins


class Requests:
    """What branches that belong to the same requests know together: the programs that compute one pass of them, and
    the passes of a named session.

    Attributes:
        present: number of the request that began last.
        several: whether there are several branches.
        calls: of all branches together.
        counts: where the number of steps is known, the calls of each pass (`Branch.counted_as`).
    """

    def __init__(self) -> None:
        self.present = 0
        self.several = False
        self.calls = 0
        self.counts: dict[Hashable, Count] = {}

    def count_anew(self, counted_as: Hashable, calls: int) -> None:
        """The present request has begun `calls` calls of a pass ago, beyond doubt: all passes are counted anew."""
        count = self.counts.get(counted_as)
        self.counts = {} if count is None else {counted_as: Count(count.last, self.present, calls)}


Form = tuple[Hashable, Hashable]
"""What a call's program is, and the shapes, dtypes and devices of all that it was given."""


class Branch:
    """A pass of a request that goes on from call to call, and its slots.

    Attributes:
        record: its statistics within the present session.
        clock: where it is in its request, as far as what its calls show was read.
        unclear: why nothing that its present call shows would tell where it belongs; None: it would.
        look: the latents of its last call, and what was returned.
        earlier: the same of the call before.
        starts: the latents of the request's first call, as far as is known, and of a second one at the same time.
        last: those of the last call that was read.
        requests: what it shares with other branches of its requests.
        request: number of the one that it goes on with.
        pending: what its calls show and was not read yet, since some of it lies on a device; one for each step.
        origin: the streams of its last call.
        recorded: whether its calls are recorded in graphs, so that what it holds is only there once these are run.
        config: the configuration in force at its present step.
        owner: name of the session that it belongs to, or None.
        apart: whether somebody names it within that.
        of_pass: what its pass is known by, whatever program computes it.
        computed_by: its program, with the Python values that choose one over several graphs.
        session: the present session, as statistics.
        unheard: whether it began with a call before which nobody listened to what the pipeline says.
        heard: what the pipeline calls it, or None.
        busy: whether a call of it is running.
        aliases: where inputs of its present call were made anew, by the key of each that of the one it began with.
        called: number of its last call, among those of its requests.
        conditioning: what its last call was given, where nothing but its name is looked at otherwise.
    """

    def __init__(self, key: Hashable, form: Form, hold: StorageHold, spans: int, config: CacheConfig) -> None:
        self.key = key
        self.config = config
        self.owner: str | None = None
        self.apart = False
        self.of_pass: tuple[Hashable, ...] = ()
        self.computed_by: Hashable = None
        self.session: SessionRecord | None = None
        self.unheard = False
        self.heard: str | None = None
        self.busy = False
        self.aliases: dict[Hashable, Hashable] = {}
        self.called = 0
        self.conditioning: StorageHold | None = None
        self.form = form
        self.hold = hold
        self.clock = Clock()
        self.spans = spans
        self.record = BranchRecord(key, "", [])
        self.unclear: str | None = None
        self.look: Look | None = None
        self.earlier: Look | None = None
        self.starts: list[Look] = []
        self.requests = Requests()
        self.request: int | None = None
        self.last: Look | None = None
        self.pending: list[Sign] = []
        self.origin = Origin()
        self.recorded = captured()

    def reached(self) -> None:
        """Lets the present streams wait for what the branch has under way on those of its last call."""
        self.origin.reached(self._tensors())

    def made_here(self, given: Iterable[object] = ()) -> None:
        """What it holds, and what was `given` for a call, is from now on made on the present streams."""
        self.origin = Origin(itertools.chain(given, self._tensors()))

    def _tensors(self) -> Iterator[torch.Tensor]:
        """What it holds, and may let go of while the present stream works on it."""
        for slot in self.slots:
            yield from slot.tensors
            yield from slot.control.copies if slot.control is not None else ()
        yield from self.record.kept.tensors if self.record.kept is not None else ()
        yield from self.hold.copies
        for look in (self.look, self.earlier, self.last, *self.starts, *(s.look for s in self.pending)):
            yield from look.tensors if look is not None else ()
        for sign in self.pending:
            yield from sign.late

    @property
    def slots(self) -> list[Slot]:
        return self.record.slots

    @property
    def counted_as(self) -> Hashable:
        """With what its calls are counted: of passes without a name, two may differ in nothing but the program."""
        return self.of_pass if self.apart else self.key

    @property
    def doubt(self) -> str | None:
        """Why its present step computes; None: its place in the request is certain, or will be once that is read."""
        return self.unclear or (None if self.pending else self.clock.doubt)

    def drop(self, why: str | None = None) -> None:
        """Lets go of what is cached and kept."""
        self.record.kept = None
        if why is None:  # the branch is over; else it goes on, and is known by its copies
            self.record.held = 0
        for slot in self.slots:
            slot.control = None
            if slot.tensors:
                slot.tensors, slot.home, slot.script, slot.front, slot.lost = [], None, None, None, why
