"""Sessions, branches and slots: who owns what is cached, and when it ends. In doubt: compute."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fx_cache.config import CacheConfig
from fx_cache.errors import SessionError
from fx_cache.runtime.clock import Clock, Direction, Move, read_schedule
from fx_cache.runtime.given import Control, Given
from fx_cache.runtime.identity import StorageHold
from fx_cache.runtime.named import NamedSession, named_session
from fx_cache.runtime.policy import Counters

MAX_BRANCHES = 32
"""Branches of a model that may hold cached tensors at a time; the one used longest ago is dropped for a new one."""

MAX_SESSIONS = 64
"""Sessions of a model whose statistics are kept."""

MAX_PENDING = 128
"""Steps that may pass before schedule values on a device are read although nobody needs them."""

FOREVER = 1 << 62
"""A number of steps that no request has."""

BUSY = "another thread is at a step of this request"
STEP_REPEATED = "same step twice"
REPEATED = "same timestep twice: which request it belongs to is not known"
NO_SCHEDULE = "no timestep among the inputs: name the request with fx_cache.session"


@dataclass
class Slot:
    """The cached state of one branch at one span.

    Attributes:
        tensors: (probe, what is stored of each live-out), or None.
        control: who the inputs were that feed only the span, when it was computed.
        script: where the span lies over several graphs, what each of them gave back.
        open: whether a span over several graphs has begun and not ended.
        counters: what the policy remembers.
    """

    tensors: tuple[torch.Tensor, ...] | None = None
    control: Control | None = None
    script: Any = None
    open: bool = False
    counters: Counters = field(default_factory=Counters)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors or ())


@dataclass
class BranchRecord:
    """One branch of one session, as statistics: its slots hold tensors only while the branch lives."""

    key: Hashable
    name: str
    slots: list[Slot]
    step: int = 0


@dataclass
class SessionRecord:
    """One request, as statistics."""

    name: str
    named: bool
    branches: list[BranchRecord] = field(default_factory=list)


class Branch:
    """A pass of a request that goes on from call to call, and its slots.

    Attributes:
        record: its statistics within the present session.
        blind: whether it may reuse without measuring: only while its place in the request is certain.
        doubt: why it computes from now on; None while there is no doubt.
        pending: schedule values that lie on a device and were not read yet, one tensor a step.
        config: the configuration in force at its present step.
        owner: name of the session that it belongs to, or None.
        busy: whether a call of it is running.
    """

    def __init__(self, key: Hashable, form: Hashable, hold: StorageHold, spans: int, config: CacheConfig) -> None:
        self.key = key
        self.config = config
        self.owner: str | None = None
        self.busy = False
        self.form = form
        self.hold = hold
        self.clock = Clock()
        self.spans = spans
        self.record = BranchRecord(key, "", [])
        self.blind = True
        self.doubt: str | None = None
        self.doubt_until = 0
        self.pending: list[torch.Tensor] = []

    @property
    def slots(self) -> list[Slot]:
        return self.record.slots

    def drop(self) -> None:
        for slot in self.slots:
            slot.tensors = None


def _nothing() -> StorageHold:
    """A branch that is named lives until it is ended."""
    return StorageHold(())


class Store:
    """All cached state of one model under one configuration.

    Attributes:
        config: the configuration in force; run-time values may be replaced at any time.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.sessions: deque[SessionRecord] = deque(maxlen=MAX_SESSIONS)
        self._branches: OrderedDict[Hashable, Branch] = OrderedDict()
        self._directions: dict[Hashable, Direction] = {}
        self._count = 0
        self._lock = threading.RLock()

    def reset(self) -> None:
        """Forgets everything that could be reused. Statistics stay."""
        with self._lock:
            for branch in list(self._branches.values()):
                self.discard(branch)

    def end(self, name: str) -> None:
        """Forgets what could be reused of one named session. Statistics stay."""
        with self._lock:
            for branch in [b for b in self._branches.values() if b.owner == name]:
                self.discard(branch)

    def discard(self, branch: Branch) -> None:
        with self._lock:
            branch.drop()
            if self._branches.get(branch.key) is branch:
                del self._branches[branch.key]

    def release(self, branch: Branch) -> None:
        """A call is over. A branch that was discarded meanwhile keeps nothing of it."""
        with self._lock:
            branch.busy = False
            if self._branches.get(branch.key) is not branch:
                branch.drop()

    def forget(self, branch: Branch) -> None:
        """Discards a branch, and its statistics."""
        self.discard(branch)
        for home in [s for s in self.sessions if branch.record in s.branches]:
            home.branches.remove(branch.record)
            if not home.branches:
                self.sessions.remove(home)

    def records(self) -> list[SessionRecord]:
        """The statistics of all sessions, while other threads go on."""
        with self._lock:
            return [replace(s, branches=list(s.branches)) for s in self.sessions]

    def begin(self, program: Hashable, spans: int, given: Given) -> Branch:
        """Finds or opens the branch that a call belongs to, and counts the step.

        Args:
            program: what the graph computes and caches; graphs of one program go on with each other's requests.
            spans: number of spans in the graph.
            given: what the call was given.
        """
        with self._lock:
            return self._begin(program, spans, given, named_session())

    def _begin(self, program: Hashable, spans: int, given: Given, named: NamedSession | None) -> Branch:
        self._purge()
        config = self.config if named is None else named.config(self.config)
        form: Hashable = (program, given.form)
        controls = tuple(c.identity for c in given.controls)
        hold = given.hold
        base: Hashable
        if named is None:
            base = (program, given.form, given.identity)
        elif named.branch is None:
            base = (named.key, given.identity)
        else:
            base, controls, hold = (named.key, ()), (), _nothing
        key = (base, controls)
        branch = self._branches.get(key) or self._with_other_controls(base, key, program, given)
        if branch is not None and branch.busy:
            return self._beside(branch, form, spans, named)
        if branch is None or branch.form != form:
            if branch is not None:
                self.discard(branch)
            branch = Branch(key, form, hold(), spans, config)
            branch.owner = None if named is None else named.name
            self._branches[key] = branch
            while len(self._branches) > MAX_BRANCHES:
                self.discard(next(iter(self._branches.values())))
        self._branches.move_to_end(key)
        branch.config = config
        self._advance(branch, program, given.schedule, named)
        if given.doubt is not None and (named is None or named.branch is None):
            branch.doubt, branch.doubt_until = given.doubt, FOREVER
        if len(branch.pending) >= MAX_PENDING:
            self.read_pending(branch, program)
        branch.busy = True
        return branch

    def _beside(self, busy: Branch, form: Hashable, spans: int, named: NamedSession | None) -> Branch:
        """A branch for one call, of a request at whose step another thread is: it computes, and keeps nothing."""
        if named is not None:
            raise SessionError(
                f"session {named.name!r}: got a call while another thread is at a step of the same branch; expected "
                "one call of a branch at a time; give each thread its own session or branch, or let it wait."
            )
        branch = Branch(object(), form, _nothing(), spans, busy.config)
        self.restart(branch, named)
        branch.doubt, branch.doubt_until = BUSY, FOREVER
        return branch

    def _with_other_controls(
        self, base: Hashable, key: tuple[Hashable, ...], program: Hashable, given: Given
    ) -> Branch | None:
        """The branch that goes on with other inputs that feed only spans: one step on in time, else it is another."""
        if not any(c.identity for c in given.controls):
            return None
        values = read_schedule(given.schedule) if given.schedule else ()
        if isinstance(values, torch.Tensor) or not values:
            return None
        for other in reversed([k for k in self._branches if isinstance(k, tuple) and k[0] == base]):
            branch = self._branches[other]
            if branch.clock.preview(values, self._directions.get(program)) in (Move.NEXT, Move.UNSURE):
                self._branches[key] = self._branches.pop(other)
                branch.key = key
                return branch
        return None

    def _advance(
        self, branch: Branch, program: Hashable, schedule: list[torch.Tensor], named: NamedSession | None
    ) -> None:
        if named is not None and named.step is not None:
            self._go_to(branch, named.step, named)
            return
        values = read_schedule(schedule) if schedule else ()
        if isinstance(values, torch.Tensor):
            move = Move.NEXT if branch.slots else Move.START
            branch.pending.append(values)
        elif schedule:
            move = self._move(branch, program, values)
        else:
            move = Move.NEXT if branch.slots else Move.START
            if named is None:
                branch.doubt, branch.doubt_until = NO_SCHEDULE, FOREVER
        last = branch.config.num_inference_steps
        if last is not None and branch.slots and branch.record.step + 1 >= last:
            move = Move.BACK
        self._apply(branch, move, named)

    def _go_to(self, branch: Branch, step: int, named: NamedSession) -> None:
        """Goes on to a step whose number is given."""
        branch.pending.clear()
        branch.blind, branch.doubt = True, None
        if not branch.slots or step < branch.record.step:
            self.restart(branch, named)
        elif step == branch.record.step:
            branch.doubt, branch.doubt_until = STEP_REPEATED, step
        branch.record.step = step

    def _move(self, branch: Branch, program: Hashable, values: tuple[float, ...]) -> Move:
        sure = branch.clock.direction
        move = branch.clock.move(values, self._directions.get(program))
        if move is Move.NEXT and sure is not None:
            self._directions[program] = sure
        return move

    def _apply(self, branch: Branch, move: Move, named: NamedSession | None) -> None:
        if move in (Move.START, Move.BACK):
            branch.blind, branch.doubt = True, branch.doubt if branch.doubt == NO_SCHEDULE else None
            self.restart(branch, named)
            return
        if move is Move.REPEAT and named is None:
            if branch.record.step == 0:
                # Most likely the first call was a try: start again, but let one more step pass to be sure.
                self.restart(branch, named)
                branch.doubt, branch.doubt_until = REPEATED, 1
                return
            branch.doubt, branch.doubt_until = REPEATED, FOREVER
        branch.record.step += 1
        branch.blind = move is not Move.UNSURE or named is not None
        if branch.doubt is not None and branch.record.step > branch.doubt_until:
            branch.doubt = None

    def restart(self, branch: Branch, named: NamedSession | None) -> None:
        """Begins a request: empty slots and new statistics."""
        branch.drop()
        branch.record = BranchRecord(branch.key, "", [Slot() for _ in range(branch.spans)])
        self._enlist(branch.record, named)

    def read_pending(self, branch: Branch, program: Hashable, diff: torch.Tensor | None = None) -> float | None:
        """One copy to the host: the schedule values of the steps since the last reading, and a diff."""
        count, width = len(branch.pending), branch.pending[0].numel()
        parts = [*branch.pending] + ([] if diff is None else [diff.reshape(1).to(branch.pending[0])])
        numbers = torch.cat(parts).tolist()
        branch.pending.clear()
        with self._lock:
            self.resolve(branch, program, [numbers[i * width : (i + 1) * width] for i in range(count)])
        return None if diff is None else float(numbers[-1])

    def resolve(self, branch: Branch, program: Hashable, rows: list[list[float]]) -> None:
        """Takes schedule values that have come from the device, one row for each step since the last reading.

        All of these steps but the last were computed. If a request began at one of them, the statistics of the steps
        since then move to it; what they computed stays usable, what was cached before them does not.
        """
        began: int | None = None
        named = named_session()
        for i, row in enumerate(rows):
            move = self._move(branch, program, tuple(row))
            if move is Move.BACK:
                began = i
            elif move is Move.REPEAT and named is None:
                branch.doubt, branch.doubt_until = REPEATED, FOREVER
            branch.blind = move is not Move.UNSURE or named is not None
        if began is None:
            return
        since = len(rows) - 1 - began
        kept = [slot.tensors if since else None for slot in branch.slots]
        old = branch.record
        branch.record = BranchRecord(branch.key, "", [Slot(tensors) for tensors in kept])
        branch.record.step = since
        branch.doubt, branch.blind = None, True
        for slot, before in zip(branch.slots, old.slots, strict=True):
            before.tensors = None
            for step in range(since):
                reason = before.counters.misses.pop(old.step - since + step, "computed")
                slot.counters.misses[step] = reason
        self._enlist(branch.record, named)

    def _enlist(self, record: BranchRecord, named: NamedSession | None) -> None:
        """Puts a branch that begins into a session: the named one, or the last one if that has only just begun."""
        last = next((s for s in reversed(self.sessions) if not s.named), None)
        if named is not None:
            own = next((s for s in reversed(self.sessions) if s.named and s.name == named.name), None)
            fits = own is not None and all(b.key != record.key for b in own.branches)
            home = own if fits else None
        else:
            fits = last is not None and all(b.key != record.key and b.step == 0 for b in last.branches)
            home = last if fits else None
        if home is None:
            self._count += 1
            home = SessionRecord(named.name if named else f"request-{self._count}", named is not None)
            self.sessions.append(home)
        record.name = (named.branch if named else None) or f"branch-{len(home.branches)}"
        home.branches.append(record)

    def _purge(self) -> None:
        for branch in [b for b in self._branches.values() if b.hold.expired()]:
            self.discard(branch)
