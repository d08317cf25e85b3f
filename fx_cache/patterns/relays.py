"""Finds stacks whose blocks were captured in graphs of their own, from the calls of one whole forward.

Where a graph break lies inside the blocks, or the code around them falls back to Python, no graph holds two blocks.
Such a stack is a *relay*: its streams are handed on from graph to graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fx_cache.config import CacheConfig
from fx_cache.errors import Failure, Refusal, StageError, stage
from fx_cache.patterns.calls import UNKNOWN, Call, GraphFacts, Origin, Place
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
        renews: whether a hit makes anew what code between the graphs may have made of a stream (`Beside`).
    """

    name: str
    begin: Point
    blocks: int
    streams: tuple[RelayStream, ...]
    share: float | None
    ranges: Ranges
    groups: tuple[str, ...]
    renews: bool


@dataclass(frozen=True)
class Source:
    """A tensor that a call of a span is given.

    Attributes:
        origin: where it comes from.
        tokens: the user's inputs whose tokens it holds.
    """

    origin: Origin
    tokens: frozenset[int]


class Beside:
    """What the calls of a span make that is made of none of its streams.

    It may be made of the time, and change at every step however little the streams do. So on a hit it is made anew.
    What code between the graphs has made may hold something of a stream, and be much work. Where it is, what is made
    of it is given back as it was, and nobody behind the span is to read that, nor code between its graphs, of which
    nothing is known: what no graph of the span reads is made for such.

    Attributes:
        places: what is given back as it was.
        work: FLOPs of what is made anew.
        unsure: FLOPs of what is made of what code between the graphs has made.
    """

    def __init__(self, streams: Sequence[RelayStream], begin: int, renews: bool) -> None:
        """
        Args:
            streams: of the span.
            begin: number of its first call.
            renews: whether also that is made anew of which it is not known what it is made of.
        """
        self.places: set[Place] = set()
        self.work = 0
        self.unsure = 0
        self._renews = renews
        self._anew: set[Place] = set()
        self._read: set[Place] = set()
        self._begun: set[Place] = set()
        self._begin = begin
        self._tokens = frozenset().union(*(s.tokens for s in streams)) - {UNKNOWN}
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
        sources: Mapping[str, Source],
        tensors: Collection[int],
        through: Collection[int],
        ends: Collection[int],
    ) -> tuple[int, ...] | None:
        """Takes notice of a call of the span, in their order, and says what of it is to be made anew on a hit.

        Args:
            at: its number.
            family: its code.
            facts: of its graph.
            sources: the tensors that it was given, by name, but for weights.
            tensors: numbers of its outputs that are tensors.
            through: numbers of those that are inputs of it, handed through.
            ends: numbers of those that end a stream.

        Returns:
            Numbers of outputs; None: the whole call is to be run.
        """
        streams = {name for name, source in sources.items() if self._is_stream(family, name, source)}
        unsure = {name for name, source in sources.items() if name not in streams and self._is_unsure(source.origin)}
        self._begun.update(p for name in streams for p in sources[name].origin.of if p[0] < self._begin)
        self._read.update(*(self.places & source.origin.of for source in sources.values()))
        if not streams:
            for written in (s.origin.of for i in facts.written if (s := sources.get(facts.names[i])) is not None):
                self.places |= written
                self._read -= written
        made: dict[int, set[str]] = {}
        for k, shown in enumerate(facts.shown):
            data = {facts.names[i] for i in shown if i not in facts.roles.weights}
            if k not in through and k not in ends and (k in tensors or data):
                made[k] = data
        beside = {k for k, data in made.items() if streams.isdisjoint(data)}
        doubtful = {k for k in beside if not unsure.isdisjoint(made[k])}
        constant = {k for k in beside if not made[k]}
        anew = beside if self._renews else beside - doubtful
        whole = anew == made.keys() and anew != constant and not ends and not facts.written
        if not whole:
            anew = anew & constant.union(facts.parts.work)
        self._anew.update((at, k) for k in anew)
        self.places.update((at, k) for k in beside - anew)
        parts = tuple(sorted(anew - constant))
        work = facts.work if whole else sum(facts.parts.work[k] for k in parts)
        self.work += work
        self.unsure += work if doubtful & anew else 0
        return None if whole else parts

    def _is_stream(self, family: Hashable, name: str, source: Source) -> bool:
        """Whether an input of a call is one of the streams, or made of one within the span."""
        if (family, name) in self._readers:
            return True
        if not source.origin.known:
            return not self._tokens.isdisjoint(source.tokens)
        own = self.places | self._anew
        return any(p in self._begun or (p[0] >= self._begin and p not in own) for p in source.origin.of)

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
    work = _work(calls, begin, end)
    beside = _beside(calls, stretch, begin, end, renews=True)
    renews = beside.unsure <= MAX_RENEWED * work
    if not renews:
        beside = _beside(calls, stretch, begin, end, renews=False)
    if _is_read(beside, calls[end + 1 :]):
        return Refusal(
            f"stack {name}",
            "a value that its blocks make beside their streams, of what code between the graphs has made, and that is "
            "read by others than them",
            "blocks that hand on nothing but their streams",
            "compute it before the blocks, or in a function that is captured as one graph",
        )
    share = (work - beside.work) / total if total else None
    if share is not None and share < MIN_SHARE:
        return Refusal(
            f"stack {name}",
            f"{share:.1%} of the forward's FLOPs in the blocks that a hit would skip",
            f"at least {MIN_SHARE:.0%}",
            "choose a smaller Fn_compute_blocks or Bn_compute_blocks, or run this model uncached",
        )
    ranges = ((0, fn), (fn, count - bn), (count - bn, count))
    groups = tuple(dict.fromkeys(g for call in calls[starts[0] : stretch.end + 1] for g in call.facts.groups))
    return RelayPlan(
        name, stretch.begin, count, stretch.streams, share, ranges, groups or config.process_groups, renews
    )


def _made_within(call: Call, i: int, begin: int, end: int) -> bool:
    """Whether the memory of an input was made by a call of a span."""
    traced = call.inputs.get(call.facts.names[i])
    return traced is not None and traced.memory is not None and begin <= traced.memory <= end


def _beside(calls: Sequence[Call], stretch: Stretch, begin: int, end: int, renews: bool) -> Beside:
    """What the calls of a span make beside its streams."""
    beside = Beside(stretch.streams, begin, renews)
    last = sum(start <= end for start in stretch.starts) - 1
    numbers: Counter[Hashable] = Counter()
    for k, call in enumerate(calls[: end + 1]):
        numbers[call.family] += 1
        if k >= begin:
            tensors = [i for i, form in enumerate(call.outputs) if form is not None]
            of_call = [s.last for s in stretch.streams if s.maker.is_call(call.family, numbers[call.family], last)]
            ends = {tensors[i] for i in of_call if i < len(tensors)}
            sources = {name: Source(i.origin, i.tokens) for name, i in call.inputs.items()}
            beside.see(k, call.family, call.facts, sources, tensors, call.through, ends)
    return beside


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
