"""Classifies the values at block boundaries: which are streams, and which value a stream has at each boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from fx_cache.patterns.graph import (
    ancestors,
    callee,
    describe,
    external_inputs,
    is_part_of_weight,
    is_tensor,
    is_weight,
    positions,
    same_shape,
    structure,
    value_of,
)
from fx_cache.patterns.inputs import InputRoles
from fx_cache.patterns.places import distances, in_place, only_accumulated
from fx_cache.patterns.stacks import Stack
from fx_cache.patterns.values import data_inputs


@dataclass(frozen=True)
class Stream:
    """A tensor carried from block to block.

    Attributes:
        values: its value at each of the n + 1 boundaries of a stack of n blocks; None where it does not exist.
    """

    values: tuple[fx.Node | None, ...]

    @property
    def full(self) -> bool:
        """Whether it goes through the whole stack and on behind it."""
        return all(v is not None for v in self.values)

    @property
    def stretch(self) -> tuple[int, int]:
        """The longest run of boundaries between which it exists, as (first, last)."""
        best, first = (0, 0), 0
        for i, value in enumerate(self.values):
            if value is None:
                first = i + 1
            elif i - first > best[1] - best[0]:
                best = (first, i)
        return best

    @property
    def carried(self) -> bool:
        """Whether every block reads it; what the last one makes of it may be unused."""
        return all(v is not None for v in self.values[:-1])


class StackStreams:
    """The streams of one stack.

    Boundary i lies before block i, boundary n after the last block. The window of block i runs from boundary i to
    boundary i + 1 and so includes the glue behind the block; behind the last block, as much of what is repeated there
    as leaves nothing but streams.

    Attributes:
        stack: the stack.
        streams: the streams, those that go on behind the stack first, then those that appear or end in it.
        invariants: values from before the stack that every block reads (conditioning, modulation, rotary tables).
        long_skips: values made in one window and used behind the next one.
        kinds: for each block, the number of its kind; equal for blocks that compute the same function.
    """

    def __init__(self, graph: fx.Graph, stack: Stack, roles: InputRoles) -> None:
        self.stack = stack
        inputs = list(graph.find_nodes(op="placeholder"))
        denoised = roles.latents if roles.latents and roles.certain else (*roles.latents, *roles.conditioning)
        self._may_be_denoised = {inputs[i] for i in denoised}
        self._order = positions(graph)
        self._nodes = list(graph.nodes)
        self._inputs = [external_inputs(b.nodes) for b in stack.blocks]
        self._keys = [structure(b.nodes, e)[0] for b, e in zip(stack.blocks, self._inputs, strict=True)]
        kinds: dict[Any, int] = {}
        self.kinds = [kinds.setdefault(k, len(kinds)) for k in self._keys]
        self._parts_of_weights = {n for n in self._nodes if is_part_of_weight(n)}
        begin = [self._order[b.nodes[0]] for b in stack.blocks]
        last = self._order[stack.blocks[-1].nodes[-1]] + 1
        ends = [last + glue for glue in range(self._trailing_glue(), -1, -1)]
        for seen, end in [(seen, end) for seen in (False, True) for end in ends]:
            self.starts = [*begin, end]
            self._made = [self._made_in(i) for i in range(len(stack.blocks))]
            chains = self._chains()
            full = [c[-1] for c in chains if all(v is not None for v in c)]
            # As much of the glue as leaves nothing but streams; or some.
            if full and (seen or all(v in full for v in self._made[-1])):
                break
        found = [Stream(tuple(c)) for c in chains if not (self._sums_up(c) or self._only_reads(c, chains))]
        self.streams = sorted(found, key=lambda s: not s.full)
        self.invariants = self._invariants()
        self.long_skips = self._long_skips()

    def end(self, boundary: int) -> int:
        """Behind which place in the graph the block before a boundary is over, and the streams that go on are made."""
        if boundary == 0:
            return self.starts[0]
        values = [v for s in self.streams if s.full and (v := s.values[boundary]) is not None]
        return 1 + max(self._order[n] for n in (*values, self.stack.blocks[boundary - 1].nodes[-1]))

    def given(self, boundary: int, stream: Stream) -> fx.Node | None:
        """What the block before a boundary gave of a stream, if the glue behind it made another value of that."""
        value = stream.values[boundary]
        block = set(self.stack.blocks[boundary - 1].nodes) if boundary > 0 else set()
        if value is None or not block or value in block:
            return None
        glue = [n for n in self._window(boundary - 1) if n not in block]
        if stream.values[boundary - 1] in external_inputs(glue):
            return None  # what the block gave is added to the stream
        return continues(value, [n for n in external_inputs(glue) if n in block], glue, self._order)

    def _trailing_glue(self) -> int:
        """How many nodes behind the last block repeat the glue behind the block before it (a residual add, say)."""
        before, last = (b.nodes[-1] for b in self.stack.blocks[-2:])
        between = self._nodes[self._order[before] + 1 : self._order[self.stack.blocks[-1].nodes[0]]]
        behind = self._nodes[self._order[last] + 1 :]
        taken = set(self._nodes[self._order[before] + 1 : self._order[last] + 1 + len(between)])
        while between and not any(u in taken for u in between[-1].users):
            between.pop()  # of no stream: no block goes on with it
        for count in range(min(len(between), len(behind)), 0, -1):
            if _wiring(between[:count]) == _wiring(behind[:count]):
                return count
        return 0

    def _made_in(self, i: int) -> list[fx.Node]:
        """Tensors made in the window of block i and used behind it."""
        end = self.starts[i + 1]
        return [
            n for n in self._nodes[self.starts[i] : end] if is_tensor(n) and any(self._order[u] >= end for u in n.users)
        ]

    def _chains(self) -> list[list[fx.Node | None]]:
        """What is carried from block to block: its value at each boundary, None where it does not exist."""
        n = len(self.stack.blocks)
        chains: list[list[fx.Node | None]] = []
        open_at: dict[fx.Node, list[fx.Node | None]] = {}
        for boundary in range(n, 0, -1):
            made = self._made[boundary - 1]
            following = {v: chain for v, chain in open_at.items() if v not in made}
            for value, chain in following.items():
                chain[boundary - 1] = value  # this window leaves the stream as it is
            taken = set(following)
            # What goes on comes first: a long skip made beside it may continue the same value.
            for value in sorted(made, key=lambda v: v not in open_at):
                before, begins = self._before(boundary, value, taken)
                if value not in open_at:
                    if before is None:
                        continue
                    open_at[value] = [None] * (n + 1)
                    open_at[value][boundary] = value
                    chains.append(open_at[value])
                if before is not None:
                    taken.add(before)
                    open_at[value][boundary - 1] = before
                    if not begins:
                        following[before] = open_at[value]
            open_at = following
        return [c for c in chains if self._made_by_blocks(c)]

    def _made_by_blocks(self, chain: list[fx.Node | None]) -> bool:
        """Whether blocks have a part in the values.

        What only glue carries on (a running sum) is no stream, nor is what the last block alone adds to another.
        """
        if len(chain) > 2 and all(v is chain[0] for v in chain[:-1]):
            return False
        for i, block in enumerate(self.stack.blocks):
            value, before = chain[i + 1], chain[i]
            if value is None or value is before:
                continue
            window = set(self._nodes[self.starts[i] : self.starts[i + 1]])
            outside = {a for n in window for a in n.all_input_nodes if a not in window}
            if ancestors(value, stop=outside) & set(block.nodes):
                return True
        return False

    def _sums_up(self, chain: list[fx.Node | None]) -> bool:
        """Whether nothing but its own next value is made of what is carried on, by adding to it: a running sum.

        All of it is made of other streams, and it would be what it was however far those have come.
        """
        first = next(v for v in chain if v is not None)
        carried_on = any(v is not None and v is not first for v in chain)
        return carried_on and only_accumulated(first, self._nodes[self.starts[0] : self.starts[-1]])

    def _only_reads(self, chain: list[fx.Node | None], chains: list[list[fx.Node | None]]) -> bool:
        """Whether it begins with nothing that may be denoised (zeros, queries, the time), and no other stream reads it.

        All that it shows of the picture it has read from another one.
        """
        first = next(v for v in chain if v is not None)
        begun = ancestors(first, reads=data_inputs)
        last = next(v for v in reversed(chain) if v is not None)
        if begun & self._may_be_denoised or not ancestors(last, reads=data_inputs) & self._may_be_denoised:
            return False
        reached = {first}
        for node in self._nodes[self._order[first] + 1 : self.starts[-1]]:
            if any(a in reached for a in node.all_input_nodes):
                reached.add(node)
        others = [c for c in chains if c is not chain]
        return not any(v in reached for c in others for v in c)

    def _before(self, boundary: int, value: fx.Node, taken: set[fx.Node]) -> tuple[fx.Node | None, bool]:
        """What `value` at `boundary` continues at the one before, or None; and whether the stream begins there."""
        i = boundary - 1
        nodes = self._window(i)
        # Only what the block itself reads: a tensor that is added between two blocks is no stream.
        read = [c for c in self._inputs[i] if is_tensor(c) and not is_weight(c) and c not in taken]
        # Nor what was made before the stack and this block is the first to read (a tensor of its own).
        own = {c for c in read if i > 0 and self._order[c] < self.starts[0] and c not in self._inputs[i - 1]}
        aligned = self._aligned(boundary, value)
        if aligned is not None and is_weight(aligned):
            return aligned, True  # learned tokens
        if aligned in read and same_shape(aligned, value):
            aligned = self._exchanged(boundary, value, aligned, read)
            if in_place(value, aligned, nodes):
                return aligned, aligned in own
        beside = self._beside(boundary, value)
        if beside is not None and beside not in taken and same_shape(beside, value) and in_place(value, beside, nodes):
            return beside, False
        if boundary == len(self.stack.blocks) and any(
            self._is_added(i - 1, n) for n in self._same_made(i - 1, value, i)
        ):
            return None, False
        # What earlier blocks read and left as it was is a stream only if nothing that they made is.
        made = [c for c in read if i == 0 or self._order[c] >= self.starts[0]]
        left = [c for c in read if c not in made and c not in own]
        # What only the glue reads is no stream either, but may be nearer: then none is.
        glue = [c for c in self._handed_to(i) if c not in read and c not in taken]
        found = continues(value, [*made, *glue], nodes, self._order) or continues(value, left, nodes, self._order)
        return (None if found in glue else found), False

    def _handed_to(self, i: int) -> list[fx.Node]:
        """The tensors, made in the window before, that window i reads."""
        before = self.starts[i - 1] if i > 0 else self.starts[0]
        read = [n for n in external_inputs(self._window(i)) if before <= self._order[n] < self.starts[i]]
        return [n for n in read if is_tensor(n) and not is_weight(n)]

    def _aligned(self, boundary: int, value: fx.Node) -> fx.Node | None:
        """By structure: what block i reads where the next like block reads `value`, or the one before it made."""
        i = boundary - 1
        if boundary < len(self._inputs) and self._keys[i] == self._keys[boundary]:
            following = self._inputs[boundary]
            if value in following:
                return self._inputs[i][following.index(value)]
        # The last block may make less than the others do, behind where it has done the same.
        found = [n for n in self._same_made(i - 1, value, i) if n in self._inputs[i]]
        return next((n for n in found if in_place(value, n, self._window(i))), None)

    def _exchanged(self, boundary: int, value: fx.Node, aligned: fx.Node, read: list[fx.Node]) -> fx.Node:
        """What `value` continues where blocks hand on streams in each other's place: the one that is nearer."""
        i = boundary - 1
        a, b = (i, boundary) if boundary < len(self._inputs) else (i - 1, i)
        now, then = self._inputs[a], self._inputs[b]
        if a < 0 or len(now) != len(then):
            return aligned
        handed = {*now, *self._made[a]}
        handed_on = {self._inputs[i][k] for k, n in enumerate(then) if n is not now[k] and n in handed}
        distance = {c: distances(c, self._window(i)).get(value) for c in read if c in handed_on}
        near = {c: d for c, d in distance.items() if d is not None and same_shape(c, value)}
        nearest = min(near, key=near.__getitem__, default=aligned)
        return nearest if near.get(nearest, 0) < near.get(aligned, len(self._order)) else aligned

    def _beside(self, boundary: int, value: fx.Node) -> fx.Node | None:
        """By structure: what a stream that goes on beside the blocks, read by the glue between them alone, was before.

        What the last alike window made at the same place; before the first, what that reads where the second one reads
        `value`. Where there is none, the only tensor that can be meant.
        """
        i = boundary - 1
        if boundary < len(self._inputs) and value in self._inputs[boundary]:
            return None
        window = self._window(i)
        read = [n for n in external_inputs(window) if is_tensor(n) and not is_weight(n)]
        alike = next((found for k in range(i - 1, -1, -1) if (found := self._same_made(k, value, i))), None)
        if alike is not None:
            return next((n for n in alike if n in read and in_place(value, n, window)), None)
        for following in self._same_made(1, value, 0) if i == 0 else ():
            reads = [external_inputs(self._computed(k, v)) for k, v in ((0, value), (1, following))]
            return reads[0][reads[1].index(value)] if value in reads[1] else None
        meant = [n for n in read if n not in self._inputs[i] and same_shape(n, value)]
        return meant[0] if len(meant) == 1 and boundary < len(self._inputs) else None

    def _same_made(self, k: int, value: fx.Node, i: int) -> list[fx.Node]:
        """What window k makes as window i makes `value`: by the same operations, if any with the same numbers."""
        own = self._computed(i, value)
        if not own or k < 0:
            return []
        alike = [
            (found, nodes)
            for found in self._window(k)
            if found.target == value.target and is_tensor(found) and same_shape(found, value)
            if len(nodes := self._computed(k, found)) == len(own)
        ]
        form, wiring = structure(own, external_inputs(own)), _wiring(own)
        same = [found for found, nodes in alike if structure(nodes, external_inputs(nodes)) == form]
        return same or [found for found, nodes in alike if _wiring(nodes) == wiring]

    def _is_added(self, i: int, value: fx.Node) -> bool:
        """Whether what window i makes is added there to what the next block reads: it is no stream by itself.

        That continues what the window before made, by a way that is nearer than the one through the value.
        """
        window = self._window(i)
        given = [distances(n, window) for n in self._handed_to(i) if same_shape(n, value)]
        onwards = distances(value, window)
        for end in self._made[i]:
            reaching = [d for d in given if end in d]
            if end is not value and end in onwards and same_shape(end, value) and reaching:
                nearest = min(reaching, key=lambda d: d[end])
                if value not in nearest or nearest[end] < nearest[value] + onwards[end]:
                    return True
        return False

    def _computed(self, i: int, value: fx.Node) -> list[fx.Node]:
        """The nodes of window i of which a value is made, and itself; none if it is not made there.

        Without those that take a part of a weight, as each block does of another part.
        """
        window = [n for n in self._window(i) if n not in self._parts_of_weights]
        inside = set(window)
        found = ancestors(value, stop=[n for n in external_inputs(window) if n not in inside]) & inside
        return [n for n in window if n in found] if value in inside else []

    def _window(self, i: int) -> list[fx.Node]:
        return self._nodes[self.starts[i] : self.starts[i + 1]]

    def _invariants(self) -> list[fx.Node]:
        start = self.starts[0]
        shared = [n for n in self._inputs[0] if all(n in e for e in self._inputs)]
        streams = {s.values[0] for s in self.streams}
        return [n for n in shared if is_tensor(n) and not is_weight(n) and self._order[n] < start and n not in streams]

    def _long_skips(self) -> list[fx.Node]:
        carried = {v for s in self.streams for v in s.values}
        found = []
        for i, made in enumerate(self._made[:-1]):
            end = self.starts[i + 2]
            found += [v for v in made if v not in carried and any(self._order[u] >= end for u in v.users)]
        return found


def _wiring(nodes: Sequence[fx.Node]) -> list[Any]:
    """What some nodes do with each other's values, whatever they read of others, their own block's weights, say."""
    place = {n: i for i, n in enumerate(nodes)}

    def form(node: fx.Node) -> Any:
        value = value_of(node)
        return describe(value)[:4] if is_tensor(node) else type(value)

    return [(n.op, callee(n), form(n), [place.get(a) for a in n.all_input_nodes]) for n in nodes]


def continues(
    value: fx.Node, candidates: Sequence[fx.Node], nodes: Sequence[fx.Node], order: dict[fx.Node, int]
) -> fx.Node | None:
    """Which of `candidates` the tensor `value` continues through `nodes`: same shape, nearest by data flow.

    A residual stream reaches its next value through few operations (an add, a view), any other tensor through a whole
    attention. Ties are broken by how both are read next, then in favour of the one made last.
    """
    inside = set(nodes)
    distance = {value: 0}
    frontier = [value]
    while frontier:
        following = []
        for n in frontier:
            if n in inside:
                for a in n.all_input_nodes:
                    if a not in distance:
                        distance[a] = distance[n] + 1
                        following.append(a)
        frontier = following
    near = [c for c in candidates if c in distance and same_shape(c, value) and in_place(value, c, nodes)]
    if not near:
        return None
    start = order[nodes[0]]
    used = _next_use(value, order, 0)
    # A long skip is as near as the stream where both are joined, but was made earlier.
    return min(near, key=lambda c: (distance[c], _next_use(c, order, start) != used, -order[c]))


def _next_use(node: fx.Node, order: dict[fx.Node, int], start: int) -> tuple[Any, ...]:
    """How the first reader from `start` on takes the value: its operation and the value's place among the arguments."""
    user = min((u for u in node.users if order[u] >= start), key=lambda u: order[u])
    places = [i for i, a in enumerate(tree_leaves(user.args)) if a is node]
    return user.op, user.target, tuple(places)
