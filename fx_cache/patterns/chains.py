"""Reads the stacks of a graph, and which of them follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from fx_cache.patterns.forward_patterns import ForwardPattern, match_pattern
from fx_cache.patterns.graph import (
    ancestors,
    descendants,
    is_tensor,
    is_weight,
    positions,
    same_shape,
    value_of,
)
from fx_cache.patterns.inputs import InputRoles, token_sources
from fx_cache.patterns.repeats import ALIKE_AT_END, alike, find_repeats
from fx_cache.patterns.stacks import MIN_BLOCKS, Block, Stack, find_stacks
from fx_cache.patterns.streams import StackStreams
from fx_cache.patterns.work import Work

Chain = list["StackReport"]


@dataclass(frozen=True)
class StackReport:
    """A stack as found, for plans and people."""

    streams: StackStreams
    main: int | None
    pattern: ForwardPattern | None

    @property
    def stack(self) -> Stack:
        return self.streams.stack

    @property
    def range(self) -> tuple[int, int]:
        """Positions of its first window's first node, and of the first node behind its last window."""
        return self.streams.starts[0], self.streams.starts[-1]


def read_stacks(graph: fx.Graph, roles: InputRoles) -> list[StackReport]:
    """Every stack: those that the module paths tell, and those that only the structure of the graph shows.

    Where both see one, its name is known; but what lies within one block of a stack is a part of it, whatever its name.
    """
    order = positions(graph)

    def extent(stack: Stack | Block) -> tuple[int, int]:
        return order[stack.nodes[0]], order[stack.nodes[-1]]

    def within(stack: Stack | Block, other: Stack | Block) -> bool:
        (first, last), (a, b) = extent(stack), extent(other)
        return a <= first and last <= b

    def apart(stack: Stack, other: Stack) -> bool:
        (first, last), (a, b) = extent(stack), extent(other)
        return last < a or b < first

    named: dict[Stack, list[StackReport]] = {}
    doubtful: dict[Stack, list[StackReport]] = {}

    def keep(stack: Stack) -> bool:
        found = list(_reports(graph, stack, roles)) if _like(stack) else []
        first, last = extent(stack)
        if any(r.main is not None for r in found) and 2 * len(stack.nodes) >= last - first:
            named[stack] = found
            return True
        doubtful.update({stack: found} if found else {})
        return False

    find_stacks(graph, keep)
    for repeat in find_repeats(graph):
        inner = [s for s in named if not apart(s, repeat)]
        if all(any(within(s, b) for b in repeat.blocks) for s in inner):
            found = [r for r in _reports(graph, repeat, roles) if r.main is not None]
            if found:
                named = {s: r for s, r in named.items() if s not in inner} | {repeat: found}
    for stack, found in doubtful.items():
        if not any(within(stack, other) or within(other, stack) for other in named):
            named[stack] = found
    return sorted((r for found in named.values() for r in found), key=lambda r: r.range)


def _like(stack: Stack) -> bool:
    """Whether most blocks are like the one before: a list of different layers is no stack."""
    words = [[n.target for n in b.nodes if is_tensor(n)] for b in stack.blocks]
    pairs = [alike(a, b) >= ALIKE_AT_END for a, b in pairwise(words)]
    return 2 * sum(pairs) >= len(pairs)


def _reports(graph: fx.Graph, stack: Stack, roles: InputRoles) -> Iterator[StackReport]:
    """A stack, or the parts of it between which no stream keeps its shape."""
    streams = StackStreams(graph, stack, roles)
    if not any(s.full for s in streams.streams):
        # First of all the part of a stream that goes on behind the stack, then the longest.
        count = len(stack.blocks)
        stretch = max((s.stretch for s in streams.streams), key=lambda s: (s[1] == count, s[1] - s[0]), default=(0, 0))
        if stretch[1] - stretch[0] >= MIN_BLOCKS:
            for a, b in ((0, stretch[0]), stretch, (stretch[1], count)):
                if b - a >= MIN_BLOCKS:
                    yield from _reports(graph, Stack(f"{stack.name}[{a}:{b}]", stack.blocks[a:b]), roles)
            return
    yield _report(graph, streams, roles)


def _report(graph: fx.Graph, streams: StackStreams, roles: InputRoles) -> StackReport:
    carried = sum(s.carried for s in streams.streams)
    inputs = list(graph.find_nodes(op="placeholder"))
    schedule = descendants(graph, [inputs[i] for i in roles.schedule])
    conditioned = any(
        value_of(n).ndim == 3 and n not in schedule and _reads_tokens(n, inputs, roles) for n in streams.invariants
    )
    main = _main_stream(graph, streams, roles)
    pattern = match_pattern(carried, len(streams.streams) - carried, conditioned)
    return StackReport(streams, main, pattern)


def _reads_tokens(node: fx.Node, inputs: list[fx.Node], roles: InputRoles) -> bool:
    """Whether a value is floating-point and made from conditioning: an encoder's token sequence."""
    made_from = ancestors(node)
    return bool(value_of(node).is_floating_point()) and any(inputs[i] in made_from for i in roles.conditioning)


def _main_stream(graph: fx.Graph, streams: StackStreams, roles: InputRoles) -> int | None:
    """The stream that carries the latent: the probe is its residual.

    Of the streams carried through the whole stack, one made from a latent before one that is not, one not made from
    conditioning before one that is, and then the largest.
    """
    full = [i for i, s in enumerate(streams.streams) if s.full]
    if not full:
        return None
    inputs = list(graph.find_nodes(op="placeholder"))
    latents = {inputs[i] for i in roles.latents}
    conditioning = {inputs[i] for i in roles.conditioning}

    def key(i: int) -> tuple[bool, bool, int]:
        first = streams.streams[i].values[0]
        assert first is not None
        made_from = token_sources(first)
        return not made_from & latents, bool(made_from & conditioning), -_numel(first)

    return min(full, key=key)


def _numel(node: fx.Node) -> int:
    value = value_of(node)
    count = 1
    for size in value.shape:
        hint = getattr(getattr(size, "node", None), "hint", size)
        count *= int(hint) if hint is not None else 1
    return count


def chains(graph: fx.Graph, reports: Sequence[StackReport], work: Work) -> list[Chain]:
    """Adjacent stacks, each continuing the streams of those before it; the chain with most work first.

    A chain may run between two stacks of another one, if nothing behind them reads what it makes. A stack whose blocks
    run between the blocks of another one belongs to the windows of that, and to no chain.
    """
    nodes = list(graph.nodes)
    outer: list[StackReport] = []
    for report in sorted(reports, key=lambda r: (-work.share(nodes[slice(*r.range)]), -len(r.stack.blocks))):
        begin, end = report.range
        if all(end <= o.range[0] or o.range[1] <= begin for o in outer):
            outer.append(report)
    found: list[Chain] = []
    for report in sorted(outer, key=lambda r: r.range):
        for i in reversed(range(len(found))):
            between = found[i + 1 :]
            if all(_ends_within(graph, c, report) for c in between) and _adjacent(graph, found[i], report, between):
                found[i].append(report)
                break
        else:
            found.append([report])
    return sorted(found, key=lambda c: -work.share(nodes[c[0].range[0] : c[-1].range[1]]))


def _ends_within(graph: fx.Graph, chain: Chain, report: StackReport) -> bool:
    """Whether what a chain makes is used up before the end of a stack behind it: what skips that one skips it too."""
    order = positions(graph)
    last = report.streams.starts[-1]
    made = [n for n in graph.nodes if chain[0].range[0] <= order[n] < chain[-1].range[1]]
    return all(order[u] < last for n in made if is_tensor(n) for u in n.users)


def _adjacent(graph: fx.Graph, before: Chain, after: StackReport, between: Sequence[Chain]) -> bool:
    """Whether `after` starts from what the stacks `before` it end with: no other token stream enters between them.

    What chains `between` them make may be added.
    """
    order = positions(graph)
    end = before[-1].streams.starts[-1]
    if after.streams.starts[0] < end:
        return False
    made = {s.values[-1] for r in before for s in r.streams.streams} - {None}
    within = [r.range for c in (before, *between) for r in c]
    inside = {n for n in graph.nodes if any(a <= order[n] < b for a, b in within)}
    firsts = [s.values[0] for s in after.streams.streams if s.full]
    if not made or not firsts:
        return False
    own = descendants(graph, [v for s in before[0].streams.streams if (v := s.values[0]) is not None])
    for first in firsts:
        assert first is not None
        reached = {n for n in ancestors(first, stop=inside) if order[n] < end and is_tensor(n) and not is_weight(n)}
        # A tensor of the stream's own shape is added to it, as ControlNets do; others are joined with it, but for what
        # the stacks have made themselves.
        others = [n for n in reached - made if value_of(n).ndim >= 3 and not same_shape(n, first) and n not in own]
        if not reached & made or others:
            return False
    return True
