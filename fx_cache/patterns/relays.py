"""Finds stacks whose blocks were captured in graphs of their own, from the calls of one whole forward.

Where a graph break lies inside the blocks, or the code around them falls back to Python, no graph holds two blocks.
Such a stack is a *relay*: its streams are handed on from graph to graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_cache.config import CacheConfig
from fx_cache.errors import Failure, Refusal, StageError, stage
from fx_cache.patterns.calls import UNKNOWN, Call, GraphFacts, Place, Source
from fx_cache.patterns.spans import MIN_SHARE, Ranges, least_gain, random_refusal
from fx_cache.patterns.stretches import Point, RelayStream, Stretch, stretches


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
    """

    name: str
    begin: Point
    blocks: int
    streams: tuple[RelayStream, ...]
    share: float | None
    ranges: Ranges
    groups: tuple[str, ...]


class Beside:
    """What the calls of a span make that neither ends a stream nor depends on one, nor on nothing but weights.

    A hit gives it back as it was, and it may be made of the time: nobody behind the span is to read it.

    Attributes:
        places: these outputs.
    """

    def __init__(self, streams: Sequence[RelayStream], begin: int) -> None:
        """
        Args:
            streams: of the span.
            begin: number of its first call.
        """
        self.places: set[Place] = set()
        self._begin = begin
        self._tokens = frozenset().union(*(s.tokens for s in streams)) - {UNKNOWN}
        self._readers = {(s.reader.family, s.name) for s in streams}

    def see(
        self,
        at: int,
        family: Hashable,
        facts: GraphFacts,
        sources: Mapping[str, Source],
        outputs: Sequence[Any],
        ends: Collection[int],
    ) -> None:
        """Takes notice of a call of the span.

        Args:
            at: its number.
            family: its code.
            facts: of its graph.
            sources: where the tensors come from that it was given, by name.
            outputs: what it made, or the forms of that; what is no tensor is not looked at.
            ends: numbers of those of the tensors that end a stream.
        """
        streams = {
            name
            for name, (made_by, tokens) in sources.items()
            if (family, name) in self._readers
            or tokens & self._tokens
            or (made_by is not None and made_by[0] >= self._begin and made_by not in self.places)
        }
        if not streams:
            written = (sources.get(facts.names[i], (None, None))[0] for i in facts.written)
            self.places.update(place for place in written if place is not None)
        number = -1
        for output, (made, shown) in enumerate(zip(outputs, facts.shown, strict=True)):
            if not isinstance(made, torch.Tensor | tuple):
                continue
            number += 1
            constant = set(shown).issubset(facts.roles.weights)
            if number not in ends and not constant and not streams.intersection(facts.names[i] for i in shown):
                self.places.add((at, output))


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
    if _read_beside(calls, stretch, begin, end):
        return Refusal(
            f"stack {name}",
            "a value that its blocks make beside their streams, of what may change at every step, and that is read "
            "behind them",
            "blocks that hand on nothing but their streams",
            "compute it before the blocks, or set options={'Bn_compute_blocks': 1} if the last block makes it",
        )
    share = _work(calls, begin, end) / total if total else None
    if share is not None and share < MIN_SHARE:
        return Refusal(
            f"stack {name}",
            f"{share:.1%} of the forward's FLOPs in the blocks that a hit would skip",
            f"at least {MIN_SHARE:.0%}",
            "choose a smaller Fn_compute_blocks or Bn_compute_blocks, or run this model uncached",
        )
    ranges = ((0, fn), (fn, count - bn), (count - bn, count))
    groups = tuple(dict.fromkeys(g for call in calls[starts[0] : stretch.end + 1] for g in call.facts.groups))
    return RelayPlan(name, stretch.begin, count, stretch.streams, share, ranges, groups or config.process_groups)


def _made_within(call: Call, i: int, begin: int, end: int) -> bool:
    """Whether the memory of an input was made by a call of a span."""
    traced = call.inputs.get(call.facts.names[i])
    return traced is not None and traced.memory is not None and begin <= traced.memory <= end


def _read_beside(calls: Sequence[Call], stretch: Stretch, begin: int, end: int) -> bool:
    """Whether a call behind a span reads what one of its calls made beside its streams."""
    beside = Beside(stretch.streams, begin)
    last = sum(start <= end for start in stretch.starts) - 1
    numbers: Counter[Hashable] = Counter()
    for k, call in enumerate(calls[: end + 1]):
        numbers[call.family] += 1
        if k >= begin:
            ends = {s.last for s in stretch.streams if s.maker.is_call(call.family, numbers[call.family], last)}
            sources = {name: (i.made_by, i.tokens) for name, i in call.inputs.items()}
            beside.see(k, call.family, call.facts, sources, call.outputs, ends)
    made = {k for k, _ in beside.places}
    behind = (i for call in calls[end + 1 :] for i in call.inputs.values())
    return any(i.made_by in beside.places or (i.made_by is None and i.memory in made) for i in behind)


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
