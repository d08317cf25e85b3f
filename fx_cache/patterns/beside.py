"""What the blocks of a stack over several graphs make beside its streams, and what a hit does about it.

It may be made of the time, and change at every step however little the streams do. So a hit makes it anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from fx_cache.patterns.calls import GraphFacts, Origin, Place, given_as
from fx_cache.patterns.stretches import RelayStream

SpanCall = tuple[Hashable, int]
"""A call of a span: the code that is called, and which call of that it is in the span, from 1."""

MixedInput = tuple[SpanCall, str]
"""A call of a span, and an input of it."""


class Kind(IntEnum):
    """What a tensor is on a hit. What is made of several is what the last of these is."""

    CURRENT = 0
    """What it would be without a cache."""
    DOUBTFUL = 1
    """What code between the graphs has made of what it was given: of the time, of a stream, or of both."""
    STALE = 2
    """What it was when the span was computed, though nothing of a stream is in it."""
    STREAM = 3
    """A stream, or made of one: it is what it was, or goes on from there."""


@dataclass(frozen=True)
class Renewal:
    """What a hit does about a call instead of giving back what it made.

    Attributes:
        outputs: numbers of the outputs that are made anew; None: the call is run.
        compared: names of the inputs that have to be what they were.
    """

    outputs: tuple[int, ...] | None
    compared: tuple[str, ...]


class Beside:
    """What the calls of a span make, one after another.

    What is made of no stream is made anew on a hit: by the whole call, if it makes nothing else, or by a part of its
    graph. So is what is made of doubtful tensors, if that is little work. If it is much, it may be the work on the
    streams that a hit is to skip: it is given back, and what it is made of is compared with what that was.

    Attributes:
        kinds: what each output of the calls is on a hit.
        joined: inputs in which code between the graphs has joined a stream with something else.
        work: FLOPs of what is made anew.
        doubtful: for each call that makes something anew of doubtful tensors, the FLOPs of that.
    """

    def __init__(
        self,
        streams: Sequence[RelayStream],
        blocks: range,
        begin: int,
        joined: Collection[MixedInput] = (),
        light: Collection[SpanCall] | None = None,
        renews: bool = True,
    ) -> None:
        """
        Args:
            streams: of the span.
            blocks: numbers of its blocks.
            begin: number of its first call.
            joined: inputs that are known to hold a stream.
            light: calls that may make anew what is made of doubtful tensors; None: all.
            renews: whether anything is made anew; else `kinds` say what outputs are made of, and nothing more.
        """
        self.kinds: dict[Place, Kind] = {}
        self.joined = set(joined)
        self.work = 0
        self.doubtful: dict[SpanCall, int] = {}
        self._called: Counter[Hashable] = Counter()
        self._streams, self._blocks, self._begin = streams, blocks, begin
        self._light, self._renews = light, renews

    @property
    def stale(self) -> bool:
        """Whether something is given back as it was that may change at every step."""
        return Kind.STALE in self.kinds.values()

    def see(
        self,
        at: int,
        family: Hashable,
        number: int,
        facts: GraphFacts,
        origins: Mapping[str, Origin],
        tensors: Collection[int],
        through: Collection[int],
        ends: Collection[int],
    ) -> Renewal:
        """Takes notice of a call of the span, in their order, and says what a hit does about it.

        Args:
            at: its number in the forward.
            family: its code.
            number: its number among the calls of that code, from 1.
            facts: of its graph.
            origins: where the tensors come from that it is given, by name, but for weights.
            tensors: numbers of its outputs that are tensors.
            through: numbers of those that are inputs of it, handed through.
            ends: numbers of those that end a stream.
        """
        self._called[family] += 1
        call = family, self._called[family]
        given = {name: self._given(call, number, name, origin) for name, origin in origins.items()}
        made = {k: data for k, data in enumerate(_data(facts)) if k not in through and (k in tensors or data)}
        kinds = {k: max((given.get(n, Kind.CURRENT) for n in data), default=Kind.CURRENT) for k, data in made.items()}
        kinds |= dict.fromkeys(ends, Kind.STREAM)
        written = {facts.names[i] for i in facts.written} & given.keys()
        unknown = {name for name, origin in origins.items() if not origin.known}
        self.kinds |= {(at, given_as(i)): given[n] for i, n in enumerate(facts.names) if n in unknown}
        if not self._renews:
            self.kinds.update(((at, k), kind) for k, kind in kinds.items())
            return Renewal((), ())

        highest = Kind.DOUBTFUL if self._light is None or call in self._light else Kind.CURRENT
        renewed = {k for k, kind in kinds.items() if kind <= highest and made[k]}
        # What it writes may be made of all that it is given.
        whole = max(kinds.values(), default=highest) <= highest and bool(renewed or written)
        whole = whole and (not written or max(given.values()) <= highest)
        anew = renewed if whole else renewed & facts.parts.work.keys()
        doubts = {k for k, kind in kinds.items() if kind is Kind.DOUBTFUL}
        tested = {k for k in doubts - anew if written.isdisjoint(made[k]) and made[k] <= given.keys()}

        for k, kind in kinds.items():
            current = k in anew or k in tested or not made.get(k, True)
            self.kinds[at, k] = kind if kind is Kind.STREAM else Kind.CURRENT if current else Kind.STALE
        for place in (p for name in written if given[name] is not Kind.STREAM for p in origins[name].of):
            self.kinds[place] = Kind.CURRENT if whole else Kind.STALE
        work = facts.work if whole else sum(facts.parts.work[k] for k in anew)
        self.work += work
        if doubts & anew or (whole and Kind.DOUBTFUL in given.values()):
            self.doubtful[call] = work
        compared = set().union(*(made[k] for k in tested))
        return Renewal(None if whole else tuple(sorted(anew)), tuple(sorted(compared)))

    def _given(self, call: SpanCall, number: int, name: str, origin: Origin) -> Kind:
        """What an input of a call is."""
        if any(s.name == name and s.reader.block(call[0], number) in self._blocks for s in self._streams):
            self.kinds.update(dict.fromkeys(origin.of, Kind.STREAM))
            return Kind.STREAM
        kind = max((self._kind(p) for p in origin.of), default=Kind.CURRENT)
        if not origin.known and (kind is Kind.STREAM or (call, name) in self.joined):
            self.joined.add((call, name))
            return Kind.STREAM
        return kind if origin.known else max(kind, Kind.DOUBTFUL)

    def _kind(self, place: Place) -> Kind:
        """What an output is: current if it was made before the span and is none of its streams."""
        return self.kinds.get(place, Kind.CURRENT if place[0] < self._begin else Kind.DOUBTFUL)


def _data(facts: GraphFacts) -> list[frozenset[str]]:
    """For each output, the names of the inputs that its numbers depend on, but for weights."""
    weights = set(facts.roles.weights)
    return [frozenset(facts.names[i] for i in shown if i not in weights) for shown in facts.shown]
