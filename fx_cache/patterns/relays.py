"""Finds stacks whose blocks were captured in graphs of their own, from the calls of one whole forward.

Where a graph break lies inside the blocks, or the code around them falls back to Python, no graph holds two blocks.
Such a stack is a *relay*: its streams are handed on from graph to graph.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fx_cache.config import CacheConfig
from fx_cache.errors import Failure, Refusal, StageError, stage
from fx_cache.patterns.beside import Beside, Kind, MixedInput, SpanCall
from fx_cache.patterns.calls import UNKNOWN, Call, Place, layout
from fx_cache.patterns.forms import Form, is_heads, may_be_read
from fx_cache.patterns.spans import MIN_SHARE, Ranges, least_gain, random_refusal
from fx_cache.patterns.stretches import Point, RelayStream, Stretch, ended_by, stretches

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
        joined: inputs of the span's calls in which code between the graphs has joined a stream with something else.
        light: calls of the span that a hit may run though they may work on a stream.
        layouts: the code that makes streams, and how its graphs give back what they make (`layout`).
    """

    name: str
    begin: Point
    blocks: int
    streams: tuple[RelayStream, ...]
    share: float | None
    ranges: Ranges
    groups: tuple[str, ...]
    joined: frozenset[MixedInput]
    light: frozenset[SpanCall]
    layouts: frozenset[tuple[Hashable, Hashable]]


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
    plans = [_plan(calls, stretch, total, config, frozenset(others)) for stretch in found]
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


def _plan(
    calls: Sequence[Call], stretch: Stretch, total: int, config: CacheConfig, others: frozenset[int]
) -> RelayPlan | Refusal:
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
    unknown = _unknown_main(calls, stretch, begin, end, others)
    if unknown is not None:
        return unknown
    stretch = _without_beside(calls, stretch, begin, end)
    work = _work(calls, begin, end)
    beside = _beside(calls, stretch, begin, end)
    light = _lightest(beside.doubtful, MAX_RENEWED * work)
    if light != beside.doubtful.keys():
        beside = _beside(calls, stretch, begin, end, light)
    if beside.stale:
        return Refusal(
            f"stack {name}",
            "a value that its blocks make beside their streams, of what may change at every step, and that cannot be "
            "made without them",
            "blocks that hand on nothing but their streams",
            "compute it before the blocks, or in a function of its own that writes to nothing from outside",
        )
    moved = _moved(calls, stretch, begin, end)
    if moved is not None:
        return moved
    sums = [s for s in stretch.streams[1:] if _is_sum(calls, stretch, begin, end, s)]
    if sums:
        return Refusal(
            f"stack {name}",
            f"{sums[0].name} {sums[0].form[0]}, to which its blocks only add what they make of other streams",
            "blocks that hand on nothing but their streams",
            "sum up behind the blocks, or run this model uncached",
        )
    reads = _only_reads(calls, stretch, begin, end, others)
    if reads is not None:
        return Refusal(
            f"stack {name}",
            f"{reads.name} {reads.form[0]}, which begins with nothing that is denoised, and of which no other is made",
            "streams that the latent enters, or that others read",
            "read the blocks' streams behind them, or run this model uncached",
        )
    unseen = _unseen_stream(calls, stretch, begin, end, others, beside)
    if unseen is not None:
        return unseen
    names = {s.name for s in stretch.streams}
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
        layouts=frozenset(
            (call.family, layout(call.facts, call.outputs, names))
            for call in calls[starts[0] : end + 1]
            if any(s.maker.family == call.family for s in stretch.streams)
        ),
    )


def _made_within(call: Call, i: int, begin: int, end: int) -> bool:
    """Whether the memory of an input was made by a call of a span."""
    traced = call.inputs.get(call.facts.names[i])
    return traced is not None and traced.memory is not None and begin <= traced.memory <= end


def _unknown_main(
    calls: Sequence[Call], stretch: Stretch, begin: int, end: int, others: frozenset[int]
) -> Refusal | None:
    """Where it is not known which of the streams shows the step: one may be made of the time alone.

    It need not be known if what enters the main stream may be denoised, and no other one may hold that, or each is made
    of the other.
    """
    main = stretch.streams[0]
    if main.shown - others - {UNKNOWN}:
        return None
    if not main.shown - others:
        return Refusal(
            f"stack {stretch.name}",
            f"{main.name} handed on, which holds nothing that is denoised",
            "a stream that the latent enters",
            "hand on the stream itself from block to block, in one shape, as one graph makes it and another takes it",
        )
    made = {stream: _made_of(calls, stretch, begin, end, stream) for stream in stretch.streams}
    through = _handed_through(calls, stretch, begin, end)
    for stream in (s for s in stretch.streams[1:] if s not in through):
        if stream.shown - others and not (stream in made[main] and main in made[stream]):
            return Refusal(
                f"stack {stretch.name}",
                f"{main.name} and {stream.name} handed on beside each other, neither known to hold what is denoised",
                "one stream that it enters",
                "compute what the blocks begin with in code that is captured",
            )
    return None


def _made_of(calls: Sequence[Call], stretch: Stretch, begin: int, end: int, stream: RelayStream) -> set[RelayStream]:
    """The streams of a span that are made of one of them, as far as is known, or that may be.

    A large one may be that Python has made of something, if the blocks leave it something of that one stream.
    """
    kinds = _beside(calls, replace(stretch, streams=(stream,)), begin, end, renews=False).kinds
    taken = _taken(calls)
    ended = [((k, i), s) for k, _, _, ends in _with_ends(calls, stretch, begin, end) for i, s in ends.items()]
    leaves = any(
        kinds.get((k, i)) is Kind.STREAM and (k, i) not in taken
        for k, number, call, ends in _with_ends(calls, stretch, begin, end)
        for i in _beside_streams(stretch.streams, call, number) - ends.keys()
    )
    may_be = {Kind.STREAM, Kind.DOUBTFUL} if leaves else {Kind.STREAM}
    return {
        s
        for place, s in ended
        if (kind := kinds.get(place)) is Kind.STREAM or (kind in may_be and math.prod(s.form[0][1:-1]) > 1)
    }


def _handed_through(calls: Sequence[Call], stretch: Stretch, begin: int, end: int) -> set[RelayStream]:
    """The streams of a span that a call hands through where they end: nothing is added to them."""
    return {
        stream
        for _, _, call, ends in _with_ends(calls, stretch, begin, end)
        for output, stream in ends.items()
        if output in call.through
    }


def _beside_streams(streams: Sequence[RelayStream], call: Call, number: int) -> set[int]:
    """Which outputs of a call are tensors, and none of the streams in any block."""
    handed = {s.output for s in streams if s.maker.block(call.family, number) is not None}
    return {i for n, i in enumerate(call.tensors) if n not in handed}


def _taken(calls: Sequence[Call]) -> dict[Place, int]:
    """For each output that a graph takes, or something in its memory, the last call that does."""
    return {p: k for k, call in enumerate(calls) for t in call.inputs.values() for p in (*t.origin.of, t.made_by) if p}


def _without_beside(calls: Sequence[Call], stretch: Stretch, begin: int, end: int) -> Stretch:
    """A stretch without what is handed on beside its main stream, and made of that nowhere: a hit makes it anew.

    What a call hands through it has not made: it stays, and on a hit it is handed through as well.
    """
    main = stretch.streams[0]
    kept = {main, *_handed_through(calls, stretch, begin, end), *_made_of(calls, stretch, begin, end, main)}
    return replace(stretch, streams=tuple(s for s in stretch.streams if s in kept))


def _moved(calls: Sequence[Call], stretch: Stretch, begin: int, end: int) -> Refusal | None:
    """Where blocks hand a stream on with its elements in other places, or in the place of another one.

    What was added to a stream once would be added to other elements, or to another stream.
    """
    starts, at = [*stretch.starts, end + 1], stretch.starts.index(begin)
    for block in range(at, _last(stretch, end) + 1):
        first, last = starts[block], min(starts[block + 1] - 1, end)
        of_block = list(_numbered(calls, first, last))
        begun = {s: _begin(of_block, block, s) for s in stretch.streams}
        own = {s: _ways(of_block, block, stretch.streams, place, s) for s, place in begun.items()}
        given = {t.made_by for *_, call in of_block for t in call.inputs.values()}
        made = {p for p in given if p is not None and p[1] >= 0 and starts[0] <= p[0] < first} - {*begun.values()}
        others = [(calls[k].outputs[i], _ways(of_block, block, stretch.streams, (k, i))) for k, i in made]
        for a, way in own.items():
            far = way.get(a, (math.inf, False))
            exchanged = any(_nearer(own, a, b) and _nearer(own, b, a) for b in stretch.streams if b is not a)
            if far[1]:
                got = f"{a.name} {a.form[0]}, whose elements its blocks put in other places"
            elif exchanged or any(form == a.form and a in other and other[a][0] < far[0] for form, other in others):
                got = f"{a.name} {a.form[0]}, which goes on as what another one was"
            else:
                continue
            return Refusal(
                f"stack {stretch.name}",
                got,
                "blocks that hand on each stream as they take it",
                "put the elements back in each block, or run this model uncached",
            )
    return None


def _nearer(ways: Mapping[RelayStream, Mapping[RelayStream, tuple[int, bool]]], a: RelayStream, b: RelayStream) -> bool:
    """Whether what goes on as stream b is made of a through fewer operations than of b."""
    far = math.inf
    return a.form == b.form and ways[a].get(b, (far,))[0] < ways[b].get(b, (far,))[0]


def _begin(calls: Sequence[_Numbered], block: int, stream: RelayStream) -> Place | None:
    """Who made a stream as a block takes it."""
    for _, number, call in calls:
        if stream.reader.is_call(call.family, number, block) and stream.name in call.inputs:
            return call.inputs[stream.name].made_by
    return None


def _ways(
    calls: Sequence[_Numbered],
    block: int,
    streams: Sequence[RelayStream],
    begun: Place | None,
    stream: RelayStream | None = None,
) -> dict[RelayStream, tuple[int, bool]]:
    """What a block makes of a tensor: the streams at its end, the operations between at least, and whether it is moved.

    Args:
        calls: of the block, up to the end of the span.
        block: its number.
        streams: of the span.
        begun: who made the tensor, if that is known.
        stream: which stream it is as the block takes it, if it is one.
    """
    made: dict[Place, tuple[int, bool]] = {}
    found: dict[RelayStream, tuple[int, bool]] = {}
    for k, number, call in calls:
        names = call.facts.names
        traced = {i: t for i, n in enumerate(names) if (t := call.inputs.get(n)) is not None}
        given = {i: made[t.made_by] for i, t in traced.items() if t.made_by in made}
        given |= {i: (0, False) for i, t in traced.items() if begun is not None and t.made_by == begun}
        if stream is not None and stream.reader.is_call(call.family, number, block):
            given[names.index(stream.name)] = 0, False
        for output, ways in enumerate(call.facts.ways):
            both = [(far + ways[i][0], moved or ways[i][1]) for i, (far, moved) in given.items() if i in ways]
            if both:
                made[k, output] = min(both)
        for s in streams:
            is_end = s.maker.is_call(call.family, number, block) and s.output < len(call.tensors)
            place = k, call.tensors[s.output] if is_end else -1
            if place in made:
                found[s] = made[place]
    return found


_Numbered = tuple[int, int, Call]
"""A call: its number in all, that among those of its code, and itself."""


def _numbered(calls: Sequence[Call], first: int, last: int) -> Iterator[_Numbered]:
    """Some calls, from the first to the last."""
    numbers = Counter(call.family for call in calls[:first])
    for k, call in enumerate(calls[first : last + 1], first):
        numbers[call.family] += 1
        yield k, numbers[call.family], call


def _only_reads(
    calls: Sequence[Call], stretch: Stretch, begin: int, end: int, others: frozenset[int]
) -> RelayStream | None:
    """A stream that begins with nothing that is known to be denoised, and of which no other is made.

    All that it shows of the picture it may have read from another one. The main stream may be what is denoised.
    """
    through, main = _handed_through(calls, stretch, begin, end), stretch.streams[0]
    for s in (s for s in stretch.streams if s not in through):
        shown = s.shown - others - (frozenset() if s is main else {UNKNOWN})
        if (not shown or _is_learned(calls, s)) and _made_of(calls, stretch, begin, end, s) <= {s}:
            return s
    return None


def _is_learned(calls: Sequence[Call], stream: RelayStream) -> bool:
    """Whether a call before the first block that takes a stream was given a weight in its place."""
    alike = [call.facts for call in calls if call.family == stream.reader.family]
    before = alike[: stream.reader.number(0) - 1]
    return any(facts.names[i] == stream.name for facts in before for i in facts.roles.weights)


def _is_sum(calls: Sequence[Call], stretch: Stretch, begin: int, end: int, stream: RelayStream) -> bool:
    """Whether blocks make nothing of what is handed on but by adding to it: a running sum of what they make of others.

    It would be what it was, however far the streams have come of which it is made.
    """
    taken, made = False, set[Place]()
    for k, number, call, _ in _with_ends(calls, stretch, begin, end):
        first = stream.reader.is_call(call.family, number, stretch.starts.index(begin))
        of = {i for i, n in enumerate(call.facts.names) if (t := call.inputs.get(n)) and t.origin.of & made}
        of |= {call.facts.names.index(stream.name)} if first else set()
        if not of <= set(call.facts.accumulated):
            return False
        new = {(k, i) for i, shown in enumerate(call.facts.shown) if of & set(shown) and i not in call.through}
        taken, made = taken or bool(new), made | new
    return taken


def _unseen_stream(
    calls: Sequence[Call], stretch: Stretch, begin: int, end: int, others: frozenset[int], beside: Beside
) -> Refusal | None:
    """Where the blocks leave what may be the picture: no stream, but a value that would be what it was.

    So may be, unless it has the form of keys and values or lies in the memory of others:

    - what they make of streams, if a graph behind the span takes it;
    - what no graph takes and a call makes that hands on a stream, unless what is behind goes on with the main stream,
      and that shows what is denoised; and what no graph takes at all, if neither is known;
    - what code between graphs keeps longer than its loop needs, or returns;
    - what blocks hand on to each other, and no graph takes of the last one;
    - what they write to, if a graph behind the span takes it.
    """
    main = stretch.streams[0]
    known = bool(main.shown - others - {UNKNOWN}) or not others
    taken = _taken(calls)
    span = list(_with_ends(calls, stretch, begin, end))
    ended = {(k, i): s for k, _, _, ends in span for i, s in ends.items()}
    # What code between graphs has made may be made of a copy, even if it holds the stream's own numbers.
    behind = [t for call in calls[end + 1 :] for t in call.inputs.values()]
    surely = {p for t in behind for p in t.origin.of if t.origin.known or t.memory == p[0]}
    goes_on = any(s is main and place in surely for place, s in ended.items())
    names = ((call, call.facts.names[i]) for _, _, call, _ in span for i in call.facts.written)
    written = {call.inputs[name].memory for call, name in names if name in call.inputs}
    rewritten = {t.memory for t in behind if not (t.origin.known and t.origin.of <= ended.keys())} & written - {None}

    def may_be_seen(k: int, i: int, form: Form, call: Call, number: int) -> bool:
        """Whether what a call leaves may be the picture behind the span."""
        hands_on = any(s.maker.block(call.family, number) is not None for s in stretch.streams)
        if not (form[1].is_floating_point or form[1].is_complex):
            return False  # a mask or an index, which is handed on as it is
        if (k, i) in taken:
            return True
        if hands_on:
            return not (known and goes_on and i in call.shared)
        return not (known or goes_on or i in call.shared or is_heads(form, main.form))

    # What a block hands on to a later one, and the last one leaves to code that no graph shows.
    block = partial(bisect_right, stretch.starts)
    handed_on = {
        (calls[k].family, i) for (k, i), to in taken.items() if begin <= k <= to <= end and block(k) < block(to)
    }

    def is_left(k: int, i: int, call: Call) -> bool:
        """Whether it is a chain's end that no graph takes."""
        return (call.family, i) in handed_on and (k, i) not in taken

    def is_kept(k: int, i: int, form: Form, call: Call) -> bool:
        """Whether somebody holds what a call makes two blocks later, or it is returned."""
        later = block(k) + 1
        until = stretch.starts[later] if later < len(stretch.starts) else len(calls)
        return call.held.get(i, -1) >= until and form[1].is_floating_point and not is_heads(form, main.form)

    def seen_by(k: int, i: int, form: Form, call: Call, number: int) -> str | None:
        """Who may see what a call leaves."""
        if is_kept(k, i, form, call):
            return "still held two blocks later, or returned"
        passed = not begin <= taken.get((k, i), -1) <= end and may_be_seen(k, i, form, call, number)
        return "used behind them" if passed or is_left(k, i, call) else None

    unseen = (
        f"{form[0]} made by its blocks and {by}"
        for k, number, call, ends in span
        for i in _beside_streams(stretch.streams, call, number) - ends.keys() - call.through
        if (form := call.outputs[i]) is not None and may_be_read(form) and beside.kinds.get((k, i)) is Kind.STREAM
        if (by := seen_by(k, i, form, call, number)) is not None
    )
    got = "a write to what is read behind the blocks" if rewritten else next(unseen, None)
    if got is None:
        return None
    return Refusal(
        f"stack {stretch.name}",
        f"{got}, beside {main.name} {main.form[0]}",
        "blocks that hand on all that is made of their streams, each in one shape",
        "choose Fn_compute_blocks and Bn_compute_blocks so that shapes are equal between them, or run it uncached",
    )


def _beside(
    calls: Sequence[Call],
    stretch: Stretch,
    begin: int,
    end: int,
    light: Collection[SpanCall] | None = None,
    renews: bool = True,
) -> Beside:
    """What the calls of a span make beside its streams."""
    blocks = range(stretch.starts.index(begin), _last(stretch, end) + 1)
    beside = Beside(stretch.streams, blocks, begin, light=light, renews=renews)
    for k, number, call, ends in _with_ends(calls, stretch, begin, end):
        origins = {name: i.origin for name, i in call.inputs.items()}
        beside.see(k, call.family, number, call.facts, origins, call.tensors, call.through, ends)
    return beside


def _last(stretch: Stretch, end: int) -> int:
    """The last block of a span that ends with a call."""
    return sum(start <= end for start in stretch.starts) - 1


def _with_ends(
    calls: Sequence[Call], stretch: Stretch, begin: int, end: int
) -> Iterator[tuple[int, int, Call, dict[int, RelayStream]]]:
    """The calls of a span: numbers of each, in all and of its code, itself, and which of its outputs end a stream."""
    last = _last(stretch, end)
    for k, number, call in _numbered(calls, begin, end):
        tensors = call.tensors
        ended = ended_by(stretch.streams, call.family, number, last)
        ends = {tensors[i]: stretch.streams[s] for i, s in ended.items() if i < len(tensors)}
        yield k, number, call, ends


def _lightest(work: Mapping[SpanCall, int], most: float) -> frozenset[SpanCall]:
    """The calls that do least work, as many of them as do no more than so much together."""
    light, done = set[SpanCall](), 0.0
    for call, of_call in sorted(work.items(), key=lambda item: item[1]):
        done += of_call
        if done > most:
            break
        light.add(call)
    return frozenset(light)


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
