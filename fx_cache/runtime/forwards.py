"""One execution of a compiled model that was captured in several graphs.

What one graph made is the input of the next, and is a new tensor at every call, whatever it holds. So requests and
branches are told apart by what the user gave the whole forward. That stands in the frame of the compiled call, in which
all its graphs run; there the forward is remembered too, and with the frame it ends.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch._dynamo import convert_frame, eval_frame
from torch.fx import graph_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module

from fx_cache.errors import guarded
from fx_cache.patterns.calls import UNKNOWN, Call, GraphFacts, InputTrace, Origin, Place, given_as, is_held
from fx_cache.patterns.forms import Form
from fx_cache.patterns.programs import Program
from fx_cache.runtime import moves
from fx_cache.runtime.clock import is_counted
from fx_cache.runtime.contents import PLAIN, contents
from fx_cache.runtime.device import on_host
from fx_cache.runtime.front import Front
from fx_cache.runtime.given import Control, Given
from fx_cache.runtime.habits import Habits, Shape, fitting
from fx_cache.runtime.identity import (
    SMALL,
    StorageHold,
    as_number,
    identity_key,
    is_one,
    lies_in,
    memory_of,
    signature,
    stored,
    view_of,
)
from fx_cache.runtime.named import named_session
from fx_cache.runtime.net import Versions, plain, spread, versions_at_begin
from fx_cache.runtime.weights import weights_of

_KEPT_AS = "__fx_cache_forward__"
_ALIVE = "__fx_cache_alive__"
_MACHINERY = (
    str(Path(eval_frame.__file__).parent),
    module.__file__,
    graph_module.__file__,
    str(Path(__file__).parents[1]),
)
"""Where frames lie that belong neither to the model nor to who calls it."""

_COMPILED_CALL = f"{eval_frame._TorchDynamoContext.__name__}.__call__.<locals>."


OPAQUE = "an input of type {}: whether it changed is not known"


@dataclass(frozen=True)
class _Note:
    """Of a tensor between two graphs: who made it, and the user's inputs whose tokens it holds, or that it shows."""

    reference: StorageWeakRef
    made_by: Place
    view: tuple[Any, ...]
    tokens: frozenset[int]
    shown: frozenset[int]


@dataclass(frozen=True)
class _Seen:
    """Of memory that nobody known made: as what a call was given it first, and its version behind that call."""

    reference: StorageWeakRef
    place: Place
    version: int


Joined = tuple[Place, tuple[int, int]]
"""An output, and how many tokens before and behind it belong to something else."""


class Forward:
    """One execution of a compiled call.

    Attributes:
        root: the module or function that was compiled.
        compilation: what ``torch.compile`` made of it.
        inputs: the leaves of what the user gave it.
        keys: who each of them was when the forward began; None where that cannot be said.
        count: of its graphs' calls that are over.
        calls: of its graphs, so far, where somebody asked for them (`trace`).
        layout: how the inputs were given; between forwards of one layout they have the same numbers.
        habits: what other forwards of this layout have shown of them.
        weight: the first weight of the model that one of its graphs was given.
        branches: (store, branch) of each of its graphs that caches by itself, by program.
        front: what it has run, for spans behind that.
        run: whatever drives it; set by whoever drives.
        caught: whether it can be begun anew.
    """

    def __init__(
        self,
        root: Any,
        compilation: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        caught: bool = False,
        versions: Versions | None = None,
    ) -> None:
        self._given = args, kwargs
        inputs = contents(self._given)
        self._root = weakly(root)
        self._compilation = weakly(compilation)
        self._thread = threading.get_ident()
        self._frame: Callable[[], Any] = _nothing
        self.layout = (len(args), tuple(kwargs), tuple(type(v).__name__ for v in inputs))
        self.inputs = list(inputs)
        # Now, since whoever gave them may write to them before they are asked for.
        self.keys = [identity_key([v]) if comparable(v) else None for v in inputs]
        self._versions = versions or []
        self._times = {i: v.clone() for i, v in enumerate(inputs) if stored(v) and v.numel() <= SMALL}
        self.calls: list[Call] = []
        self.habits = Habits()
        self._learnt: moves.Call | None = None
        self.weight: torch.Tensor | None = None
        self.branches: dict[Program, tuple[Any, Any]] = {}
        self.front = Front()
        self.run: Any = None
        self.caught = caught
        self._owners: dict[int, str] = {}
        self.count = 0
        self._user: dict[int, list[int]] = {}
        """Numbers of the inputs that lie in a storage."""
        for i, v in enumerate(self.inputs):
            if stored(v):
                self._user.setdefault(v.untyped_storage()._cdata, []).append(i)
        self._returned = False
        self._written_to: Container[torch.Tensor] = ()
        self._notes: dict[int | None, list[_Note]] = {}
        self._seen: dict[int, _Seen] = {}
        self._alive: list[_Note] = []
        self._held_at: dict[Place, int] = {}
        """Of each output the last call at whose end somebody still held it; behind all calls, if it came back."""
        self._held: dict[Place | None, frozenset[int]] = {}
        self._showing: dict[Place | None, frozenset[int]] = {}
        self._sinusoids: dict[Place | None, list[torch.Tensor]] = {}
        self._first_versions: dict[int, tuple[int, int]] = {}

    @property
    def root(self) -> Any:
        return self._root()

    @property
    def compilation(self) -> Any:
        return self._compilation()

    @property
    def over(self) -> bool:
        """Whether the compiled call has returned, or raised: it has if another one begins in its thread."""
        return self._thread == threading.get_ident() or self._frame() is None

    @property
    def returned(self) -> bool:
        """Whether the compiled call has, as far as that can be told here: where it runs, or when its frame is gone."""
        if self._thread == threading.get_ident():
            return all(_under_way(frame) is not self for frame in _compiled_calls())
        return self._frame() is None

    def begins(self, frame: FrameType) -> None:
        """Takes notice of the frame of the compiled call, which lives as long as that is under way."""
        alive = _Alive()
        frame.f_locals[_ALIVE] = alive
        self._frame = weakref.ref(alive)
        self.when_over(self._let_go)

    def _let_go(self) -> None:
        """The compiled call has returned, or raised: what nobody else holds any more has not outlived it.

        Behind an exception it is still held by that, and what was replaced until now cannot be told from what was made.
        """
        self._sinusoids.clear()
        if self._returned or not self.caught:
            self.front.over()

    def when_over(self, call: Callable[[], None]) -> None:
        """Has something called when the compiled call has returned, or raised."""
        alive = self._frame()
        if alive is None:
            call()
        else:
            weakref.finalize(alive, call).atexit = False

    def tokens_of(self, value: Any) -> frozenset[int]:
        """The user's inputs whose tokens a tensor holds, as far as is known."""
        if not stored(value):
            return frozenset()
        users = self._lies_in(value)
        if users:
            return frozenset(users[:1])
        notes = self._notes.get(value.untyped_storage()._cdata, [])
        exact = [n.tokens for n in notes if n.view == view_of(value)]
        return frozenset().union(*(exact or (n.tokens for n in notes)))

    def shown_by(self, value: Any) -> frozenset[int]:
        """The user's inputs that a tensor is known to depend on: what code between graphs has made of one is not."""
        key, view = (value.untyped_storage()._cdata, view_of(value)) if stored(value) else (None, ())
        users = self._lies_in(value) if stored(value) else []
        if users:
            exact = [i for i in users if view_of(self.inputs[i]) == view]
            return frozenset(exact or (users if len(users) == 1 else ()))
        notes = self._notes.get(key, [])
        just = [n for n in notes if n.view == view]
        if just:
            return just[-1].shown
        if notes:  # a part of it, if nobody has written there since
            written = value.is_inference() or any(n.view[-1] != view[-1] for n in notes)
            return frozenset() if written else frozenset.intersection(*(n.shown for n in notes))
        number = as_number(value)
        same = [i for i, v in enumerate(self.inputs) if not isinstance(v, torch.Tensor) and as_number(v) == number]
        return frozenset(same if number is not None and len(same) == 1 else ())

    def weights(self) -> list[torch.Tensor]:
        """All that the model has and that no graph of it writes to; no graph is given those of code between them."""
        return [w for w in weights_of(self.root) if w not in self._written_to]

    @property
    def writes(self) -> bool:
        """Whether something that the user gave it was written to since it began."""
        return any(value._version != version for value, version in self._versions)

    def is_strange(self, value: Any) -> bool:
        """Whether it is a real number that the user has not given; integers are compared as sizes are."""
        number = _real(value)
        if number is None:
            return False
        return all(isinstance(v, torch.Tensor) or as_number(v) != number for v in self.inputs)

    @property
    def time(self) -> tuple[Hashable, ...]:
        """The inputs that tell the time, as far as it is known by now which do, by who they are."""
        return tuple(self.keys[i] for i in sorted(self.timed))

    def is_time(self, number: float) -> bool:
        """Whether the user has given it this number as the time."""
        return any(not isinstance(v := self.inputs[i], torch.Tensor) and as_number(v) == number for i in self.timed)

    def made(self, value: Any) -> bool:
        """Whether one of its graphs has made a tensor, or what it is a view of."""
        return stored(value) and value.untyped_storage()._cdata in self._notes

    def made_since(self, value: Any, begin: int) -> bool:
        """Whether one of its calls, from number `begin` on, has made a tensor, or what it is a view of."""
        notes = self._notes.get(value.untyped_storage()._cdata, []) if stored(value) else []
        return bool(notes) and notes[0].made_by[0] >= begin

    def knows(self, value: Any) -> bool:
        """Whether a tensor lies in what one of its graphs has made, or what the user gave it."""
        return stored(value) and (self.made(value) or bool(self._lies_in(value)))

    def _lies_in(self, value: torch.Tensor) -> list[int]:
        """The user's inputs that a tensor lies in: he may not have given all of a storage."""
        return [i for i in self._user.get(value.untyped_storage()._cdata, ()) if lies_in(value, self.inputs[i])]

    def made_by(self, value: Any) -> Place | None:
        """The call that made just this tensor, if no code between graphs has touched it."""
        notes = self._notes.get(value.untyped_storage()._cdata, []) if stored(value) else []
        return next((n.made_by for n in reversed(notes) if n.view == view_of(value)), None)

    def origin(self, name: str, value: torch.Tensor) -> Origin:
        """Where a tensor comes from that a graph is given by a name."""
        if not stored(value):
            return Origin()
        key = value.untyped_storage()._cdata
        notes = self._notes.get(key)
        if notes is None:
            seen = self._seen.get(key)
            if seen is not None and not value.is_inference() and value._version == seen.version:
                return Origin(frozenset({seen.place}), True)
            return Origin(known=bool(self._lies_in(value)) or is_held(name) or as_number(value) is not None)
        view = view_of(value)
        same = self.made_by(value)
        if same is not None:
            return Origin(frozenset({same}), True)
        written = value.is_inference() or any(n.view[-1] != view[-1] for n in notes)
        return Origin(frozenset(n.made_by for n in notes), not written)

    def origins(self, facts: GraphFacts, args: Sequence[Any]) -> dict[str, Origin]:
        """Where the tensors come from that a graph is given, by name, but for weights. To be asked before it runs."""
        return {
            name: self.origin(name, a)
            for name, a in ((facts.names[i], args[i]) for i in facts.given)
            if isinstance(a, torch.Tensor)
        }

    def note(self, facts: GraphFacts, args: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Remembers of the outputs of one more graph where they come from; it did not make what it hands through."""
        if self.weight is None:
            self.weight = next((args[i] for i in facts.roles.weights if isinstance(args[i], torch.nn.Parameter)), None)
        unknown = frozenset({UNKNOWN})
        tokens = {i: self.tokens_of(args[i]) or unknown for sources in facts.tokens for i in sources}
        known = set(facts.roles.weights)
        read = {i for sources in facts.shown for i in sources}
        shown = {i: frozenset() if i in known else self.shown_by(args[i]) or unknown for i in read}
        kept = [a for i, a in enumerate(args) if stored(a) and i not in facts.written]
        through = {memory_of(a) for a in kept}
        for k, (output, sources, behind) in enumerate(zip(outputs, facts.tokens, facts.shown, strict=True)):
            if stored(output):
                storage = output.untyped_storage()
                held = frozenset().union(*(tokens[i] for i in sources))
                self._held[self.count, k] = held
                if memory_of(output) in through:
                    continue
                self._sinusoids[self.count, k] = [args[i] for i in facts.sinusoids[k] if stored(args[i])]
                depends = self._showing[self.count, k] = frozenset().union(*(shown[i] for i in behind))
                note = _Note(StorageWeakRef(storage), (self.count, k), view_of(output), held, depends)
                self._notes.setdefault(storage._cdata, []).append(note)
                self._alive += [note] if self.calls else []
        for i, arg in enumerate(args):
            if i not in known and i not in facts.written and stored(arg) and not arg.is_inference():
                self._see(arg, (self.count, given_as(i)))
        self.count += 1

    def _see(self, value: torch.Tensor, place: Place) -> None:
        """Takes notice that a call was given a tensor."""
        storage = value.untyped_storage()
        seen = self._seen.get(storage._cdata)
        if not self.knows(value) and (seen is None or seen.version != value._version):
            self._seen[storage._cdata] = _Seen(StorageWeakRef(storage), place, value._version)

    def trace(
        self,
        family: Hashable,
        facts: GraphFacts,
        args: Sequence[Any],
        outputs: Sequence[Any],
        origins: Mapping[str, Origin],
        joined: Mapping[str, Joined],
        unseen: Mapping[str, frozenset[Place]],
    ) -> None:
        """Adds a call to `calls`; before its outputs are noted.

        Args:
            family: the code that was called.
            facts: the graph.
            args: what it was called with.
            outputs: what it made.
            origins: where the tensors come from that it was given, as it stood before.
            joined: for inputs, by name, the output that they hold a part of; for those that no call made as they are.
            unseen: those, by name, that nobody known made, and that are others than at the code's call before; with
                outputs that they do not go on with.
        """

        def trace(name: str, value: torch.Tensor) -> InputTrace:
            made_by = self.made_by(value)
            place, others = joined.get(name, (made_by, (0, 0)))
            tokens = self.tokens_of(value) or self._held.get(place, frozenset())
            notes = self._notes.get(value.untyped_storage()._cdata) if stored(value) else None
            memory = notes[0].made_by[0] if notes else None
            whole = place == made_by
            origin = origins[name]
            if not (whole or origin.known):
                origin = Origin(frozenset({place}) if place else frozenset())
            shown = self.shown_by(value) or self._showing.get(place, frozenset()) | {UNKNOWN}
            added = unseen.get(name)
            form, is_unseen = form_of(value), added is not None
            return InputTrace(
                form, place, tokens, others, whole, memory, is_unseen, added or frozenset(), origin, shown
            )

        self._alive = [n for n in self._alive if not n.reference.expired()]
        self._held_at |= {n.made_by: self.count for n in self._alive}
        if not self._owners and isinstance(self.root, torch.nn.Module):
            self._owners = {id(p): name for name, p in self.root.named_parameters()}
        owner = next((name for i in facts.roles.weights if (name := self._owners.get(id(args[i])))), "")
        inputs = {
            name: trace(name, a)
            for name, a in ((facts.names[i], args[i]) for i in facts.given)
            if isinstance(a, torch.Tensor)
        }
        forms = tuple(form_of(o) if isinstance(o, torch.Tensor) else None for o in outputs)
        through = frozenset(k for k, name in enumerate(handed_through(facts, args, outputs)) if name is not None)
        memory = Counter(v.untyped_storage()._cdata for v in (*outputs, *args) if stored(v))
        shared = frozenset(k for k, o in enumerate(outputs) if stored(o) and memory[o.untyped_storage()._cdata] > 1)
        self.calls.append(Call(family, facts, owner, inputs, forms, through, shared))

    def see_schedule(self, facts: GraphFacts, args: Sequence[Any]) -> None:
        """Learns from a graph which of the user's inputs are the timestep or the like: for this forward and others."""
        for i in (i for i in facts.roles.schedule if stored(args[i])):
            self._tell(args[i], i in facts.roles.timed, (self.count, facts.program.wiring, i))
        for i in facts.linear:
            for k, value in enumerate(self._sinusoids.get(self.made_by(args[i]), ())):
                self._tell(value, True, (self.count, facts.program.wiring, i, k))

    def _tell(self, value: torch.Tensor, embedded: bool, place: Hashable) -> None:
        """A graph takes something for the timestep or the like: it is an input, or code between graphs has made it."""
        given = self._given_as(value)
        self.habits.tell(given, embedded)
        if embedded and not given:
            self.habits.embeds(place, value, self._learnt)

    def _given_as(self, value: torch.Tensor) -> frozenset[int]:
        """The user's input that a tensor is, or a view of it."""
        itself = frozenset(i for i, v in enumerate(self.inputs) if v is value)
        return itself or (self.shown_by(value) if self._lies_in(value) else itself)

    def latent_like(self, shapes: Sequence[Shape]) -> frozenset[int]:
        """The user's inputs that have some outputs' shapes, up to channels, where it is clear which has which."""
        return fitting(self._untimed, shapes).alone

    def came_back(self, returned: Sequence[Any]) -> None:
        """Takes notice of what the model returns (`contents`)."""
        shapes = [tuple(t.shape) for t in returned if stored(t) and t.is_floating_point()]
        self.habits.came_back(self._untimed, shapes)
        if self._learnt is not None:
            self._learnt.came_out(returned)
        notes = (n for t in returned if stored(t) for n in self._notes.get(t.untyped_storage()._cdata, []))
        self._held_at |= {n.made_by: self.count for n in notes}

    @property
    def traced(self) -> list[Call]:
        """Its graphs' calls, with how long somebody held what each of them made."""
        return [
            replace(call, held={i: at for i in call.tensors if (at := self._held_at.get((k, i))) is not None})
            for k, call in enumerate(self.calls)
        ]

    def may_come_back(self) -> None:
        """Takes what its last graph made for what the model returns, as long as nothing better is known."""
        forms = self.calls[-1].outputs if self.calls else ()
        self.habits.may_come_back(self._untimed, [form[0] for form in forms if form is not None])

    @property
    def _untimed(self) -> list[Any]:
        """The inputs, with None for those that tell the time."""
        timed = self.telling
        return [None if i in timed else v for i, v in enumerate(self.inputs)]

    def end(self, result: Any) -> bool:
        """It is over; returns whether the result counts."""
        self._returned = True
        returned: list[Any] = []
        with guarded("came_back"):
            returned = contents(result)
            self.came_back(returned)
            self._see_writes()
        with guarded("end"):
            return self.run is None or bool(self.run.end(returned))
        return not self.reusing

    def learn(self) -> None:
        """Learns from its inputs what other forwards are to know of them; from what comes back, when it ends."""
        self._learnt = self.habits.see(self.inputs, self.keys, self.telling)

    def know(self, habits: Habits, written: Container[torch.Tensor]) -> None:
        """Takes what other forwards have shown: what only they have written to is what it was.

        Args:
            habits: what they have shown of the inputs.
            written: what graphs of the model write to.
        """
        self.habits, self._written_to = habits, written
        begun = {id(v): version for v, version in self._versions}
        for i, v in enumerate(self.inputs):
            if stored(v) and not v.is_inference():
                version = begun.get(id(v), v._version)
                self._first_versions[i] = version, habits.writes.origin(v, version)
        for i in habits.own & self._first_versions.keys():
            key = self.keys[i]
            if key is not None and isinstance(key[0], tuple) and key[0][-1] == self.inputs[i]._version:
                self.keys[i] = ((*key[0][:-1], self._first_versions[i][1]),)
        for i, (hold, origin) in habits.put.items():
            if i < len(self.keys) and (key := self.keys[i]) is not None and hold.same([self.inputs[i]], key):
                self.keys[i] = origin

    def _see_writes(self) -> None:
        """Takes notice of what it has written to, or put in another's place, among what it was given."""
        written = [i for i, (version, _) in self._first_versions.items() if self.inputs[i]._version != version]
        self.habits.writes.wrote([self.inputs[i] for i in written], [self._first_versions[i][1] for i in written])
        now = contents(self._given)
        pairs = enumerate(zip(now, self.inputs, strict=True)) if len(now) == len(self.inputs) else ()
        # Only what can be recognised: another value may be what the user has put there, and equal.
        put = {i: v for i, (v, before) in pairs if v is not before and is_one(v) and self.keys[i] is not None}
        self.habits.put = {i: (StorageHold([v]), self.keys[i]) for i, v in put.items()}
        self.habits.own |= {*written, *put}

    @property
    def reusing(self) -> bool:
        return self.run is not None and bool(self.run.reusing)

    def again(self) -> None:
        self.run = self.run.again()

    @property
    def batch(self) -> int:
        """Size of dim 0 of what is denoised; 0 where that is not known."""
        latents = self.habits.latents()
        sizes = {self.inputs[i].shape[0] for i in latents if self.inputs[i].ndim}
        return sizes.pop() if len(sizes) == 1 else 0

    def given(
        self, denoised: Collection[int] = (), shown: Sequence[frozenset[int]] = (), front: Front | None = None
    ) -> Given:
        """What the user gave this forward.

        Args:
            denoised: the inputs that a graph shows to be.
            shown: for each span that asks, the inputs that its probe is known to depend on.
            front: what it has run until now, for spans of one graph.
        """
        latents = self.habits.latents(denoised)
        timed = self.timed - latents
        schedule = [on_host(self._times.get(i, self.inputs[i])) for i in sorted(timed)]
        others = [i for i in range(len(self.inputs)) if i not in latents and i not in timed]
        opaque = [type(self.inputs[i]).__name__ for i in others if self.keys[i] is None]
        fixed = [self.inputs[i] for i in others if self.keys[i] is not None]
        doubt = None if latents else moves.UNKNOWN_LATENT
        if doubt is None and self.telling and not self.habits.knows_time:
            doubt = moves.UNKNOWN_TIME
        if opaque:
            doubt = OPAQUE.format(opaque[0])
        return Given(
            tuple((i, self.keys[i]) for i in others),
            tuple((i, self.keys[i]) for i in others if stored(self.inputs[i])),
            tuple(self.control(of_span, denoised) for of_span in shown),
            (),
            signature([t for t in self.inputs if stored(t)]),
            schedule,
            fixed,
            doubt,
            tuple(self.inputs[i] for i in sorted(latents)),
            tuple(k for k, i in enumerate(sorted(timed)) if i in self.habits.times),
            self.habits.together,
            front=front,
        )

    @property
    def step_of(self) -> Hashable:
        """What it may be a step of: a named pass, a named request, or whatever has its conditioning."""
        named = named_session()
        if named is not None:
            return named.name, named.branch
        moving = self.habits.latents() | self.timed
        return tuple((i, key) for i, key in enumerate(self.keys) if i not in moving)

    def control(self, shown: frozenset[int], denoised: Collection[int] = ()) -> Control:
        """What may change from step to step, and reach a span and not its probe.

        Which graphs read what, and which the code between them does, is not known: it is everything that the probe is
        not known to depend on, but for the conditioning where the pass is known by that already. Which input is the
        time is seen from step to step of a request (`Times`).

        Args:
            shown: the inputs that the probe is known to depend on.
            denoised: those that a graph shows to be.
        """
        named, latents = named_session(), self.habits.latents(denoised)
        # What is denoised goes through every span; which of several does is known where each comes back by itself.
        if len(latents) == 1 or (not latents & shown and latents <= self.habits.alone):
            shown |= latents
        moving = latents | self.timed
        apart = named is not None and named.branch is not None
        asked = [i for i in range(len(self.inputs)) if (i not in moving and apart) or i in moving - shown]
        opaque = next((type(self.inputs[i]).__name__ for i in asked if self.keys[i] is None), None)
        doubt = moves.UNKNOWN_LATENT if not latents else None if opaque is None else OPAQUE.format(opaque)
        timed = [i for i in sorted(self.timed - latents) if self.keys[i] is not None]
        others = replace(self._control([i for i in asked if i not in timed]), doubt=doubt)
        unsure = frozenset(k for k, i in enumerate(timed) if i in asked)
        return replace(others, times=self._control(timed), asked=unsure) if unsure else others

    def _control(self, asked: Sequence[int]) -> Control:
        """Some inputs, but for those of which it cannot be said who they are."""
        keys = {i: key for i in asked if (key := self.keys[i]) is not None}
        own = frozenset(k for k, i in enumerate(keys) if i in self.habits.own)
        return Control([self.inputs[i] for i in keys], tuple(k for key in keys.values() for k in key), own)

    @property
    def written(self) -> bool:
        """Whether its conditioning, as far as it is known by more than its value, was written to since it began."""
        moving = self.habits.latents() | self.timed
        kept = [(v, key) for i, (v, key) in enumerate(zip(self.inputs, self.keys, strict=True)) if i not in moving]
        return any(key is not None and identity_key([v]) != key for v, key in kept)

    @property
    def not_denoised(self) -> frozenset[int]:
        """The inputs of which it is known that they are not denoised."""
        latents = self.habits.latents()
        known = frozenset(range(len(self.inputs))) - latents if latents else self.habits.resting
        return known | self.telling

    @cached_property
    def counts(self) -> frozenset[int]:
        """The time, where it is given as an integer, as far as it is known when that is asked first."""
        return frozenset(v for i in self.timed if type(v := self.inputs[i]) is int)

    @property
    def timed(self) -> frozenset[int]:
        """The inputs that tell the time: a graph takes them so, they look so, or they move with what is denoised."""
        return self.telling | self.habits.schedule

    @property
    def telling(self) -> frozenset[int]:
        """The inputs that tell the time, but for those of which that is only learned."""
        looks = {i for i, v in enumerate(self.inputs) if stored(v) and is_counted(v) and _looks_like_time(v)}
        return self.habits.told | looks


class _Alive:
    """What lives as long as a frame does."""


def _nothing() -> None:
    return None


def weakly(value: Any) -> Callable[[], Any]:
    """Gives a value back as long as somebody else holds it; one that cannot be held weakly, always."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


@dataclass(frozen=True)
class Surroundings:
    """Where something runs.

    Attributes:
        compiled_call: the frame of the compiled call around it, None if there is none.
        innermost: the innermost frame of user code within that.
        depth: how many such frames there are. Around a running graph these are the captured code and what called it:
            one frame where the graph begins the compiled code itself, more where it is in a function that this calls,
            or behind a graph break. While code is being captured it is not among them: then it is one less.
    """

    compiled_call: FrameType | None
    innermost: FrameType | None
    depth: int

    @property
    def forward(self) -> Forward | None:
        """The execution of the compiled call."""
        return None if self.compiled_call is None else _forward_of(self.compiled_call)

    @property
    def compilation(self) -> Any:
        """What ``torch.compile`` made; None outside a compiled call."""
        return None if self.compiled_call is None else self.compiled_call.f_locals.get("self")

    @property
    def root(self) -> Any:
        """The module or function that was compiled; None outside a compiled call."""
        return None if self.compiled_call is None else _root_of(self.compiled_call.f_locals)


def surroundings() -> Surroundings:
    """Where this is called."""
    innermost: FrameType | None = None
    depth = 0
    at: FrameType | None = sys._getframe(1)
    while at is not None:
        code = at.f_code
        if _is_compiled_call(code):
            return Surroundings(at, innermost, depth)
        if code.co_filename == convert_frame.__file__:
            innermost, depth = None, 0  # whatever was on the way from there captures, and is not captured
        elif not code.co_filename.startswith(_MACHINERY):
            innermost = innermost or at
            depth += 1
        at = at.f_back
    return Surroundings(None, innermost, depth)


def _is_compiled_call(code: CodeType) -> bool:
    return code.co_filename == eval_frame.__file__ and code.co_qualname.startswith(_COMPILED_CALL)


def _compiled_calls() -> Iterator[FrameType]:
    """The frames of compiled calls that are under way in this thread, from the innermost one."""
    at: FrameType | None = sys._getframe(1)
    while at is not None:
        if _is_compiled_call(at.f_code):
            yield at
        at = at.f_back


def family_of(frame: FrameType | None, facts: GraphFacts) -> Hashable:
    """Which code a graph was captured from; the same for graphs that it was captured in anew."""
    code = None if frame is None else frame.f_code
    return facts.frame, *(() if code is None else (code.co_filename, code.co_qualname, code.co_firstlineno))


def _forward_of(frame: FrameType) -> Forward:
    """The forward of a compiled call's frame: made at the first look."""
    found = _under_way(frame)
    if found is None:
        begun = versions_at_begin(frame)
        caught = spread(frame, _under_way) and begun is not None
        local = frame.f_locals
        found = Forward(
            _root_of(local), local.get("self"), local.get("args", ()), local.get("kwargs", {}), caught, begun
        )
        found.begins(frame)
        local[_KEPT_AS] = found
    return found


def _under_way(frame: FrameType) -> Forward | None:
    found = frame.f_locals.get(_KEPT_AS)
    assert found is None or isinstance(found, Forward)
    return found


def _root_of(local: Mapping[str, Any]) -> Any:
    called = plain(local.get("fn"))
    return getattr(called, "__self__", called)


def _looks_like_time(value: torch.Tensor) -> bool:
    return value.ndim == 0 or (value.ndim == 1 and value.is_floating_point())


def _real(value: Any) -> float | None:
    """A real number that a graph is given."""
    return None if isinstance(value, int) or (isinstance(value, torch.Tensor) and value.ndim) else as_number(value)


def handed_through(facts: GraphFacts, args: Sequence[Any], outputs: Sequence[Any]) -> list[str | None]:
    """Which input, not written to, each output of a call is, by name."""
    given = {memory_of(a): facts.names[i] for i, a in enumerate(args) if stored(a) and i not in facts.written}
    return [given.get(memory_of(output)) if stored(output) else None for output in outputs]


def comparable(value: Any) -> bool:
    """Whether it can be said of an input that it is the same as before."""
    return (isinstance(value, PLAIN) and type(value).__hash__ is not None) or stored(value)


def form_of(value: torch.Tensor) -> Form:
    """Shape and dtype of a tensor."""
    return tuple(value.shape), value.dtype
