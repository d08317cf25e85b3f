"""Who owns what is cached, and when it ends: the branch that a call belongs to. In doubt: compute."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import torch

from fx_cache.config import CacheConfig
from fx_cache.errors import SessionError
from fx_cache.runtime.clock import Move, Sign
from fx_cache.runtime.complaints import Complaints
from fx_cache.runtime.contexts import Listener
from fx_cache.runtime.device import Readback, captured, device_of
from fx_cache.runtime.follow import Look
from fx_cache.runtime.given import Given
from fx_cache.runtime.identity import ContentHold, StorageHold, identity_key
from fx_cache.runtime.moves import UNKNOWN_LATENT, UNKNOWN_TIME, Learner
from fx_cache.runtime.named import NamedSession, named_session
from fx_cache.runtime.slots import Branch, BranchRecord, Count, Form, Requests, SessionRecord, Slot
from fx_cache.runtime.weights import Weights

MAX_RECORDS = 64
"""Sessions of a model whose statistics are kept."""

MAX_BRANCHES = 8
"""Branches that are taken for those of one request because they began together."""

MAX_PASSES = 32
"""Passes of one named session that are told apart by what they are given; each call may be given something new."""

MAX_PENDING = 128
"""Steps that may pass before schedule values on a device are read although nobody needs them."""

MAX_FORGOTTEN = 10_000
"""Names of which it is remembered that a request was forgotten in its midst, and how many calls it had."""

_BEGINS = (Move.START, Move.LATE)

BUSY = "another thread is at a step of this request"
NO_SCHEDULE = "no timestep among the inputs: name the request and its branch with fx_cache.session"
MAX_BYTES = "max_bytes"


class Store:
    """All cached state of one model under one configuration.

    Attributes:
        config: the configuration in force; run-time values may be replaced at any time.
        listener: what a pipeline says about the present call.
    """

    def __init__(self, config: CacheConfig, listener: Listener | None = None) -> None:
        self.config = config
        self.listener = listener
        self.sessions: deque[SessionRecord] = deque(maxlen=MAX_RECORDS)
        self._branches: OrderedDict[Hashable, Branch] = OrderedDict()
        self._requests: WeakValueDictionary[Hashable, Requests] = WeakValueDictionary()
        self._learners: dict[Hashable, Learner] = {}
        self._weights: dict[Hashable, Weights] = {}
        self._count = 0
        self._fetched: dict[int, tuple[torch.Tensor, list[float]]] = {}
        self._forgotten: OrderedDict[str, dict[Hashable, Count]] = OrderedDict()
        self._complaints = Complaints()
        self._lock = threading.RLock()

    def learner(self, wiring: Hashable) -> Learner:
        """What is learned of the inputs of graphs that do not show which of them is denoised."""
        with self._lock:
            return self._learners.setdefault(wiring, Learner())

    def reset(self) -> None:
        """Forgets everything that could be reused: all requests are over. Statistics stay."""
        with self._lock:
            for branch in list(self._branches.values()):
                self._remove(branch)
            self._requests.clear()
            self._forgotten.clear()
        self._complaints.say()

    def end(self, name: str) -> None:
        """Forgets what could be reused of one named session. Statistics stay."""
        with self._lock:
            for branch in self._of(name):
                self._remove(branch)
            self._requests.pop(name, None)
            self._forgotten.pop(name, None)
        self._complaints.say()

    def offload(self, name: str) -> None:
        """Moves what is cached of one named session to the host, but for branches at a step and spans in progress.

        What is the same at every step is dropped, and computed anew. What is recorded in graphs stays where it is; so
        does everything while a graph is captured, since copies to the host wait for the device.
        """
        with self._lock:
            for branch in [b for b in self._of(name) if not (b.busy or b.recorded or captured())]:
                branch.record.kept = None
                branch.reached()
                for slot in branch.slots:
                    slot.offload()

    def not_apart(self) -> None:
        """Notes that samples of a batch cannot be decided one by one."""
        self._complaints.not_apart()

    def _of(self, name: str) -> list[Branch]:
        return [b for b in self._branches.values() if b.owner == name]

    def _with(self, requests: Requests) -> list[Branch]:
        return [b for b in self._branches.values() if b.requests is requests]

    def discard(self, branch: Branch) -> None:
        """Forgets a branch that may go on. Of a name it is known then that a call may be in the midst of a request."""
        with self._lock:
            if branch.owner is not None and self._branches.get(branch.key) is branch:
                counts = self._forgotten.setdefault(branch.owner, {})
                self._forgotten.move_to_end(branch.owner)
                count = branch.requests.counts.get(branch.counted_as)
                if branch.apart and count is not None:
                    counts[branch.counted_as] = count
                if len(self._forgotten) > MAX_FORGOTTEN:
                    self._forgotten.popitem(last=False)
            self._remove(branch)

    def failed(self, branch: Branch) -> None:
        """Forgets a branch whose step was broken off: it may be tried again, alone or with the passes before it."""
        with self._lock:
            for count in branch.requests.counts.values():
                count.may_repeat()
            self.discard(branch)

    def _remove(self, branch: Branch, *, counts_on: bool = False) -> None:
        """Forgets a branch; `counts_on`: its pass goes on with another one, and its calls are counted on."""
        with self._lock:
            branch.drop()
            if self._branches.get(branch.key) is branch:
                del self._branches[branch.key]
                alone = all(b.counted_as != branch.counted_as for b in self._with(branch.requests))
                if alone and not counts_on:
                    branch.requests.counts.pop(branch.counted_as, None)
                self._complaints.ended(branch.record, branch.config)

    def _goes_on_with_forgotten(self, branch: Branch, given: Given) -> None:
        """Tells a branch with a name that begins behind forgotten ones: its first call may go on with their request.

        And be the last one of that, if it is given up then: its first move shows nothing. Without a name for itself its
        latents show whether it follows.
        """
        lost = self._forgotten.get(branch.owner) if branch.owner is not None else None
        if lost is None or (given.latents and not branch.apart):
            return
        branch.clock.comes_late = True
        count = lost.pop(branch.counted_as, None)
        if count is not None and branch.counted_as not in branch.requests.counts:
            count.request = branch.requests.present
            count.may_begin()
            branch.requests.counts[branch.counted_as] = count

    def release(self, branch: Branch) -> None:
        """A call is over. A branch that was discarded meanwhile keeps nothing of it."""
        with self._lock:
            branch.busy = False
            branch.made_here()
            if self._branches.get(branch.key) is not branch:
                branch.drop()
            self._keep_within(self.config.max_bytes)
        self._complaints.say()

    def _keep_within(self, limit: int | None) -> None:
        """Drops the tensors of the branches used longest ago until those that are left fit."""
        if limit is None:
            return
        held = {key: branch.record.bytes for key, branch in self._branches.items()}
        total = sum(held.values())
        for key, size in held.items():
            if total <= limit:
                break
            if size and not self._branches[key].busy:
                self._branches[key].drop(MAX_BYTES)
                total -= size

    def changed(self, wiring: Hashable, weights: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor]) -> bool:
        """Whether weights, or numbers, are not those of the last call of these graphs. Then everything is forgotten."""
        with self._lock:
            known = self._weights.get(wiring)
            changed = known is not None and not known.same(weights, numbers)
            self._complaints.weights(changed)
            if known is None or changed:
                self._weights[wiring] = Weights(weights, numbers)
            if changed:
                for branch in list(self._branches.values()):
                    self.discard(branch)
                self._requests.clear()
                self._complaints.say()
            return changed

    def forget(self, branch: Branch) -> None:
        """Discards a branch, and its statistics."""
        with self._lock:
            self.discard(branch)
            for home in [s for s in self.sessions if branch.record in s.branches]:
                home.branches.remove(branch.record)
                if not home.branches:
                    self.sessions.remove(home)

    def records(self) -> list[SessionRecord]:
        """The statistics of all sessions, while other threads go on."""
        with self._lock:
            return [replace(s, branches=list(s.branches)) for s in self.sessions]

    def begin(self, program: Hashable, spans: int, given: Given, lost: str | None = None) -> Branch:
        """Finds or opens the branch that a call belongs to, and counts the step.

        Args:
            program: what the graph computes and caches; graphs of one program go on with each other's requests.
            spans: number of spans in the graph.
            given: what the call was given.
            lost: why nothing that was cached before this call may be reused; None: it may.
        """
        with self._lock:
            try:
                branch = self._begin(program, spans, given, named_session())
            finally:
                self._fetched.clear()
            for slot in branch.slots if lost is not None else ():
                slot.lost = lost
            return branch

    def _begin(self, program: Hashable, spans: int, given: Given, named: NamedSession | None) -> Branch:
        config = self.config if named is None else named.config(self.config)
        form = program, given.form
        controls = given.beside
        unheard = self.listener is not None and self.listener.begin()
        heard = None if self.listener is None or unheard else self.listener.branch
        base: tuple[Hashable, ...]
        if named is None:
            base = (program, given.form, given.identity, heard)
        elif named.branch is None:
            base = (program, named.key, given.identity, heard)
        else:
            base, controls = (program, named.key, ()), ()
        key = (base, controls)
        branch = self._branches.get(key) or self._with_other_controls(base, key, given, named)
        if branch is None and heard is not None:
            branch = self._heard_late(((*base[:-1], None), controls), key, heard, given)
        if branch is not None:
            branch.aliases = {}
            if isinstance(branch.hold, ContentHold):
                branch.hold = StorageHold(given.fixed)  # its inputs are not made anew: no copies are needed
        elif named is not None and named.branch is None:
            branch = self._with_equal_inputs(form, heard, given, named)
        if branch is not None and branch.recorded != captured():
            # What was recorded was not computed, and what was computed may be gone when what is recorded now is run.
            self.discard(branch)
            branch = None
        if branch is not None and branch.busy:
            return self._beside(branch, form, spans, named)
        if branch is None or branch.form != form:
            reshaped = [] if branch is None else [branch]  # by which their requests live on until they are shared
            if branch is not None:
                self._remove(branch, counts_on=True)
            self._purge()
            branch = Branch(key, form, _hold(given, named), spans, config)
            branch.owner = None if named is None else named.name
            branch.apart = named is not None and named.branch is not None
            branch.of_pass = named.key if named is not None and branch.apart else (given.of_requests, heard)
            branch.computed_by = (program, () if branch.apart else given.flags)
            branch.unheard = unheard
            self._branches[key] = branch
            if branch.apart and config.num_inference_steps is not None:
                reshaped += self._end_other_forms(branch, given)
            self._share(branch, (given.form, *branch.of_pass) if named is None else named.name, given, named)
            self._goes_on_with_forgotten(branch, given)
            if reshaped and (count := branch.requests.counts.get(branch.counted_as)) is not None:
                count.may_begin()
            self._doubt_equal(branch, heard, given)
        self._branches.move_to_end(branch.key)
        branch.config, branch.heard = config, heard
        branch.reached()
        branch.made_here((*given.latents, *given.schedule, *given.fixed))
        branch.unclear = None
        if named is None or named.branch is None:
            # Without a timestep the latents of a named request may show that it goes on.
            shown = given.schedule or (named is not None and (given.latents or named.step is not None))
            counted = named is not None and named.step is not None and given.doubt == UNKNOWN_TIME
            branch.unclear = (None if counted else given.doubt) or (None if shown else NO_SCHEDULE)
        self._advance(branch, given, named)
        self._refresh(branch, named)
        branch.record.held = branch.hold.bytes
        self._make_room(branch)
        if len(branch.pending) >= MAX_PENDING:
            self.read_pending(branch)
        branch.busy = True
        return branch

    def _end_other_forms(self, branch: Branch, given: Given) -> list[Branch]:
        """Ends what other programs of a named pass have of another shape, and returns it."""
        others = [b for b in self._of(branch.owner or "") if b is not branch and b.of_pass == branch.of_pass]
        ended = [b for b in others if b.form[1] != given.form and not b.busy]
        for b in ended:
            self._remove(b, counts_on=True)
        return ended

    def _share(self, branch: Branch, key: Hashable, given: Given, named: NamedSession | None) -> None:
        """Lets a branch that begins know of others of its requests, and whether it takes part in the present one.

        It does if its call goes on with that, or is at the same time, as the last calls of all others say.
        """
        found = self._requests.get(key)
        if found is None:
            self._requests[key] = branch.requests
            return
        branch.requests, found.several = found, True
        if not self._begins_for(found, given, named):
            branch.request = found.present
        branch.clock.comes_late = self._may_come_late(branch, given, named)

    def _begins_for(self, requests: Requests, given: Given, named: NamedSession | None) -> bool | None:
        """Whether a call that no branch of a session goes on with begins a request, as its time says.

        None: another thread is at one of its steps.
        """
        if not given.schedule and (named is None or named.step is None):
            return False
        others = self._in_present(requests, given, named)
        if others is None:
            return None
        return not others or any(b.clock.begins(sign) for b, sign in others)

    def _may_come_late(self, branch: Branch, given: Given, named: NamedSession | None) -> bool:
        """Whether the first call of a branch may be a later step of its request, or of one that it had before.

        So it may where its program, or its pass, was another one until now; a pass that has a name is known by that.
        """
        if not given.schedule and (named is None or named.step is None):
            return False
        others = self._in_present(branch.requests, given, named)
        if others is None:
            return True
        own = [(b.clock, sign) for b, sign in others if not branch.apart or b.of_pass == branch.of_pass]
        return any(clock.comes_late or clock.may_go_on(sign) for clock, sign in own)

    def _in_present(
        self, requests: Requests, given: Given, named: NamedSession | None
    ) -> list[tuple[Branch, Sign]] | None:
        """The branches of the present request, each with what a call shows beside its last one.

        None: another thread is at one of its steps.
        """
        branches = self._with(requests)
        unread = [b for b in branches if b.pending and not b.busy]
        if unread and captured():
            return None
        for b in unread:
            b.reached()
        pending = [part for b in unread for sign in b.pending for part in sign.late]
        asked = named is None or named.step is None  # else the call's own time is not looked at
        if asked and (unread or any(b.request == requests.present for b in branches)):
            pending += given.late
        self._fetch(pending)
        for b in unread:
            self.read_pending(b)
        others = [b for b in branches if b.request == requests.present]
        if any(b.busy for b in others):
            return None
        signs, _ = self._on_host([_sign(b, given, None, named) for b in others])
        return list(zip(others, signs, strict=True))

    def _make_room(self, branch: Branch) -> None:
        """Discards what was used longest ago until no more is left than allowed: sessions, and passes without a name.

        Neither `branch` nor its session is among it.
        """
        limit = self.config.max_sessions
        if branch.owner is not None:
            passes = [b for b in self._of(branch.owner) if not (b.apart or b.busy or b is branch)]
            for other in passes[: max(0, len(passes) - MAX_PASSES)]:
                self._complaints.too_many_passes(branch.owner, MAX_PASSES)
                self.discard(other)
        if len(self._branches) <= limit:
            return
        used = {id(b.session): b.session for b in reversed(self._branches.values())}
        for session in list(used.values())[limit:]:
            for other in [b for b in self._branches.values() if b.session is session and b is not branch]:
                self.discard(other)

    def _heard_late(
        self, unheard: tuple[Hashable, ...], key: tuple[Hashable, ...], heard: str, given: Given
    ) -> Branch | None:
        """The branch that began with the very first call, before which nobody listened."""
        branch = self._branches.get(unheard)
        if branch is None or not branch.unheard or branch.record.step > 0:
            return None
        if given.schedule and not self._goes_on(branch, given, None, wait=True):
            return None
        branch.unheard = False
        branch.of_pass = (given.of_requests, heard)
        found = branch.requests
        if branch.owner is None:
            found = self._requests.setdefault((given.form, *branch.of_pass), found)
        if found is not branch.requests:  # another program of the pass was heard before this one
            branch.requests, branch.request, found.several = found, found.present, True
        return self._renamed(branch, key)

    def _goes_on(
        self, branch: Branch, given: Given, named: NamedSession | None, *, wait: bool = False, sign: Sign | None = None
    ) -> bool:
        """Whether a call is one step on in time for a branch; where that lies on a device, only if it may `wait`."""
        on = (Move.NEXT, Move.FIRST, Move.LATE)
        return bool(given.schedule) and self._move(branch, given, named, wait, sign) in on

    def _move(
        self, branch: Branch, given: Given, named: NamedSession | None, wait: bool, sign: Sign | None
    ) -> Move | None:
        """How a call would follow the last one of a branch; None where that lies on a device, and it may not `wait`.

        Args:
            branch: the branch.
            given: what the call was given.
            named: the session that it names.
            wait: whether it may.
            sign: what the call shows, if that was looked at already.
        """
        if branch.pending and not wait:
            return None
        branch.reached()
        if branch.pending:
            self.read_pending(branch)
        sign = sign or _sign(branch, given, given.look, named)
        if sign.late and not wait:
            return None
        (sign,), _ = self._on_host([sign])
        return branch.clock.preview(sign)

    def _renamed(self, branch: Branch, key: tuple[Hashable, ...]) -> Branch:
        count = branch.requests.counts.pop(branch.counted_as, None)
        self._branches[key] = self._branches.pop(branch.key)
        branch.key = key
        if count is not None:
            branch.requests.counts[branch.counted_as] = count
        return branch

    def _beside(self, busy: Branch, form: Form, spans: int, named: NamedSession | None) -> Branch:
        """A branch for one call, of a request at whose step another thread is: it computes, and keeps nothing."""
        if named is not None:
            raise SessionError(
                f"session {named.name!r}: got a call while another thread is at a step of the same branch; expected "
                "one call of a branch at a time; give each thread its own session or branch, or let it wait."
            )
        branch = Branch(object(), form, StorageHold(()), spans, busy.config)
        self._begin_anew(branch, named)
        branch.unclear = BUSY
        return branch

    def _with_other_controls(
        self, base: Hashable, key: tuple[Hashable, ...], given: Given, named: NamedSession | None
    ) -> Branch | None:
        """The branch that goes on with other inputs that feed only spans: one step on in time, else it is another."""
        if not given.beside:
            return None
        for branch in reversed([b for k, b in self._branches.items() if isinstance(k, tuple) and k[0] == base]):
            if not branch.busy and self._goes_on(branch, given, named):  # what comes out of a call may be on its way
                return self._renamed(branch, key)
        return None

    def _with_equal_inputs(self, form: Form, heard: str | None, given: Given, named: NamedSession) -> Branch | None:
        """The branch of a named request whose inputs are made anew at every step, with the same content.

        It has to be one step on in time. Of several, it is one of those at the time of the last call of any of them: of
        passes with equal inputs, the one whose turn it is.
        """
        found: list[tuple[Branch, ContentHold, dict[Hashable, Hashable]]] = []
        keys = identity_key(given.fixed)
        signs: dict[int, Sign] = {}
        candidates = [
            b
            for b in self._of(named.name)
            if isinstance(b.hold, ContentHold) and (b.form, b.heard) == (form, heard) and not b.busy
        ]
        if named.step is None and given.schedule and device_of(given.schedule):
            signs = self._look_at(candidates, given, named, keys)
        for branch in candidates:
            assert isinstance(branch.hold, ContentHold)
            if named.step is not None:
                goes_on = named.step > branch.record.step and branch.request == branch.requests.present
            else:
                goes_on = not given.schedule or (
                    self._goes_on(branch, given, named, wait=True, sign=signs.get(id(branch)))
                    and branch.request == branch.requests.present
                    and not self._begins_for(branch.requests, given, named)
                )
            branch.reached()
            aliases = branch.hold.aliases(given.fixed, keys, self._any_of) if goes_on else None
            if aliases is not None:
                found.append((branch, branch.hold, aliases))
        last = found[-1][0].clock.at if found else None
        for branch, hold, aliases in found:
            if branch.clock.at == last:
                branch.aliases = aliases
                hold.let_go(keys)
                return branch
        return None

    def _look_at(
        self, candidates: list[Branch], given: Given, named: NamedSession, keys: tuple[Hashable, ...]
    ) -> dict[int, Sign]:
        """What a call shows beside the last one of some branches, by their ids; all that tells is fetched at once."""
        beside = {id(b): b for c in candidates for b in (c, *self._with(c.requests))}
        for b in beside.values():
            b.reached()
        signs = {id(b): _sign(b, given, given.look, named) for b in candidates}
        pending = [part for b in beside.values() for sign in b.pending for part in sign.late]
        holds = [b.hold for b in candidates if isinstance(b.hold, ContentHold)]
        different = [d for hold in holds for d in hold.different(given.fixed, keys) or ()]
        self._fetch([*pending, *(part for sign in signs.values() for part in sign.late), *different])
        return signs

    def _any_of(self, found: Sequence[torch.Tensor]) -> bool:
        """Whether one of some tensors says so, which may have been fetched."""
        self._fetch(found)
        return any(any(self._fetched[id(part)][1]) for part in found)

    def _doubt_equal(self, branch: Branch, heard: str | None, given: Given) -> None:
        """Of a pass that begins and another one of equal content, neither is sure to go on with its first call.

        The other one may have been given up at that, and begun again with inputs that were made anew.
        """
        if not isinstance(branch.hold, ContentHold) or branch.owner is None:
            return
        for other in self._of(branch.owner):
            if other is branch or other.busy or other.clock.moves or not isinstance(other.hold, ContentHold):
                continue
            other.reached()
            alike = (other.form, other.heard) == (branch.form, heard)
            if alike and other.hold.aliases(given.fixed, identity_key(given.fixed)) is not None:
                other.clock.comes_late = branch.clock.comes_late = True

    def _advance(self, branch: Branch, given: Given, named: NamedSession | None) -> None:
        """Counts the step, and finds out what the call shows of its place in the request as far as the host knows."""
        # Where somebody says which pass or step a call is, its latents tell nothing more.
        told = named is not None and (named.branch is not None or named.step is not None)
        look = None if told else given.look
        sign = _sign(branch, given, look, named)
        if self.listener is not None and named is None and not branch.unheard:
            sign = replace(sign, said=self.listener.step)
        if branch.apart and sign.step is None and given.doubt in (None, UNKNOWN_LATENT):
            before = branch.conditioning
            if before is None or not before.same(given.fixed, given.identity):
                branch.conditioning = StorageHold(given.fixed, given.identity)
                sign = replace(sign, renewed=True)
        branch.earlier, branch.look = branch.look, look
        if branch.config.num_inference_steps is not None and sign.step is None:
            sign = self._counted(branch, sign, branch.config.num_inference_steps)
        if branch.called and branch.requests.several and sign.step is None:
            sign = self._beside_others(branch, sign, given, named)
        if branch.slots:
            branch.record.step += 1
        else:
            self._begin_anew(branch, named)
        branch.requests.calls += 1
        branch.called = branch.requests.calls
        if sign.step is not None:
            branch.pending.clear()
        branch.pending.append(sign)
        if not any(s.late for s in branch.pending):
            self.read_pending(branch)

    def _counted(self, branch: Branch, sign: Sign, last: int) -> Sign:
        """Counts a call; what it shows of its place in a branch, with what the count says."""
        requests = branch.requests
        count = requests.counts.get(branch.counted_as)
        other = count is not None and count.last != last
        if count is None or other:
            count = requests.counts[branch.counted_as] = Count(last, requests.present)
        if count.one_more(branch, sign.renewed) or other:
            sign = replace(sign, begins=True, counted=True)
            if count.request == requests.present:  # else another pass has begun it
                branch.request = None
            elif branch.clock.first:
                branch.request = requests.present
        count.request = requests.present
        return sign

    def _beside_others(self, branch: Branch, sign: Sign, given: Given, named: NamedSession | None) -> Sign:
        """What a call shows of its place in a branch, with what the last calls of others of its requests say."""
        behind = branch.request not in (None, branch.requests.present)
        if behind or branch.clock.moves == 0:
            begins = self._begins_for(branch.requests, given, named)
            if begins:
                branch.request = None if behind else branch.request  # of one that nobody has begun yet
                return replace(sign, begins=True)
            branch.clock.comes_late |= begins is None
        if self._had_another_program(branch):
            if not given.schedule and not branch.apart:
                return replace(sign, begins=True)  # nothing would tell that its request ended with that
            branch.clock.comes_late |= branch.clock.moves == 0
        return sign

    def _had_another_program(self, branch: Branch) -> bool:
        """Whether another program was called for a pass since a branch's last call: at the same time, maybe.

        Where conditioning is made anew at every step, it may be of the same pass though it is another object.
        """
        later = [b for b in self._with(branch.requests) if b.called > branch.called]
        anew = isinstance(branch.hold, ContentHold)
        return any(
            b.computed_by != branch.computed_by
            and (b.of_pass == branch.of_pass or (anew and isinstance(b.hold, ContentHold)))
            for b in later
        )

    def _refresh(self, branch: Branch, named: NamedSession | None) -> None:
        """Counts the calls of a request, and starts all its branches afresh where the configuration says so."""
        session, config = branch.session, branch.config
        assert session is not None
        number, hint = session.calls, config.force_refresh_step_hint
        session.calls += 1
        if hint is None or number == 0 or number % hint:
            return
        if config.force_refresh_step_policy == "once" and (session.refreshed or number != hint):
            return
        for other in [b for b in self._branches.values() if b.session is session and b is not branch]:
            if other.busy or any(slot.open for slot in other.slots):
                self.discard(other)
            else:  # the next call finds nothing, but knows where it is in time
                self._complaints.ended(other.record, other.config)
                other.drop()
                step = other.record.step
                other.record = BranchRecord(other.key, other.record.name, [], step, step)
        step = branch.record.step
        if step > branch.record.began:
            self._begin_anew(branch, named)
            if named is not None and named.step is not None:
                branch.record.step = branch.record.began = step
        assert branch.session is not None
        branch.session.calls, branch.session.refreshed = 1, True

    def read_pending(self, branch: Branch, diffs: torch.Tensor | None = None) -> list[float] | None:
        """One copy to the host: what the calls since the last reading show, and diffs, shape [samples]."""
        with self._lock:
            unread = [branch]
            if branch.requests.several and not captured():  # by another one it may be seen that a request began
                others = [b for b in self._with(branch.requests) if b is not branch]
                unread = [*(b for b in others if b.pending and not b.busy), branch]
            for other in unread:
                other.reached()
            signs, read = self._on_host([s for b in unread for s in b.pending], diffs)
            rest = iter(signs)
            for other in unread:
                of_branch = [next(rest) for _ in other.pending]
                other.pending.clear()
                if of_branch:
                    self._resolve(other, of_branch)
            return read

    def _fetch(self, parts: Iterable[torch.Tensor]) -> None:
        """Reads what will be asked for while the present call finds its branch, at once."""
        new = [p for p in parts if id(p) not in self._fetched]
        rest = iter(Readback(new).take())
        for part in new:
            self._fetched[id(part)] = part, [next(rest) for _ in range(part.numel())]

    def _on_host(self, signs: list[Sign], diffs: torch.Tensor | None = None) -> tuple[list[Sign], list[float] | None]:
        """Signs, and diffs, as numbers: one copy from the device for all that was not fetched."""
        parts = [part for sign in signs for part in sign.late] + ([] if diffs is None else [diffs])
        read = iter(Readback([p for p in parts if id(p) not in self._fetched]).take())
        known = [self._fetched.get(id(p)) for p in parts]
        numbers = [
            [next(read) for _ in range(part.numel())] if found is None else found[1]
            for part, found in zip(parts, known, strict=True)
        ]
        own = None if diffs is None else numbers.pop()
        rest = iter([number for part in numbers for number in part])
        return [sign.read(rest) for sign in signs], own

    def _resolve(self, branch: Branch, signs: list[Sign]) -> None:
        """Takes what the calls since the last reading show, one after another.

        All of these steps but the last were computed. If a request began at one of them, or at the one before, the
        statistics of the steps since then move to it; what they computed stays usable, what was cached before them
        does not.
        """
        began: int | None = None
        for i, sign in enumerate(signs):
            shared, first, back = branch.requests, branch.clock.first, branch.clock.goes_back(sign)
            behind = branch.request not in (None, shared.present)
            told = behind and sign is signs[-1] and branch.clock.preview(sign) not in _BEGINS  # by another branch alone
            move = branch.clock.move(replace(sign, begins=True) if told else sign)
            puzzled = branch.clock.puzzled
            if move in _BEGINS:
                again = branch.starts if branch.clock.tried else []
                look = sign.look if move is Move.START else branch.last
                branch.starts = [*again[:1], *([] if look is None else [look])]
                began = i if move is Move.START else i - 1
                if not behind and (branch.request is None or not first):
                    shared.present += 1
                    self._begun(branch, len(signs) - began, beyond_doubt=back)
                branch.request = shared.present
            if move not in _BEGINS and (branch.clock.doubt is None or (move is Move.FIRST and not puzzled)):
                self._complaints.went_on()
            elif not sign.apart:
                self._complaints.not_gone_on(tuple(sign.values), puzzled)
            elif sign.renewed and not first and move is Move.START:
                self._complaints.renewed()
            branch.last = sign.look
        if branch.clock.doubts:
            self._complaints.lasts(branch.record, branch.config)
        record, given = branch.record, signs[-1].step
        since = 0 if began is None else len(signs) - 1 - began
        if began is not None and record.step - since > record.began:
            self._begin_anew(branch, named_session(), since)
        if given is not None:
            branch.record.step = given
            branch.record.began = branch.record.began if began is None else given

    def _begun(self, branch: Branch, calls: int, *, beyond_doubt: bool) -> None:
        """A request has begun, so many calls ago. Where time does not show that, it may also be in the midst of one."""
        count = branch.requests.counts.get(branch.counted_as)
        if beyond_doubt:
            branch.requests.count_anew(branch.counted_as, calls)
            self._forgotten.pop(branch.owner or "", None)
        elif count is not None:
            count.may_begin(calls)

    def _begin_anew(self, branch: Branch, named: NamedSession | None, since: int = 0) -> None:
        """Begins a request `since` steps ago: with new statistics, and what these steps have computed."""
        old = branch.record
        if branch.slots:
            self._complaints.ended(old, branch.config)
        # A span that another thread is in the middle of stays open: whoever finds it so begins a branch of its own.
        slots = [Slot(open=before.open) for before in old.slots] or [Slot() for _ in range(branch.spans)]
        kept = None
        if since:
            slots, kept, old.kept = [slot.handed_on() for slot in old.slots], old.kept, None
        branch.drop()
        branch.record = BranchRecord(branch.key, "", slots, since, kept=kept)
        for slot, before in zip(slots, old.slots if since else (), strict=False):
            slot.separate(len(before.samples))
            pairs = zip((slot.counters, *slot.samples), (before.counters, *before.samples), strict=True)
            for (counters, ended), step in itertools.product(list(pairs), range(since)):
                counters.misses[step] = ended.misses.pop(old.step - since + step, "computed")
        branch.session = self._enlist(branch.record, named)

    def _enlist(self, record: BranchRecord, named: NamedSession | None) -> SessionRecord:
        """Puts a branch that begins into a session: the named one, or the last one if that has only just begun."""
        last = next((s for s in reversed(self.sessions) if not s.named), None)
        if named is not None:
            own = next((s for s in reversed(self.sessions) if s.named and s.name == named.name), None)
            fits = own is not None and all(b.key != record.key for b in own.branches)
            home = own if fits else None
        else:
            began = [] if last is None else last.branches
            fits = len(began) < MAX_BRANCHES and all(b.key != record.key and b.step == b.began for b in began)
            home = last if fits else None
        if home is None:
            self._count += 1
            home = SessionRecord(named.name if named else f"request-{self._count}", named is not None)
            self.sessions.append(home)
        record.name = (named.branch if named else None) or f"branch-{len(home.branches)}"
        home.branches.append(record)
        del home.branches[:-MAX_RECORDS]
        return home

    def _purge(self) -> None:
        """Discards the branches whose conditioning is gone."""
        for branch in [b for b in self._branches.values() if b.hold.expired()]:
            self._remove(branch)


def _sign(branch: Branch, given: Given, look: Look | None, named: NamedSession | None) -> Sign:
    """What a call shows of its place in a branch; where the step is given, nothing but that is looked at."""
    apart = named is not None and named.branch is not None
    if named is not None and named.step is not None:
        return Sign(step=named.step, said=named.step, named=True, apart=apart)
    values = given.shown
    grams = None if look is None else _since(look, branch.look)
    back = tuple(found for s in branch.starts if look is not None and (found := _since(look, s)) is not None)
    sizes = () if branch.look is None else branch.look.sizes
    start = None if look is None else look.start()
    path = None
    if look is not None and branch.look is not None and not given.one_time:
        path = _since(look, branch.look.behind(branch.earlier))
    return Sign(
        values,
        grams,
        sizes,
        None,
        named is not None,
        apart,
        times=given.times,
        together=given.together,
        path=path,
        back=back,
        look=start,
    )


def _since(look: Look, before: Look | None) -> tuple[float, ...] | torch.Tensor | None:
    grams = look.since(before)
    return tuple(grams.tolist()) if grams is not None and grams.is_cpu else grams


def _hold(given: Given, named: NamedSession | None) -> StorageHold:
    """What keeps a branch's identity meaningful."""
    if named is None:
        return StorageHold(given.fixed)
    # A branch that is named is nothing but its name, and lives until it is ended.
    return ContentHold(given.fixed) if named.branch is None else StorageHold(())
