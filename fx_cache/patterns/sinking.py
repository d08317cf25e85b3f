"""Finds what the head computes for a span alone: a hit needs none of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from fx_cache.patterns.contexts import within_contexts
from fx_cache.patterns.graph import (
    draws_random,
    is_scalar,
    is_tensor,
    is_tensor_sequence,
    touches,
    written_storages,
)


def find_sinks(
    graph: fx.Graph, before: Sequence[fx.Node], span: Collection[fx.Node], needed: Collection[fx.Node]
) -> tuple[fx.Node, ...]:
    """What of the nodes before a span is used by nothing but the span, in graph order.

    Left where they are: what reads or is a tensor that is written to in place, what draws random numbers, and what
    stands within a context.

    Args:
        graph: a captured forward.
        before: the nodes between the span before, or the inputs, and this one.
        span: its nodes.
        needed: what a hit needs whoever uses it.
    """
    written = written_storages(graph.nodes)
    contexts = within_contexts(graph)
    sunk: dict[fx.Node, None] = {}
    for node in reversed(before):
        if node.op not in ("call_function", "call_method") or node in needed or node in contexts or draws_random(node):
            continue
        if not node.users or is_scalar(node) or touches(node, written):
            continue
        if all(u in span or u in sunk for u in node.users) and (is_tensor(node) or is_tensor_sequence(node)):
            sunk[node] = None
        elif is_tensor_sequence(node):
            # A tuple is not carried over a cut: its elements stay with it.
            for user in node.users:
                sunk.pop(user, None)
    return tuple(n for n in before if n in sunk)
