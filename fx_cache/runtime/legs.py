"""One span over several graphs, in one forward: what its graphs made, and what they give back on a hit."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fx_cache.errors import Failure, guarded
from fx_cache.ops import residual_diff, residual_sums
from fx_cache.patterns.beside import Beside, Renewal
from fx_cache.patterns.calls import GraphFacts, Origin, Part, Place, layout
from fx_cache.patterns.relays import RelayPlan
from fx_cache.patterns.stretches import RelayStream, ended_by
from fx_cache.runtime.batches import Separation
from fx_cache.runtime.forwards import Forward, Joined, form_of, handed_through
from fx_cache.runtime.front import (
    OTHER_CALLS,
    Front,
    Strangers,
    held_by,
    strangers,
    weights_of_call,
    without_numbers,
)
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.identity import any_of, differs, identity_key, signature, stored
from fx_cache.runtime.memory import ViewOf, copied, laid_out, parts_of
from fx_cache.runtime.net import Astray
from fx_cache.runtime.sessions import Store
from fx_cache.runtime.slots import Branch
from fx_cache.runtime.weights import CHANGED, Held, is_number

RECENT = 16
"""Calls back to which the outputs are looked through for what a tensor is made of."""

HELD = 0.25
"""The part of a tensor's tokens that are those of an output, at the same places, where it goes on from that."""


BESIDE = "its blocks made something beside their streams that cannot be made without them"
WRITES = "the forward writes to tensors from outside before the span ends, and could not be begun anew"
UNPLANNED = "a forward meanwhile did not run as planned, and may have been a step of the request"


class Graph(Protocol):
    """A compiled graph."""

    facts: GraphFacts

    def step(self, forward: Forward, args: Sequence[Any]) -> Any:
        """Runs it, with whatever it caches by itself."""

    def compute(self, *args: Any) -> Any:
        """Runs it, and caches nothing."""


class Misfit(BaseException):
    """A forward does not go as planned. Nothing was skipped in it: it computes on. No error, as `Astray` is none."""


@dataclass(eq=False)
class Called:
    """Which call of a forward it was: of what code, with tensors of which shapes, and for which weights.

    Attributes:
        what: the code, what the graph computes, the forms of all inputs but weights, where they come from, the numbers
            that the model holds, and real ones that the user has not given. The time is none of it, where it is an
            integer.
        weights: those that it was given, as they were, and what else it found outside the forward.
        strangers: tensors that code between graphs has given it.
    """

    what: Hashable
    weights: Held
    strangers: Strangers

    @classmethod
    def of(
        cls,
        forward: Forward,
        graph: Graph,
        family: Hashable,
        args: Sequence[Any],
        begin: int,
        origins: Mapping[str, Origin],
    ) -> Called:
        """A call, of a span that begins with the forward's call of number `begin`."""
        held = _held(forward, graph, args)
        what = _what(forward, graph, family, args, begin, held, origins)
        return cls(what, Held(without_numbers(held)), strangers(forward, graph.facts, args))

    def same(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any], begin: int) -> bool:
        """Whether a call is this one, and nobody has replaced its weights, or written to them."""
        all_held = _held(forward, graph, args)
        if self.what != _what(forward, graph, family, args, begin, all_held, forward.origins(graph.facts, args)):
            return False
        if not self.strangers.same(strangers(forward, graph.facts, args)):
            return False
        return self.weights.same(without_numbers(all_held))

    def differs(self, now: Any) -> str | None:
        """Why what comes behind another forward's call may be something else; None: it is not."""
        if not isinstance(now, Called) or self.what != now.what or not self.strangers.same(now.strangers):
            return OTHER_CALLS
        return None if self.weights.equals(now.weights) else CHANGED

    def over(self) -> None:
        """The forward that made the call has returned: what has not outlived it was made in it."""
        self.strangers.over()


def _held(forward: Forward, graph: Graph, args: Sequence[Any]) -> list[torch.Tensor]:
    """The weights that a graph is given, and whatever else is held outside the forward."""
    return weights_of_call(graph.facts, args) + held_by(forward, graph.facts, args)


def _what(
    forward: Forward,
    graph: Graph,
    family: Hashable,
    args: Sequence[Any],
    begin: int,
    held: Sequence[torch.Tensor],
    origins: Mapping[str, Origin],
) -> Hashable:
    roles = graph.facts.roles
    scalars = [i for i in roles.scalars if args[i] not in forward.counts]
    forms = signature([args[i] for i in graph.facts.given])
    others = [(graph.facts.names[i], args[i]) for i in graph.facts.given if forward.is_strange(args[i])]
    numbers = tuple(name for name, _ in others), identity_key([number for _, number in others])
    return (
        family,
        graph.facts.program.at(args, scalars),
        forms,
        frozenset((name, *_seen_from(origin, begin)) for name, origin in origins.items()),
        identity_key([a for a in held if is_number(a)]),
        numbers,
    )


def _seen_from(origin: Origin, begin: int) -> tuple[frozenset[Place | None], bool]:
    """The same for another forward: calls are counted from the span's first one, those before it not told apart."""
    return frozenset((at - begin, output) if at >= begin else None for at, output in origin.of), origin.known


def written_by(graph: Graph, args: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The inputs that a call has written to, by name."""
    return {graph.facts.names[i]: a for i in graph.facts.written if isinstance(a := args[i], torch.Tensor)}


@dataclass(frozen=True)
class Entry:
    """What one call in a span gives back.

    Attributes:
        called: which call it was.
        outputs: of each output what it is: the name of an input that is handed through; of a stream that ends with it
            the number, the strides it has, and the input that it is, if any; of one that goes on number, strides, and
            the number of the stored tensor that says how far it had come; the number of a stored tensor; of a part of
            another output the number of that, size, strides and where it begins; of a view of an input its name and
            how; that it is made anew; or itself.
        written: inputs that it writes to, by name, and the number of the stored tensor that says what.
        runs: whether the call is run.
        part: what makes anew those of the outputs that are, if any.
        compared: inputs that have to be what they were, by name, and the number of the stored tensor that is that.
    """

    called: Called
    outputs: tuple[tuple[str, Any], ...]
    written: tuple[tuple[str, int], ...]
    runs: bool
    part: Part | None
    compared: tuple[tuple[str, int], ...]


class Script:
    """The calls of a span, as they were when it was computed, and the tensors that they made.

    Attributes:
        unplanned: stands for the forwards before it that did not run as planned.
        writes: whether something that the user gave was written to by its end.
        torn: whether tensors that shared memory would not, given back.
    """

    def __init__(self, streams: int, unplanned: Hashable) -> None:
        self.unplanned = unplanned
        self.writes = False
        self.torn = False
        self.entries: list[Entry] = []
        self.residuals: list[torch.Tensor | None] = [None] * streams
        self.values: list[torch.Tensor] = []

    def add(
        self,
        called: Called,
        through: Sequence[str | None],
        outputs: Sequence[Any],
        written: Mapping[str, torch.Tensor],
        ends: dict[int, int],
        passed: dict[int, int],
        renewal: Renewal,
        part: Part | None,
        compared: Mapping[str, torch.Tensor],
        starts: Sequence[torch.Tensor],
        views: Mapping[int, tuple[str, ViewOf | None]],
    ) -> None:
        """Keeps what a call made.

        Args:
            called: which call it was.
            through: which of its inputs each output is, if any (`handed_through`).
            outputs: what it made.
            written: the inputs that it wrote to, by name (`written_by`).
            ends: for outputs that end a stream, its number.
            passed: the same for those that are a stream on its way: code between graphs may make something of it.
            renewal: what a hit does about it.
            part: what makes outputs anew, if any.
            compared: inputs that have to be the same on a hit, by name.
            starts: what each stream began with.
            views: for outputs that are views of inputs, and not these, the input and how, if that can be told.
        """
        kept: list[tuple[str, Any]] = []
        anew = set(range(len(outputs)) if renewal.outputs is None else renewal.outputs)
        own = [k for k, same in enumerate(through) if stored(outputs[k]) and same is None and k not in views]
        streams = {*ends, *passed}
        parts, torn = parts_of({k: outputs[k] for k in own}, streams, anew)
        torn = torn or any(view is None or (name in written and k in streams) for k, (name, view) in views.items())
        self.torn = self.torn or (torn and renewal.outputs is not None)
        for k, (output, same) in enumerate(zip(outputs, through, strict=True)):
            stream = ends.get(k)
            if k in anew:
                kept.append(("anew", None))
            elif k in parts:
                kept.append(("part", parts[k]))
            elif k in views and stream is None and k not in passed:
                kept.append(("view", views[k]))
            elif not isinstance(output, torch.Tensor):
                kept.append(("constant", output))
            elif same is not None and stream is None:
                kept.append(("input", same))
            elif stream is not None:
                kept.append(("stream", (stream, output.stride(), same)))
                self.residuals[stream] = output - starts[stream]
            elif k in passed:
                self.values.append(output - starts[passed[k]])
                kept.append(("on its way", (passed[k], output.stride(), len(self.values) - 1)))
            else:
                kept.append(("value", self._keep(output)))
        writes, unchanged = (tuple((n, self._keep(v)) for n, v in some.items()) for some in (written, compared))
        self.entries.append(Entry(called, tuple(kept), writes, renewal.outputs is None, part, unchanged))

    def tell(self, at: int, called: Called) -> None:
        """Tells a call that is run instead of that of number `at` which of its tensors are held somewhere."""
        before = self.entries[at].called if at < len(self.entries) else None
        if before is not None and before.what == called.what:
            before.strangers.same(called.strangers)

    def _keep(self, value: torch.Tensor) -> int:
        self.values.append(copied(value))
        return len(self.values) - 1

    def goes_on(
        self, at: int, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any], begin: int
    ) -> bool:
        """Whether a call is that of number `at`, of a span that begins with the forward's call of number `begin`."""
        return at < len(self.entries) and self.entries[at].called.same(forward, graph, family, args, begin)

    def outputs(
        self, at: int, graph: Graph, args: Sequence[Any], starts: Sequence[torch.Tensor]
    ) -> tuple[Any, ...] | None:
        """What a call gives back, given what each stream begins with now; writes what it wrote.

        Returns:
            The outputs; None: it is to be run.
        """
        outputs: list[Any] = []
        names, entry = graph.facts.names, self.entries[at]
        if entry.runs:
            return None
        if any(name not in names for name, _ in entry.written):
            raise Astray
        made = iter(() if entry.part is None else entry.part(args))
        for kind, what in entry.outputs:
            if kind == "anew":
                outputs.append(next(made))
            elif kind == "input":
                if what not in names:
                    raise Astray
                outputs.append(args[names.index(what)])
            elif kind == "stream":
                stream, strides, same = what
                residual = self.residuals[stream]
                assert residual is not None
                # What is handed through has come as far already.
                through = same is not None and same in names
                outputs.append(args[names.index(same)] if through else laid_out(starts[stream] + residual, strides))
            elif kind == "on its way":
                stream, strides, number = what
                outputs.append(laid_out(starts[stream] + self.values[number], strides))
            elif kind == "part":
                outputs.append(None)
            elif kind == "view":
                name, view = what
                if name not in names or (seen := view.of(args[names.index(name)])) is None:
                    raise Astray
                outputs.append(seen)
            else:
                outputs.append(copied(self.values[what]) if kind == "value" else what)
        for k, (kind, what) in enumerate(entry.outputs):
            if kind == "part":
                of, size, strides, begin = what
                outputs[k] = outputs[of].as_strided(size, strides, outputs[of].storage_offset() + begin)
        for name, number in entry.written:  # last: behind an error of ours it is run
            args[names.index(name)].copy_(self.values[number])
        return tuple(outputs)

    def changed(self, at: int, graph: Graph, args: Sequence[Any]) -> list[torch.Tensor]:
        """Of the inputs that have to be what they were, whether they are not, as tensors: nothing is waited for."""
        compared = self.entries[at].compared
        return [differs(_argument(graph, args, name), self.values[number]) for name, number in compared]

    def ended(self, at: int) -> set[int]:
        """The streams that a call ends."""
        return {what[0] for kind, what in self.entries[at].outputs if kind == "stream"}

    def tensors(self, probe: torch.Tensor) -> list[torch.Tensor]:
        """Everything that is stored: the probe, the residuals, the values."""
        residuals = [r for r in self.residuals if r is not None]
        assert len(residuals) == len(self.residuals)
        return [probe, *residuals, *self.values]


def _passed(plan: RelayPlan, family: Hashable, number: int) -> dict[int, int]:
    """Which tensors that a call gives back are streams of the span, on their way from one block to the next."""
    blocks = range(plan.ranges[1][0], plan.ranges[1][1] - 1)
    return {
        s.output: k
        for k, s in enumerate(plan.streams)
        if any(s.maker.is_call(family, number, block) for block in blocks)
    }


def _probe(stream: RelayStream, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What the head adds to a stream, without tokens that are joined to it before every block."""
    begin, end = stream.others
    if begin or end:
        before, after = (x[:, begin : x.shape[1] - end] for x in (before, after))
    return after - before


def _is_moved(output: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a value has the numbers of an output in other places."""
    if torch.equal(output, value) or not output.numel() or output.aminmax() != value.aminmax():
        return False
    return torch.equal(output.flatten().sort().values, value.flatten().sort().values)


def _joined_to(made: torch.Tensor, value: torch.Tensor) -> tuple[int, int] | None:
    """How many tokens stand before and behind those of `made` in a tensor that holds many of them, from either end."""
    if made.dtype != value.dtype or made.ndim != value.ndim or made.shape[2:] != value.shape[2:]:
        return None
    if made.shape[0] != value.shape[0]:
        return None
    count, longest = min(made.shape[1], value.shape[1]), value.shape[1]
    for ours, offset in ((made[:, :count], 0), (made[:, made.shape[1] - count :], longest - count)):
        there = value[:, offset : offset + count]
        same = ((ours == there) & (there != 0)).transpose(0, 1).flatten(1).all(dim=1)
        at = same.nonzero().flatten().tolist()
        if at and len(at) >= HELD * longest and len(at) == at[-1] + 1 - at[0]:
            return offset + at[0], longest - 1 - offset - at[-1]
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class WatchRun:
    """A forward that is watched: computes, and remembers its calls.

    Attributes:
        failure: an error of ours that ended that.
    """

    reusing = False

    def __init__(self) -> None:
        self.failure: Failure | None = None
        self._count = 0
        self._outputs: deque[tuple[Any, ...]] = deque(maxlen=RECENT)
        self._made: dict[Hashable, dict[str, torch.Tensor]] = {}
        self._given: dict[Hashable, dict[str, torch.Tensor]] = {}

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        began: dict[str, torch.Tensor] = {}
        origins: dict[str, Origin] = {}
        with guarded("watch") as before:
            forward.front.add(forward, graph.facts, family, args)
            began, origins = self._before(forward, graph, args), forward.origins(graph.facts, args)
        outputs = graph.step(forward, args)
        with guarded("watch") as behind:
            if self.failure is None and before.failure is None:
                self._behind(forward, graph, family, args, outputs, began, origins)
        self.failure = self.failure or before.failure or behind.failure
        return outputs

    def _before(self, forward: Forward, graph: Graph, args: Sequence[Any]) -> dict[str, torch.Tensor]:
        """What a call is given that no call made, as it is now."""
        facts = graph.facts
        return {
            name: a.detach().clone()
            for name, a in ((facts.names[i], args[i]) for i in facts.given)
            if isinstance(a, torch.Tensor) and self._is_new(forward, a)
        }

    def _behind(
        self,
        forward: Forward,
        graph: Graph,
        family: Hashable,
        args: Sequence[Any],
        outputs: Sequence[Any],
        began: dict[str, torch.Tensor],
        origins: dict[str, Origin],
    ) -> None:
        """Remembers what came of a call."""
        joined = {name: found for name, a in began.items() if (found := self._holds(a)) is not None}
        unseen = self._unseen(family, {n: a for n, a in began.items() if n not in joined})
        facts = graph.facts
        given = {facts.names[i]: args[i] for i in facts.given}
        # Copies: how long somebody else holds what was made is looked at.
        self._given[family] = began | {n: a.detach().clone() for n, a in given.items() if stored(a) and n not in began}
        forward.trace(family, graph.facts, args, outputs, origins, joined, unseen)
        forward.note(graph.facts, args, outputs)
        self._outputs.append(tuple(o.detach().clone() if isinstance(o, torch.Tensor) else o for o in outputs))
        self._count += 1

    def end(self, returned: Sequence[Any]) -> bool:
        del returned
        return True

    def forget(self) -> None:
        """The forward is over."""
        self._outputs.clear()
        self._made.clear()
        self._given.clear()

    def again(self) -> WatchRun:
        return self

    def _unseen(self, family: Hashable, made: dict[str, torch.Tensor]) -> dict[str, frozenset[Place]]:
        """Which of the inputs that nobody known made hold other numbers than at the call before of the same code.

        With the outputs that they do not go on with, as far as can be seen.
        """
        before, self._made[family] = self._made.get(family), made
        if before is None:
            return {}
        others = {name: a for name, a in made.items() if name not in before or not _equal(a, before[name])}
        given = self._given.get(family, {})
        return {name: self._added(a, given.get(name)) for name, a in others.items()}

    def _added(self, value: torch.Tensor, before: torch.Tensor | None) -> frozenset[Place]:
        """The outputs that a value does not go on with.

        They make what was before more like it than they are themselves, or have its numbers in other places.
        """
        if not value.is_floating_point():
            return frozenset()
        before = None if before is None or before.shape != value.shape else before
        return frozenset(
            (self._count - i, k)
            for i, outputs in enumerate(reversed(self._outputs), 1)
            for k, output in enumerate(outputs)
            if isinstance(output, torch.Tensor) and output.shape == value.shape and output.dtype == value.dtype
            if (before is not None and (value - before - output).norm() < (value - output).norm())
            or _is_moved(output, value)
        )

    def _holds(self, value: torch.Tensor) -> Joined | None:
        """Which output a tensor holds tokens of, where code between the graphs cut it and joined it with others."""
        if value.ndim < 3 or not value.is_floating_point() or not value.numel():
            return None
        for i, outputs in enumerate(reversed(self._outputs), 1):
            for k, output in enumerate(outputs):
                others = _joined_to(output, value) if isinstance(output, torch.Tensor) else None
                if others is not None:
                    return (self._count - i, k), others
        return None

    def _is_new(self, forward: Forward, value: torch.Tensor) -> bool:
        """Whether a tensor is none of the outputs kept; in inference mode writes to those cannot be seen."""
        return value.is_inference() or forward.made_by(value) is None


class Leg:
    """One span over several graphs, in one forward."""

    def __init__(self, plan: RelayPlan, number: int) -> None:
        self._plan = plan
        self._number = number
        self._head: torch.Tensor | None = None
        self._came: dict[int, torch.Tensor] = {}
        self._handed: dict[tuple[int, int | None], torch.Tensor] = {}
        self._starts: list[torch.Tensor] = []
        self._probe: torch.Tensor | None = None
        self._gate: SpanGate | None = None
        self._branch: Branch | None = None
        self._script: Script | None = None
        self._at = 0
        self._ended: set[int] = set()
        self._hit = False
        self._called: Called | None = None
        self._passed: Called | None = None
        self._call = 0
        self._beside: Beside | None = None
        self._front: Front | None = None
        self._former: Script | None = None
        self._origins: dict[str, Origin] = {}
        self._changed: list[torch.Tensor] = []

    @property
    def over(self) -> bool:
        return len(self._ended) == len(self._plan.streams)

    @property
    def passed(self) -> Called | None:
        """The present call, run or skipped; None: it lies before the span."""
        return self._passed

    @property
    def hit(self) -> bool:
        """Whether it gives back what was made at another step."""
        return self._hit

    @property
    def reusing(self) -> bool:
        """Whether it has skipped calls, and is not over, or not known to have been right."""
        return self._hit and self._at > 0 and (not self.over or bool(self._changed))

    def begins(self, graph: Graph, family: Hashable, args: Sequence[Any], number: int) -> bool:
        """Takes notice of a call, the one of that number of its family, and says whether the span begins with it."""
        main = self._plan.streams[0]
        if main.reader.is_call(family, number, 0):
            self._head = _argument(graph, args, main.name).clone()
        return self._plan.begin.is_call(family, number, self._plan.ranges[1][0])

    def _start(self, graph: Graph, args: Sequence[Any], k: int) -> torch.Tensor:
        """What a stream is where the span begins: what that call is given, or what was made for a later one."""
        stream = self._plan.streams[k]
        if stream.reader == self._plan.begin:
            return _argument(graph, args, stream.name)
        if k not in self._came:
            raise Misfit
        return self._came[k]

    def decide(
        self,
        store: Store,
        branch: Branch,
        forward: Forward,
        graph: Graph,
        family: Hashable,
        args: Sequence[Any],
        front: Front,
        lost: str | None,
        unplanned: Hashable,
    ) -> None:
        """The one decision for all graphs of the span and all samples.

        Args:
            store: where the branch is kept.
            branch: what the forward belongs to.
            forward, graph, family, args: the call with which the span begins.
            front: what was called before that.
            lost: why nothing that was cached before may be reused; None: it may.
            unplanned: another one than before if a forward meanwhile may have been a step of the request (`Unplanned`).
        """
        self._branch = branch
        # Copies: the graphs of the blocks, or code between them, may write to them.
        self._starts = [self._start(graph, args, k).clone() for k in range(len(self._plan.streams))]
        if self._head is None or self._head.shape != self._starts[0].shape:
            raise Misfit
        self._probe = _probe(self._plan.streams[0], self._head, self._starts[0])
        slot = branch.slots[self._number]
        # Once: whoever ends the session meanwhile empties the slot.
        kept, script, self._call = slot.tensors, slot.script, forward.count
        self._former = script
        fits = script is not None and script.goes_on(0, forward, graph, family, args, self._call)
        other, self._front = slot.behind(front), front
        lost = lost or other
        if script is not None and script.writes:
            lost = lost or WRITES
        if script is not None and script.unplanned != unplanned:
            lost = lost or UNPLANNED
        if kept and (lost is not None or not fits or kept[0].shape != self._probe.shape):
            slot.forget(lost or OTHER_CALLS)
            slot.open = True
        shown = forward.shown_by(self._start(graph, args, 0))
        self._gate = SpanGate(store, branch, self._number, forward.control(shown), Separation(fewer=False))
        batch, probe = forward.batch, self._probe
        samples = batch if batch and probe.shape[0] % batch == 0 else 1

        groups = self._plan.groups
        compare = residual_sums if groups else residual_diff

        def measure() -> torch.Tensor:
            diff: torch.Tensor = compare(kept[0], probe, samples, probe.ndim)
            return diff

        ranks = (groups, probe.device) if groups else None
        self._hit = self._gate.decide(measure, samples, separable=False, ranks=ranks) is True
        self._script = script if self._hit else Script(len(self._plan.streams), unplanned)
        plan = self._plan
        self._beside = (
            None if self._hit else Beside(plan.streams, range(*plan.ranges[1]), self._call, plan.joined, plan.light)
        )

    def skip(
        self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any], number: int
    ) -> Sequence[Any] | None:
        """What a call made when the span was computed; None: it is to be run now."""
        self._called = None
        if self._script is None or self.over:
            return None
        expected = self._takes_what_came(forward, graph, family, args, number)
        if not self._hit:
            if not expected or not self._may_skip(forward, graph, args):
                raise Misfit
            self._origins = forward.origins(graph.facts, args)
            self._passed = self._called = Called.of(forward, graph, family, args, self._call, self._origins)
            if self._former is not None:
                self._former.tell(len(self._script.entries), self._called)
            return None
        if not expected or not self._script.goes_on(self._at, forward, graph, family, args, self._call):
            raise Astray
        self._changed += self._script.changed(self._at, graph, args)
        self._passed = self._script.entries[self._at].called
        outputs = self._script.outputs(self._at, graph, args, self._starts)
        self._ended |= self._script.ended(self._at)
        self._at += 1
        return outputs

    def _may_skip(self, forward: Forward, graph: Graph, args: Sequence[Any]) -> bool:
        """Whether a call of the span is one that a hit can skip; those that were planned by may be other graphs."""
        facts = graph.facts
        own = all(forward.made_since(args[i], self._call) for i in facts.written)
        return own and facts.random is None and facts.gradients is None

    def _known(self, graph: Graph, family: Hashable, outputs: Sequence[Any]) -> bool:
        """Whether a graph gives back its streams in the places in which those of the plan did."""
        forms = [form_of(o) if isinstance(o, torch.Tensor) else None for o in outputs]
        names = {s.name for s in self._plan.streams}
        return (family, layout(graph.facts, forms, names)) in self._plan.layouts

    def _takes_what_came(
        self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any], number: int
    ) -> bool:
        """Whether a call that takes streams is given what the blocks before made of them, so far as is known."""
        for k, came in self._came.items():
            stream = self._plan.streams[k]
            if stream.reader.is_call(family, number, self._plan.ranges[1][0]):
                place = forward.made_by(_argument(graph, args, stream.name))
                if place is None or place != forward.made_by(came):
                    return False
        for k, stream in enumerate(self._plan.streams):
            handed = self._handed.pop((k, stream.reader.block(family, number)), None)
            if handed is not None:
                place = forward.made_by(_argument(graph, args, stream.name))
                if place is not None and place != forward.made_by(handed):
                    return False
        return True

    def take(
        self,
        forward: Forward,
        graph: Graph,
        family: Hashable,
        args: Sequence[Any],
        outputs: Sequence[Any],
        number: int,
    ) -> None:
        """Takes notice of what came of a call, skipped or run; keeps what was made when the span is over."""
        made = [k for k, output in enumerate(outputs) if isinstance(output, torch.Tensor)]
        if self._script is None:
            for k, s in enumerate(self._plan.streams):
                fed = s.reader != self._plan.begin and s.maker.is_call(family, number, self._plan.ranges[1][0] - 1)
                if fed and self._known(graph, family, outputs):
                    self._came[k] = outputs[made[s.output]]
        if self._called is not None:
            assert self._script is not None and self._beside is not None
            ends, passed = (
                {
                    made[i]: k
                    for i, k in of_call.items()
                    if i < len(made) and outputs[made[i]].shape == self._starts[k].shape
                }
                for of_call in (
                    ended_by(self._plan.streams, family, number, self._plan.ranges[1][1] - 1),
                    _passed(self._plan, family, number),
                )
            )
            if (ends or passed) and not self._known(graph, family, outputs):
                raise Misfit
            for i, k in passed.items():
                block = self._plan.streams[k].maker.block(family, number)
                self._handed[k, None if block is None else block + 1] = outputs[i]
            through, written = handed_through(graph.facts, args, outputs), written_by(graph, args)
            handed = [k for k, name in enumerate(through) if name is not None]
            renewal = self._beside.see(forward.count, family, number, graph.facts, self._origins, made, handed, ends)
            part = graph.facts.parts.part(renewal.outputs) if renewal.outputs else None
            compared = {name: _argument(graph, args, name) for name in renewal.compared}
            views = {
                k: found
                for k, name in enumerate(through)
                if name is None and (found := _view_of_input(graph, args, outputs[k])) is not None
            }
            self._script.add(
                self._called, through, outputs, written, ends, passed, renewal, part, compared, self._starts, views
            )
            self._ended |= set(ends.values())
        if self.over:
            if any_of(self._changed):
                raise Astray
            self._changed = []
            assert self._branch is not None and self._gate is not None
            assert self._script is not None and self._probe is not None
            slot = self._branch.slots[self._number]
            if not self._hit:
                assert self._beside is not None
                self._script.writes = forward.writes
                slot.tensors, slot.script = self._script.tensors(self._probe), self._script
                slot.front = self._front
                self._gate.remember_control()
                if self._beside.stale or self._script.torn:
                    slot.forget(BESIDE)
            self._gate.record()
            slot.open = False


def _view_of_input(graph: Graph, args: Sequence[Any], output: Any) -> tuple[str, ViewOf | None] | None:
    """The input in whose memory an output lies, but for weights, and how, if that can be told."""
    given = ((graph.facts.names[i], args[i]) for i in graph.facts.given)
    found = ((n, a, ViewOf.made(a, output)) for n, a in given if stored(a) and stored(output))
    views = [(n, view if view.of(a) is not None else None) for n, a, view in found if view is not None]
    return min(views, key=lambda of: of[1] is None, default=None)


def _argument(graph: Graph, args: Sequence[Any], name: str) -> torch.Tensor:
    names = graph.facts.names
    value = args[names.index(name)] if name in names else None
    if not isinstance(value, torch.Tensor):
        raise Misfit
    return value
