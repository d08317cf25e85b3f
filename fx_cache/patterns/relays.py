"""Finds stacks whose blocks were captured in graphs of their own, from the calls of one whole forward.

Where a graph break lies inside the blocks, or the code around them falls back to Python, no graph holds two blocks.
What shows them then is the order of the calls: one graph called again and again, each time on what the call before
made. Such a stack is a *relay*: its streams are handed on from graph to graph.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from torch import fx
from torch._guards import CompileContext

from fx_cache.config import CacheConfig
from fx_cache.errors import Failure, Refusal, StageError, stage
from fx_cache.patterns.graph import draws_random, source_of, storage_key, written_storages
from fx_cache.patterns.groups import groups_of
from fx_cache.patterns.inputs import InputRoles, classify_inputs, token_sources
from fx_cache.patterns.programs import Program
from fx_cache.patterns.spans import MIN_OTHER_WORK, MIN_SHARE, Ranges, random_refusal
from fx_cache.patterns.stacks import MIN_BLOCKS
from fx_cache.patterns.work import Work

Form = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor."""

Place = tuple[int, int]
"""A call, and one of its outputs."""


@dataclass(frozen=True)
class GraphFacts:
    """What is known of one captured graph.

    Attributes:
        program: what it computes.
        roles: the roles of its inputs; none is a latent, since what is denoised only the end of the forward shows.
        names: where each input comes from, in the terms of the captured code; the same in every graph of that code.
        tokens: for each output, the inputs whose tokens it holds.
        written: inputs that it writes to in place.
        work: its FLOPs.
        span_work: those in spans of its own; 0 if it has none.
        frame: number of the captured code; the same for graphs that it was captured in anew.
        random: an operation that draws random numbers, or None.
        broken: place and reason of the graph break that ends it, or None.
        gradients: why nothing that it makes may be reused, or None.
        groups: names of the process groups whose ranks compute it together.
    """

    program: Program
    roles: InputRoles
    names: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    written: tuple[int, ...]
    work: int
    span_work: int
    frame: int
    random: str | None
    broken: str | None
    gradients: Refusal | None
    groups: tuple[str, ...]

    @property
    def layers(self) -> Hashable:
        """Captured code and its weights: the same for another pass of a request, and at another size."""
        return self.frame, frozenset(self.names[i] for i in self.roles.weights)


def read_facts(gm: fx.GraphModule, broken: str | None, gradients: Refusal | None, span_share: float) -> GraphFacts:
    """Reads a captured graph as a part of a forward.

    Args:
        gm: the graph as Dynamo captured it.
        broken: place and reason of the graph break that ends it, or None.
        gradients: why nothing that it makes may be reused, or None.
        span_share: the part of its FLOPs in spans of its own.
    """
    graph = gm.graph
    roles = classify_inputs(graph)
    roles = replace(roles, latents=(), conditioning=(*roles.latents, *roles.conditioning))
    inputs = list(graph.find_nodes(op="placeholder"))
    outputs = next(iter(graph.find_nodes(op="output"))).args[0]
    tokens = []
    for output in outputs:
        sources = token_sources(output) if isinstance(output, fx.Node) else set()
        tokens.append(tuple(i for i in roles.conditioning if inputs[i] in sources))
    written = written_storages(graph.nodes)
    work = Work(graph).total
    compile_id = CompileContext.current_compile_id()
    return GraphFacts(
        program=Program.of(graph),
        roles=roles,
        names=tuple(map(source_of, inputs)),
        tokens=tuple(tokens),
        written=tuple(i for i, n in enumerate(inputs) if storage_key(n) in written),
        work=work,
        span_work=round(span_share * work),
        frame=-1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id,
        random=next((n.name for n in graph.nodes if draws_random(n)), None),
        broken=broken,
        gradients=gradients,
        groups=groups_of(graph.nodes),
    )


@dataclass(frozen=True)
class InputTrace:
    """One tensor that a graph was called with.

    Attributes:
        form: shape and dtype.
        made_by: who made it, or most of it.
        tokens: the user's inputs whose tokens it holds.
        others: how many tokens at its beginning and at its end are none of what was made, but were joined to that.
    """

    form: Form
    made_by: Place | None
    tokens: frozenset[int]
    others: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Call:
    """One call of a graph within a forward.

    Attributes:
        family: which code it was; equal for calls of graphs that one function was captured in.
        facts: the graph.
        owner: the model's name of the first weight that it was given; empty without one.
        inputs: its input tensors by name.
        outputs: forms of its outputs, None for what is no tensor.
    """

    family: Hashable
    facts: GraphFacts
    owner: str
    inputs: Mapping[str, InputTrace]
    outputs: tuple[Form | None, ...]


@dataclass(frozen=True)
class RelayStream:
    """A tensor handed on from block to block.

    Attributes:
        name: the input of a block's first graph that takes it.
        maker: the family that makes it; called once in every block.
        output: which of the tensors that it gives back it is, in the span's last block.
        form: shape and dtype.
        tokens: the user's inputs whose tokens it holds where it enters the first block.
        others: how many tokens at its beginning and at its end are not handed on, but joined to it before every block.
    """

    name: str
    maker: Hashable
    output: int
    form: Form
    tokens: frozenset[int]
    others: tuple[int, int]


@dataclass(frozen=True)
class RelayPlan:
    """A stack over several graphs, and how it is cut.

    Attributes:
        name: module path of the block list.
        family: the code whose call begins a block.
        before: calls of that family in the forward before the first block.
        blocks: number of blocks.
        streams: what is handed on, the main one first.
        share: the part of the forward's FLOPs that a hit saves; None where none were counted.
        ranges: (head, span, tail) as block ranges.
        groups: names of the process groups whose ranks decide together.
    """

    name: str
    family: Hashable
    before: int
    blocks: int
    streams: tuple[RelayStream, ...]
    share: float | None
    ranges: Ranges
    groups: tuple[str, ...]


@dataclass(frozen=True)
class _Stretch:
    """A stack as found: the calls that begin its blocks, its streams, and the call that ends it."""

    starts: tuple[int, ...]
    streams: tuple[RelayStream, ...]
    end: int


def plan_relays(calls: Sequence[Call], config: CacheConfig) -> tuple[tuple[RelayPlan, ...], Refusal | None]:
    """The spans of a forward whose blocks lie in graphs of their own, in the order in which they run.

    Every stack gets a span of its own. Returns no plan and the reason where nothing can be cached; an error of ours is
    one.
    """
    try:
        with stage("plan_relays"):
            return _planned(calls, config)
    except StageError as error:
        return (), Failure.of(error, None)


def _planned(calls: Sequence[Call], config: CacheConfig) -> tuple[tuple[RelayPlan, ...], Refusal | None]:
    stretches = _outermost(_stretches(calls, config.Bn_compute_blocks == 0), calls)
    if not stretches:
        return (), _no_stack(calls)
    total = sum(c.facts.work for c in calls)
    least = MIN_OTHER_WORK * max(_work(calls, s.starts[0], s.end) for s in stretches)
    plans, refusals = [], []
    for stretch in stretches:
        plan = _plan(calls, stretch, total, config)
        if isinstance(plan, Refusal):
            refusals.append(plan)
        elif _work(calls, stretch.starts[0], stretch.end) >= least:
            plans.append(plan)
    return tuple(plans), None if plans else refusals[0]


def _work(calls: Sequence[Call], first: int, last: int) -> int:
    return sum(c.facts.work for c in calls[first : last + 1])


def _plan(calls: Sequence[Call], stretch: _Stretch, total: int, config: CacheConfig) -> RelayPlan | Refusal:
    starts = stretch.starts
    first = calls[starts[0]]
    name = _common_path([calls[i].owner for i in starts])
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
    share = _work(calls, begin, end) / total if total else None
    if share is not None and share < MIN_SHARE:
        return Refusal(
            f"stack {name}",
            f"{share:.1%} of the forward's FLOPs in the blocks that a hit would skip",
            f"at least {MIN_SHARE:.0%}",
            "choose a smaller Fn_compute_blocks or Bn_compute_blocks, or run this model uncached",
        )
    before = sum(c.family == first.family for c in calls[: starts[0]])
    ranges = ((0, fn), (fn, count - bn), (count - bn, count))
    groups = tuple(dict.fromkeys(g for call in calls[starts[0] : stretch.end + 1] for g in call.facts.groups))
    return RelayPlan(name, first.family, before, count, stretch.streams, share, ranges, groups or config.process_groups)


def _common_path(names: Sequence[str]) -> str:
    """What the weights of all blocks begin with: the path of the block list."""
    parts = [n.split(".") for n in names]
    common = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False))]
    return ".".join(common) or "the blocks"


def _made_within(call: Call, i: int, begin: int, end: int) -> bool:
    traced = call.inputs.get(call.facts.names[i])
    return traced is not None and traced.made_by is not None and begin <= traced.made_by[0] <= end


def _stretches(calls: Sequence[Call], at_end: bool) -> Iterator[_Stretch]:
    """Every run of calls of one family, each on what the one before led to.

    With `at_end` a span ends with the last block: then only streams count that it gives back too.
    """
    places: dict[Hashable, list[int]] = {}
    for i, call in enumerate(calls):
        places.setdefault(call.family, []).append(i)
    for starts in places.values():
        run: list[int] = starts[:1]
        carried: _Links = {}
        for a, b in pairwise(starts):
            links = _handed_on(calls, a, b)
            common = dict(links.items() & carried.items())
            if len(run) > 1 and not common:
                yield from _stretch(calls, run, carried, at_end)
                run = [a]
            run = [*run, b] if links else [b]
            carried = common or links
        yield from _stretch(calls, run, carried, at_end)


_Links = dict[str, tuple[Hashable, int]]
"""Inputs, and the family that makes each, with which of the tensors that it gives back that is."""


def _handed_on(calls: Sequence[Call], a: int, b: int) -> _Links:
    """Inputs of call b that were made since call a, by code called once, and have the form that they had there."""
    found = {}
    for name, traced in calls[b].inputs.items():
        before = calls[a].inputs.get(name)
        made = traced.made_by
        if before is not None and before.form == traced.form and made is not None and a <= made[0] < b:
            maker = _maker(calls, made)
            if sum(c.family == maker[0] for c in calls[a:b]) == 1:
                found[name] = maker
    return found


def _stretch(calls: Sequence[Call], starts: Sequence[int], carried: _Links, at_end: bool) -> Iterator[_Stretch]:
    """The stack of some blocks; without the last one, if that gives back nothing like what the others do."""
    for blocks in (starts, starts[:-1]):
        found = _whole_stretch(calls, blocks, carried, at_end) if len(blocks) >= MIN_BLOCKS else None
        if found is not None:
            yield found
            return


def _whole_stretch(calls: Sequence[Call], starts: Sequence[int], carried: _Links, at_end: bool) -> _Stretch | None:
    found: dict[str, tuple[RelayStream, int]] = {}
    given_back = False
    for name, (family, output) in sorted(carried.items()):
        place = next((i for i in range(starts[-1], len(calls)) if calls[i].family == family), None)
        if place is None:
            continue
        traced = calls[starts[0]].inputs[name]
        regular = next(i for i in range(starts[0], starts[1]) if calls[i].family == family)
        last = _same_output(calls[regular], calls[place], output)
        given_back = given_back or last is not None
        if not at_end:
            last = output
        if last is not None:
            others = {calls[b].inputs[name].others for b in starts[1:]}
            joined = others.pop() if len(others) == 1 else (0, 0)
            found[name] = RelayStream(name, family, last, traced.form, traced.tokens, joined), place
    if not found or not given_back:
        return None
    end = max(place for _, place in found.values())
    # The stream that goes on behind the blocks, and of which it is known what is denoised in it, before others.
    streams = [s for s, _ in found.values()]
    streams.sort(key=lambda s: (not _read_behind(calls, s, starts[-1], end), len(s.tokens) != 1, -math.prod(s.form[0])))
    return _Stretch(tuple(starts), tuple(streams), end)


def _same_output(regular: Call, last: Call, output: int) -> int | None:
    """Which tensor that the last block gives back is the one that the others give back as number `output`."""
    tensors = [f for f in regular.outputs if f is not None]
    ends = [f for f in last.outputs if f is not None]
    if len(ends) == len(tensors):
        return output if ends[output] == tensors[output] else None
    alike = [i for i, form in enumerate(ends) if form == tensors[output]]
    return alike[0] if len(alike) == 1 else None


def _read_behind(calls: Sequence[Call], stream: RelayStream, first: int, end: int) -> bool:
    """Whether a later graph reads what the last block makes of a stream."""
    for call in calls[end + 1 :]:
        for traced in call.inputs.values():
            made = traced.made_by
            if made is not None and first <= made[0] <= end and _maker(calls, made) == (stream.maker, stream.output):
                return True
    return False


def _maker(calls: Sequence[Call], place: Place | None) -> tuple[Hashable, int]:
    """The family that made a tensor, and which of the tensors that it gives back it is."""
    assert place is not None
    call, output = calls[place[0]], place[1]
    return call.family, sum(form is not None for form in call.outputs[:output])


def _outermost(found: Iterator[_Stretch], calls: Sequence[Call]) -> list[_Stretch]:
    """Of stretches that overlap, the one that holds most work, and of equals the one that begins first."""
    kept: list[_Stretch] = []
    for s in sorted(found, key=lambda s: (-_work(calls, s.starts[0], s.end), s.starts[0], -s.end)):
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
