"""Finds stacks whose blocks were captured in graphs of their own, from the calls of one whole forward.

Where a graph break lies inside the blocks, or the code around them falls back to Python, no graph holds two blocks.
Such a stack is a *relay*: its streams are handed on from graph to graph.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fx_cache.config import CacheConfig
from fx_cache.errors import Failure, Refusal, StageError, stage
from fx_cache.patterns.calls import Call, GraphFacts, Origin, Place
from fx_cache.patterns.spans import MIN_SHARE, Ranges, least_gain, random_refusal
from fx_cache.patterns.stretches import Point, RelayStream, Stretch, stretches

MAX_RENEWED = 0.1
"""The part of a span's work up to which a hit does what may be work on its streams, where that is not known."""


@dataclass(frozen=True)
class RelayPlan:
    """A stack over several graphs, and how it is cut.

    Attributes:
        name: module path of the block list.
        begin: the call with which a block begins.
        blocks: number of blocks.
        streams: what is handed on, the main one first.
        share: the part of the forward's FLOPs that a hit saves; None where none were counted.
        ranges: (head, span, tail) as block ranges.
        groups: names of the process groups whose ranks decide together.
        joined: inputs, by code and name, in which code between the graphs has joined a stream with something else.
        light: FLOPs up to which a hit runs a call that may work on a stream.
        compares: whether a hit makes sure that what heavier ones are given is what it was.
    """

    name: str
    begin: Point
    blocks: int
    streams: tuple[RelayStream, ...]
    share: float | None
    ranges: Ranges
    groups: tuple[str, ...]
    joined: frozenset[tuple[Hashable, str]]
    light: float
    compares: bool


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
    """What the calls of a span make that is made of none of its streams.

    It may be made of the time, and change at every step however little the streams do. So on a hit it is made anew.
    So is what is made of what code between the graphs has made, which may be of a stream, of the time, or of both; but
    not if that is much work. Then it is given back as it was, if nobody behind the span reads it, nor code between its
    graphs, of which nothing is known: what no graph of the span reads is made for such. If somebody does, it is given
    back if what it is made of is what it was.

    Attributes:
        places: what is given back as it was.
        sure: what is on a hit what it would be without: made anew, or known to be the same.
        joined: inputs, by code and name, in which code between the graphs has joined a stream with something else.
        work: FLOPs of what is made anew.
        unsure: for each call that may work on a stream the FLOPs of what it makes anew.
    """

    def __init__(
        self,
        streams: Sequence[RelayStream],
        joined: Collection[tuple[Hashable, str]],
        begin: int,
        light: float,
        compares: bool,
    ) -> None:
        """
        Args:
            streams: of the span.
            joined: such inputs, as far as they are known.
            begin: number of its first call.
            light: FLOPs up to which what may be made of a stream is made anew.
            compares: whether it is made sure that what heavier calls are given is what it was.
        """
        self.places: set[Place] = set()
        self.sure: set[Place] = set()
        self.joined = set(joined)
        self.work = 0
        self.unsure: list[int] = []
        self._light, self._compares = light, compares
        self._read: set[Place] = set()
        self._begun: set[Place] = set()
        self._begin = begin
        self._readers = {(s.reader.family, s.name) for s in streams}

    @property
    def strays(self) -> bool:
        """Whether somebody may read what is given back as it was of whom nothing is known."""
        return not self.places <= self._read

    def see(
        self,
        at: int,
        family: Hashable,
        facts: GraphFacts,
        origins: Mapping[str, Origin],
        tensors: Collection[int],
        through: Collection[int],
        ends: Collection[int],
    ) -> Renewal:
        """Takes notice of a call of the span, in their order, and says what a hit does about it.

        Args:
            at: its number.
            family: its code.
            facts: of its graph.
            origins: where the tensors come from that it was given, by name, but for weights.
            tensors: numbers of its outputs that are tensors.
            through: numbers of those that are inputs of it, handed through.
            ends: numbers of those that end a stream.
        """
        streams = {name for name, origin in origins.items() if self._is_stream(family, name, origin)}
        written = {facts.names[i] for i in facts.written}
        unsure = {name for name, origin in origins.items() if name not in streams and self._is_unsure(origin)}
        self.joined.update((family, name) for name in streams if not origins[name].known)
        self._begun.update(p for name in streams for p in origins[name].of if p[0] < self._begin)
        self._read.update(*(self.places & origin.of for origin in origins.values()))
        if not streams:
            for places in (origins[name].of for name in written & origins.keys()):
                self.places |= places
                self._read -= places
        made: dict[int, set[str]] = {}
        for k, shown in enumerate(facts.shown):
            data = {facts.names[i] for i in shown if i not in facts.roles.weights}
            if k not in through and k not in ends and (k in tensors or data):
                made[k] = data
        beside = {k for k, data in made.items() if streams.isdisjoint(data)}
        doubtful = {k for k in beside if not unsure.isdisjoint(made[k])}
        constant = {k for k in beside if not made[k]}
        whole = not ends and not facts.written and made.keys() == beside != constant
        parts = (beside - constant) & facts.parts.work.keys()
        work = facts.work if whole else sum(facts.parts.work[k] for k in parts)
        if doubtful and work > self._light:
            whole, parts = False, parts - doubtful
            work = sum(facts.parts.work[k] for k in parts)
        elif doubtful:
            self.unsure.append(work)
        self.work += work
        anew = beside if whole else parts | constant
        same = {k for k in doubtful - anew if self._compares and written.isdisjoint(made[k])}
        self.sure.update((at, k) for k in anew | same)
        self.places.update((at, k) for k in beside - anew - same)
        compared = unsure & set().union(*(made[k] for k in same))
        return Renewal(None if whole else tuple(sorted(parts)), tuple(sorted(compared)))

    def _is_stream(self, family: Hashable, name: str, origin: Origin) -> bool:
        """Whether an input of a call is one of the streams, or made of one within the span."""
        own = self.places | self.sure
        made = (p in self._begun or (p[0] >= self._begin and p not in own) for p in origin.of)
        return (family, name) in self._readers or (family, name) in self.joined or any(made)

    def _is_unsure(self, origin: Origin) -> bool:
        return not origin.known or not self.places.isdisjoint(origin.of)


def plan_relays(
    calls: Sequence[Call], config: CacheConfig, others: Collection[int]
) -> tuple[tuple[RelayPlan, ...], Refusal | None]:
    """The spans of a forward whose blocks lie in graphs of their own, in the order in which they run.

    Every stack gets a span of its own. Returns no plan and the reason where nothing can be cached; an error of ours is
    one.

    Args:
        calls: of the forward.
        config: what is set.
        others: the user's inputs that are known not to be denoised.
    """
    try:
        with stage("plan_relays"):
            return _planned(calls, config, others)
    except StageError as error:
        return (), Failure.of(error, None)


def _planned(
    calls: Sequence[Call], config: CacheConfig, others: Collection[int]
) -> tuple[tuple[RelayPlan, ...], Refusal | None]:
    found = _outermost(stretches(calls, config.Bn_compute_blocks == 0, others), calls)
    if not found:
        return (), _no_stack(calls)
    total = sum(c.facts.work for c in calls)
    plans = [_plan(calls, stretch, total, config) for stretch in found]
    possible = [plan for plan in plans if isinstance(plan, RelayPlan)]
    kept: list[RelayPlan] = []
    for plan in sorted(possible, key=lambda p: -(p.share or 0.0)):
        if plan.share is None or plan.share >= least_gain(1.0, [k.share or 0.0 for k in kept]):
            kept.append(plan)
    if not kept:
        return (), next(plan for plan in plans if isinstance(plan, Refusal))
    return tuple(plan for plan in possible if plan in kept), None


def _work(calls: Sequence[Call], first: int, last: int) -> int:
    return sum(c.facts.work for c in calls[first : last + 1])


def _plan(calls: Sequence[Call], stretch: Stretch, total: int, config: CacheConfig) -> RelayPlan | Refusal:
    starts, name = stretch.starts, stretch.name
    fn, bn, count = config.Fn_compute_blocks, config.Bn_compute_blocks, len(starts)
    if fn + bn >= count:
        return Refusal(
            f"stack {name}",
            f"Fn_compute_blocks={fn} and Bn_compute_blocks={bn} for {count} blocks",
            f"Fn_compute_blocks + Bn_compute_blocks <= {count - 1}",
            f"set options={{'Fn_compute_blocks': 1}} or another number below {count - bn}",
        )
    begin, end = starts[fn], stretch.end if not bn else starts[count - bn] - 1
    for call in calls[begin : end + 1]:
        outside = [call.facts.names[i] for i in call.facts.written if not _made_within(call, i, begin, end)]
        if call.facts.gradients is not None:
            return call.facts.gradients
        if call.facts.random is not None:
            return random_refusal(name, call.facts.random)
        if outside:
            return Refusal(
                f"stack {name}",
                f"a write in place to {outside[0]}, which is made before the span and seen outside it",
                "blocks that write only to tensors of their own",
                "replace the write in place by an operation that returns a new tensor",
            )
    stretch = _without_beside(calls, stretch, begin, end)
    work = _work(calls, begin, end)
    light, compares = math.inf, False
    beside = _beside(calls, stretch, begin, end, light, compares)
    if sum(beside.unsure) > MAX_RENEWED * work:
        light = _lightest(beside.unsure, MAX_RENEWED * work)
        beside = _beside(calls, stretch, begin, end, light, compares)
        if _is_read(beside, calls[end + 1 :]):
            compares = True
            beside = _beside(calls, stretch, begin, end, light, compares)
    if _is_read(beside, calls[end + 1 :]):
        return Refusal(
            f"stack {name}",
            "a value that its blocks write beside their streams, of what may change at every step, and that is read by "
            "others than them",
            "blocks that hand on nothing but their streams",
            "return it as a new tensor instead of writing it to one from outside, or compute it before the blocks",
        )
    share = (work - beside.work) / total if total else None
    if share is not None and share < MIN_SHARE:
        return Refusal(
            f"stack {name}",
            f"{share:.1%} of the forward's FLOPs in the blocks that a hit would skip",
            f"at least {MIN_SHARE:.0%}",
            "choose a smaller Fn_compute_blocks or Bn_compute_blocks, or run this model uncached",
        )
    return RelayPlan(
        name=name,
        begin=stretch.begin,
        blocks=count,
        streams=stretch.streams,
        share=share,
        ranges=((0, fn), (fn, count - bn), (count - bn, count)),
        groups=tuple(dict.fromkeys(g for call in calls[starts[0] : stretch.end + 1] for g in call.facts.groups))
        or config.process_groups,
        joined=frozenset(beside.joined),
        light=light,
        compares=compares,
    )


def _made_within(call: Call, i: int, begin: int, end: int) -> bool:
    """Whether the memory of an input was made by a call of a span."""
    traced = call.inputs.get(call.facts.names[i])
    return traced is not None and traced.memory is not None and begin <= traced.memory <= end


def _without_beside(calls: Sequence[Call], stretch: Stretch, begin: int, end: int) -> Stretch:
    """A stretch without what is handed on beside its main stream, and made of that nowhere: a hit makes it anew."""
    beside = _beside(calls, replace(stretch, streams=stretch.streams[:1]), begin, end, light=-1, compares=False)
    made_of_it = {
        stream
        for k, _, ends in _with_ends(calls, stretch, begin, end)
        for output, stream in ends.items()
        if (k, output) not in beside.sure
    }
    return replace(stretch, streams=tuple(s for s in stretch.streams if s in made_of_it))


def _beside(calls: Sequence[Call], stretch: Stretch, begin: int, end: int, light: float, compares: bool) -> Beside:
    """What the calls of a span make beside its streams."""
    beside = Beside(stretch.streams, (), begin, light, compares)
    for k, call, ends in _with_ends(calls, stretch, begin, end):
        tensors = [i for i, form in enumerate(call.outputs) if form is not None]
        origins = {name: i.origin for name, i in call.inputs.items()}
        beside.see(k, call.family, call.facts, origins, tensors, call.through, ends)
    return beside


def _with_ends(
    calls: Sequence[Call], stretch: Stretch, begin: int, end: int
) -> Iterator[tuple[int, Call, dict[int, RelayStream]]]:
    """The calls of a span: the number of each, itself, and which of its outputs end a stream."""
    last = sum(start <= end for start in stretch.starts) - 1
    numbers: Counter[Hashable] = Counter()
    for k, call in enumerate(calls[: end + 1]):
        numbers[call.family] += 1
        if k >= begin:
            tensors = [i for i, form in enumerate(call.outputs) if form is not None]
            ended = [s for s in stretch.streams if s.maker.is_call(call.family, numbers[call.family], last)]
            yield k, call, {tensors[s.last]: s for s in ended if s.last < len(tensors)}


def _lightest(work: Sequence[int], most: float) -> float:
    """The work up to which calls do as much as may be together."""
    done, light = 0.0, 0.0
    for one, count in sorted(Counter(work).items()):
        done += one * count
        if done > most:
            break
        light = one
    return light


def _is_read(beside: Beside, behind: Sequence[Call]) -> bool:
    """Whether a call behind a span, or code beside all graphs, may read what is given back as it was."""
    given = (i.origin.of for call in behind for i in call.inputs.values())
    return beside.strays or any(not beside.places.isdisjoint(places) for places in given)


def _outermost(stretches: Iterator[Stretch], calls: Sequence[Call]) -> list[Stretch]:
    """Of stretches that overlap, the one that holds most work, and of equals the one that begins first."""
    kept: list[Stretch] = []
    for s in sorted(stretches, key=lambda s: (-_work(calls, s.starts[0], s.end), s.starts[0], -s.end)):
        if all(s.end < k.starts[0] or k.end < s.starts[0] for k in kept):
            kept.append(s)
    return sorted(kept, key=lambda s: s.starts[0])


def _no_stack(calls: Sequence[Call]) -> Refusal:
    breaks = Counter(c.facts.broken for c in calls if c.facts.broken is not None)
    where = "; ".join(text for text, _ in breaks.most_common(2))
    return Refusal(
        f"the forward, captured in {len({id(c.facts) for c in calls})} graphs",
        "no stack of repeated blocks in one of them, and none over several"
        + (f" (graph break: {where})" if where else ""),
        "two or more sibling blocks run one after another, each on what the one before made",
        "compile the whole transformer with torch.compile(transformer, backend='dit_cache') instead of single blocks "
        "(regional compile), and look for graph breaks between its blocks: TORCH_LOGS=graph_breaks shows them all",
    )
