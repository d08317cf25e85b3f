"""Contexts such as autocast, from the node that enters one to the node that leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.utils._pytree import tree_map

from fx_cache.patterns.graph import callee, is_tensor, positions

Range = tuple[int, int]
"""Positions of a first and a last node."""

_SETTERS = {"_set_grad_enabled", "_sdpa_kernel", "_set_deterministic_algorithms", "_set_fwd_grad_enabled"}
"""Functions that set what holds from then on; who leaves a context sets what held before."""


def find_contexts(graph: fx.Graph) -> list[Range]:
    """Every context of a graph, outer ones before those within."""
    order = positions(graph)
    found: list[Range] = []
    nested: list[int] = []
    setters: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", "")
        if "exit" in name:
            found += [(order[a], order[node]) for a in node.all_input_nodes if "enter" in str(a.target)]
        elif name.endswith("_increment_nesting"):
            nested.append(order[node])
        elif name.endswith("_decrement_nesting") and nested:
            found.append((nested.pop(), order[node]))
        elif name in _SETTERS:
            setters.setdefault(name, []).append(node)
    for calls in setters.values():
        # What the last one sets held before the first one.
        held = _given(calls[-1].args)
        entered: fx.Node | None = None
        for node in calls:
            if entered is None and _given(node.args) != held:
                entered = node
            elif entered is not None and _given(node.args) == held:
                found.append((min(order[entered], *_made_for(entered, order)), order[node]))
                entered = None
    return sorted(found, key=lambda c: (c[0], -c[1]))


def _given(value: Any) -> Any:
    return tree_map(lambda a: (callee(a), _given(a.args)) if isinstance(a, fx.Node) else a, value)


def _made_for(setter: fx.Node, order: dict[fx.Node, int]) -> list[int]:
    """Where the arguments of a setter are made, that nobody else reads."""
    return [order[setter], *(order[a] for a in setter.all_input_nodes if set(a.users) == {setter})]


def within_contexts(graph: fx.Graph) -> set[fx.Node]:
    """Every node from one that enters a context to the one that leaves it."""
    nodes = list(graph.nodes)
    return {n for first, last in find_contexts(graph) for n in nodes[first : last + 1]}


def whole(extents: Sequence[Range], contexts: Sequence[Range]) -> list[Range]:
    """Extents of blocks, one behind the other, each with the contexts that it is in alone."""
    found = list(extents)
    for i, (first, last) in enumerate(extents):
        before = found[i - 1][1] if i else -1
        behind = extents[i + 1][0] if i + 1 < len(extents) else None
        for a, b in reversed(contexts):  # inner ones first
            if a <= last and first <= b and before < a and (behind is None or b < behind):
                first, last = min(first, a), max(last, b)
        found[i] = first, last
    return found


def boundary(place: int, nodes: Sequence[fx.Node], contexts: Sequence[Range]) -> int:
    """Where a block begins, or ends, whose first operation stands at `place` or behind it.

    A context that is entered right before it is the block's, and one that is left right there is of the block before.
    """
    for a, b in reversed(contexts):
        if a < place <= b and not any(map(is_tensor, nodes[a:place])):
            place = a
        elif a < place <= b and not any(map(is_tensor, nodes[place:b])):
            place = b + 1
    return place
