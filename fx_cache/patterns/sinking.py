"""Finds what the head computes for a span alone, and what a span computes for others without its streams."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from fx_cache.patterns.contexts import within_contexts
from fx_cache.patterns.graph import (
    ancestors,
    descendants,
    draws_random,
    is_scalar,
    is_tensor,
    is_tensor_sequence,
    storage_key,
    touches,
    written_storages,
)
from fx_cache.patterns.values import data_inputs


def find_sinks(
    graph: fx.Graph, before: Sequence[fx.Node], span: Collection[fx.Node], needed: Collection[fx.Node]
) -> tuple[fx.Node, ...]:
    """What of the nodes before a span is used by nothing but the span, in graph order.

    Left where they are: what reads a tensor that is written to before the span, what writes to a tensor that the caller
    sees, what draws random numbers, and what stands within a context.

    Args:
        graph: a captured forward.
        before: the nodes between the span before, or the inputs, and this one.
        span: its nodes.
        needed: what a hit needs whoever uses it.
    """
    seen = {storage_key(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    later: set[int] = set()  # storages that are written to by what stays behind a node
    contexts = within_contexts(graph)
    sunk: dict[fx.Node, None] = {}
    for node in reversed(before):
        writes = written_storages([node])
        free = node.op in ("call_function", "call_method") and node not in contexts and not draws_random(node)
        if not free or node in needed or not node.users or is_scalar(node) or touches(node, later) or writes & seen:
            later |= writes
            continue
        known = is_tensor(node) or is_tensor_sequence(node) or bool(writes)
        if all(u in span or u in sunk for u in node.users) and known:
            sunk[node] = None
            continue
        later |= writes
        if is_tensor_sequence(node):
            # A tuple is not carried over a cut: its elements stay with it.
            for user in node.users:
                sunk.pop(user, None)
    return tuple(n for n in before if n in sunk)


def find_side_values(nodes: Sequence[fx.Node], live: Collection[fx.Node], varying: Collection[fx.Node]) -> set[fx.Node]:
    """What a span computes for others without its own streams, and all that it takes for that.

    Args:
        nodes: the span's.
        live: what it hands on of its streams.
        varying: what is made of the main stream (`made_of`): of that side values may read the form.
    """
    inside = set(nodes)
    side = [n for n in nodes if is_tensor(n) and n not in live and any(u not in inside for u in n.users)]

    def reads(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n not in varying]

    found = {a for n in side for a in ancestors(n, reads=reads) if a in inside}
    # A tuple is not carried over a cut: all its elements go with it.
    return found | {u for n in found if is_tensor_sequence(n) for u in n.users if u in inside}


def made_of(graph: fx.Graph, stream: fx.Node) -> set[fx.Node]:
    """What is made of a stream's numbers, and not of its form alone."""
    return descendants(graph, [stream], reads=data_inputs)


def forms_read(side: Collection[fx.Node], varying: Collection[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Which side values read the form of something that is made of the main stream, and of what."""
    return [(n, f) for n in side for f in n.all_input_nodes if f in varying]
