"""Follows a stream back through a span, also where it goes on in another form: joined to others, divided, reshaped."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_cache.ops import version
from fx_cache.patterns.chains import StackReport
from fx_cache.patterns.graph import (
    draws_random,
    is_scalar,
    is_tensor,
    is_tensor_sequence,
    operation,
    positions,
    same_shape,
    touches,
    value_of,
    written_inputs,
    written_storages,
)
from fx_cache.patterns.places import COPIES, JOINS, is_layout


@dataclass(frozen=True)
class Carried:
    """What a value behind a span carries on, made of values from before it.

    Attributes:
        parts: these.
        form: a graph that takes them and puts them together as the span does; None: the one part as it is.
    """

    parts: tuple[fx.Node, ...]
    form: fx.Graph | None = None

    def value(self) -> fx.Node:
        """A node with the fake value of the whole."""
        return self.parts[0] if self.form is None else self.form.find_nodes(op="output")[0].args[0]

    def put_into(self, graph: fx.Graph, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Makes the whole in `graph`, where `env` says what stands for each part; returns the node."""
        if self.form is None:
            return env[self.parts[0]]
        inputs = self.form.find_nodes(op="placeholder")
        made = graph.graph_copy(self.form, {i: env[p] for i, p in zip(inputs, self.parts, strict=True)})
        assert isinstance(made, fx.Node)
        return made

    def with_parts(self, now: Any) -> Carried:
        """The same of other values: of ``now(part)`` for each part."""
        return Carried(tuple(map(now, self.parts)), self.form)


def carried_from(
    graph: fx.Graph, group: Sequence[StackReport], at: tuple[int, int], value: fx.Node, to: tuple[int, int]
) -> Carried | None:
    """What `value` carries on of the values at an earlier boundary; None if it is no stream, and made of none.

    Args:
        graph: a captured forward.
        group: stacks each of which goes on with the streams of the one before.
        at: (stack of the group, boundary in it) where `value` is alive.
        value: a stream, or streams in another form.
        to: the earlier boundary.
    """
    return _Trace(graph, group, to).back(at, value)


def place_in(carried: Carried, part: fx.Node) -> tuple[slice, ...] | None:
    """Where in a join of several values one of them lies, as an index; None for no join and for unknown sizes."""
    joined = joined_in(carried.value())
    if carried.form is None or joined is None or part not in carried.parts:
        return None
    inputs = carried.form.find_nodes(op="placeholder")
    dim, places = joined
    for operand, start in places:
        if operand is inputs[carried.parts.index(part)]:
            size = value_of(operand).shape[dim]
            found = isinstance(start, int) and isinstance(size, int)
            return (*(slice(None),) * dim, slice(start, start + size)) if found else None
    return None


def parts_taken(nodes: Sequence[fx.Node], value: fx.Node, end: int) -> list[fx.Node]:
    """The nodes from place `end` on that take parts of `value`, where nothing else reads it there; or none.

    Left where they are: what needs more than is there before `end`, parts of a tensor that is written to behind it, and
    parts of a batch.
    """
    order = {n: i for i, n in enumerate(nodes)}
    written = written_storages(nodes[end:])
    found: dict[fx.Node, None] = {}
    for reader in sorted((u for u in value.users if order[u] >= end), key=order.__getitem__):
        elements = list(reader.users) if is_tensor_sequence(reader) else [reader]
        cuts = [cut_of(n) for n in elements]
        early = all(order[a] < end for a in reader.all_input_nodes)
        if not early or any(c is None or c.dim == 0 or c.source is not value for c in cuts):
            return []
        found |= dict.fromkeys([reader, *sorted(elements, key=order.__getitem__)])
    return [] if touches(value, written) else list(found)


class _Trace:
    """A graph in the making that puts together, of values from before a boundary, what goes on behind it."""

    def __init__(self, graph: fx.Graph, group: Sequence[StackReport], to: tuple[int, int]) -> None:
        self._group = group
        self._to = to
        self._order = positions(graph)
        self._nodes = list(graph.nodes)
        self._start = group[to[0]].streams.starts[to[1]]
        self._form = fx.Graph()
        self._parts: dict[fx.Node, fx.Node] = {}
        self._made: dict[fx.Node, fx.Node | None] = {}
        self._places: dict[fx.Node, bool] = {}

    def back(self, at: tuple[int, int], value: fx.Node) -> Carried | None:
        result = self._of(at, value)
        if result is None or not same_shape(result, value):
            return None
        part = {p: n for n, p in self._parts.items()}
        if result in part:
            return Carried((part[result],))
        self._form.output(result)
        if not any(written_inputs(n) for n in self._form.nodes):
            for node in reversed(self._form.nodes):
                if node.op != "output" and not node.users:
                    self._form.erase_node(node)
        return Carried(tuple(part[p] for p in self._form.find_nodes(op="placeholder")), self._form)

    def _of(self, at: tuple[int, int], value: fx.Node) -> fx.Node | None:
        """`value`, which is alive at a boundary, as a node of the new graph."""
        if self._order[value] < self._start:
            return self._part(value)
        if value not in self._made:
            k, boundary = at
            streams = self._group[k].streams.streams
            stream = next((s for s in streams if s.values[boundary] is value), None)
            if stream is None and k > self._to[0] and self._order[value] < self._group[k].streams.starts[0]:
                # It has gone past this stack.
                self._made[value] = self._over_joint(k, value)
            elif stream is None:
                self._made[value] = None  # until it is known
                self._made[value] = self._put_together(at, value) or self._near(at, value)
            elif k == self._to[0]:
                back = stream.values[self._to[1]]
                self._made[value] = self._part(back) if back is not None and same_shape(back, value) else None
            else:
                self._made[value] = self._over_joint(k, stream.values[0])
        return self._made[value]

    def _over_joint(self, k: int, first: fx.Node | None) -> fx.Node | None:
        """What stack k of the group starts from, made of what the one before it ends with."""
        return None if first is None else self._of((k - 1, len(self._group[k - 1].stack.blocks)), first)

    def _near(self, at: tuple[int, int], value: fx.Node) -> fx.Node | None:
        """Between two stacks: the stream, or join of streams, that a value continues through other operations.

        None where it is made of several, or of one in another order of tokens: it moves like none of them.
        """
        k, boundary = at
        streams = self._group[k].streams
        last = boundary == len(self._group[k].stack.blocks)
        if not is_tensor(value) or k + 1 == len(self._group) or not last:
            return None
        ends = {v for s in streams.streams if (v := s.values[boundary]) is not None}
        made = set(ends)  # of the streams, up to the next stack
        for node in self._nodes[streams.starts[boundary] : self._group[k + 1].streams.starts[0]]:
            if any(a in made for a in node.all_input_nodes):
                made.add(node)
        found: set[fx.Node] = set()
        todo, seen = [value], {value}
        while todo:
            for node in todo.pop().all_input_nodes:
                if node in seen or node not in made:
                    continue
                seen.add(node)
                moved = node not in ends and is_layout(node) and operation(node) not in COPIES
                if is_tensor(node) and same_shape(node, value) and (node in ends or is_layout(node)):
                    if self._of(at, node) is not None:
                        found.add(node)
                        continue
                    if moved:
                        return None
                if not moved:  # else it is something that is added to all tokens, say
                    todo.append(node)
        return self._of(at, found.pop()) if len(found) == 1 else None

    def _put_together(self, at: tuple[int, int], value: fx.Node) -> fx.Node | None:
        """The same operation on what its inputs carry on, if it does no more than to put elements in other places."""
        if isinstance(value_of(value), int):
            return None  # a number stands for itself
        if value.target is version:
            whole, write = (self._of(at, a) for a in value.all_input_nodes)
            return None if whole is None or write is None else whole
        if not (is_layout(value) or is_scalar(value) or self._says_where(value)):
            return None
        inputs: dict[fx.Node, Any] = {}
        for node in value.all_input_nodes:
            known = value_of(node)
            inputs[node] = known if type(known) is int else self._of(at, node)
            if inputs[node] is None:
                return None
        picked = _picked(value, inputs)
        if picked is None:
            picked = self._form.node_copy(value, inputs.__getitem__)
            picked.meta = {"example_value": value_of(value)}
        return picked

    def _says_where(self, node: fx.Node) -> bool:
        """Whether it says where elements go, computed of values from before the boundary without a stream."""
        if node not in self._places:
            dtype = value_of(node).dtype if is_tensor(node) else torch.float32
            never = dtype.is_floating_point or dtype.is_complex or written_inputs(node) or draws_random(node)
            self._places[node] = not never and all(
                self._order[a] < self._start or not is_tensor(a) or self._says_where(a) for a in node.all_input_nodes
            )
        return self._places[node]

    def _part(self, node: fx.Node) -> fx.Node | None:
        """An input of the new graph; a host value from before the boundary is computed again."""
        if node not in self._parts:
            if is_tensor_sequence(node) or is_scalar(node):
                self._parts.pop(node, None)
                return self._again(node)
            if not is_tensor(node) and not isinstance(value_of(node), torch.SymInt):
                return None
            with self._form.inserting_before(next(iter(self._form.nodes), None)):
                self._parts[node] = self._form.placeholder(node.name)
            self._parts[node].meta = {"example_value": value_of(node)}
        return self._parts[node]

    def _again(self, node: fx.Node) -> fx.Node | None:
        if node not in self._made:
            inputs = {a: self._part(a) for a in node.all_input_nodes}
            if None in inputs.values():
                return None
            copy = self._made[node] = self._form.node_copy(node, inputs.__getitem__)
            copy.meta = {"example_value": value_of(node)}
        return self._made[node]


@dataclass(frozen=True)
class Cut:
    """A part of a tensor: `size` elements of one dimension from `start` on, and all of the others."""

    source: fx.Node
    dim: int
    start: Any
    size: Any


def cut_of(node: fx.Node) -> Cut | None:
    """What part of a tensor a node takes, by a slice or as an element of a tuple; None if it does anything else."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(node):
        return None
    if node.target is operator.getitem and is_tensor_sequence(source):
        return _element(node, source)
    if node.target is not operator.getitem or not is_tensor(source):
        return None
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        full = (slice(None),) * (value_of(source).ndim - len(items) + 1)
        items = items[:at] + full + items[at + 1 :]
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in items):
        return None
    cuts = [(d, i) for d, i in enumerate(items) if (i.start, i.stop) != (None, None)]
    if len(cuts) != 1:
        return None
    ((dim, cut),) = cuts
    start = _number(cut.start) if cut.start is not None else 0
    if start is None:
        return None
    if isinstance(start, int) and start < 0:
        start = value_of(source).shape[dim] + start
    return Cut(source, dim, start, value_of(node).shape[dim])


def _element(node: fx.Node, parts: fx.Node) -> Cut | None:
    """An element of what ``chunk`` and ``split`` make."""
    source, place = parts.args[0] if parts.args else None, node.args[1]
    if operation(parts) not in ("chunk", "split", "split_with_sizes", "tensor_split") or not isinstance(place, int):
        return None
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    whole, values = value_of(source), value_of(parts)
    place %= len(values)
    dims = [d for d in range(whole.ndim) if not _equal(whole.shape[d], values[place].shape[d])]
    if len(dims) != 1:
        return None
    (dim,) = dims
    return Cut(source, dim, sum(v.shape[dim] for v in values[:place]), values[place].shape[dim])


def _number(value: Any) -> Any:
    """A size among the arguments, as a number or a symbol."""
    value = value_of(value) if isinstance(value, fx.Node) else value
    return value if isinstance(value, int | torch.SymInt) else None


def _equal(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def joined_in(node: fx.Node) -> tuple[int, list[tuple[fx.Node, Any]]] | None:
    """For a join of tensors: its dimension, and each with the place where it begins; None for anything else."""
    if operation(node) not in JOINS:
        return None
    operands = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(operands, list | tuple) or not isinstance(dim, int):
        return None
    dim %= value_of(node).ndim
    places: list[tuple[fx.Node, Any]] = []
    at: Any = 0
    for operand in operands:
        if not isinstance(operand, fx.Node) or not is_tensor(operand):
            return None
        places.append((operand, at))
        at = at + value_of(operand).shape[dim]
    return dim, places


def _picked(node: fx.Node, now: Mapping[fx.Node, Any]) -> fx.Node | None:
    """For a part of a join that is just some of what was joined, these; `now` says what stands for the inputs."""
    cut = cut_of(node)
    if cut is None:
        return None
    source = now.get(cut.source)
    if source is None:  # an element of a tuple: what that was made of
        source = now[node.args[0]].args[0]  # type: ignore[index]
    while operation(source) in COPIES:
        source = source.args[0]
    joined = joined_in(source)
    if joined is None or joined[0] != cut.dim:
        return None
    dim, places = joined
    end = cut.start + cut.size
    ends = [*(at for _, at in places[1:]), value_of(source).shape[dim]]
    first = next((i for i, (_, at) in enumerate(places) if _equal(at, cut.start)), None)
    last = next((i for i, at in enumerate(ends) if _equal(at, end)), None)
    if first is None or last is None or last < first:
        return None
    taken = [operand for operand, _ in places[first : last + 1]]
    if len(taken) == 1:
        return taken[0]
    made = source.graph.call_function(torch.cat, (taken, dim))
    made.meta = {"example_value": value_of(node)}
    return made
