from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fx_cache.passes.outline import REGION, fake, mark, region_nodes
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import is_tensor, storage_key, value_of, view_key, viewed, written_storages


def protect_streams(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Gives a span its own copy of a stream that its blocks write to in place.

    Before::

        span { x_2 = x.add_(attention(x)) }   tail { out = f(x_2) }

    After::

        span { x_1 = x.clone();  x_2 = x_1.add_(attention(x_1)) }   tail { out = f(x_2) }

    Requires: `mark_regions`; a plan without writes to what others see.
    Ensures: a span leaves the values it starts from as they were: out - in is the residual, and a hit skips no effect.
    """
    assert context.plan is not None
    count = 0
    for k, _ in enumerate(context.plan.spans):
        nodes = region_nodes(gm.graph, 2 * k + 1)
        inside = set(nodes)
        written = written_storages(nodes)
        before = [n for n in gm.graph.nodes if n.meta.get(REGION, -1) < 2 * k + 1 and n.op != "placeholder"]
        names: dict[int | None, list[fx.Node]] = {}
        for node in before:
            if storage_key(node) in written and any(u in inside for u in node.users):
                names.setdefault(storage_key(node), []).append(node)
        for same in names.values():
            # The youngest name of a tensor is the stream's value at the cut; of several views the whole is copied.
            whole = same[-1] if len(set(map(view_key, same))) == 1 else _whole(same[-1])
            with gm.graph.inserting_before(nodes[0]):
                clone = gm.graph.call_function(torch.clone, (whole,))
                copies: dict[Any, fx.Node] = {view_key(whole): mark(clone, 2 * k + 1, fake(torch.clone, whole))}
                for node in same:
                    own = _view(node, copies, 2 * k + 1)
                    node.replace_all_uses_with(own, delete_user_cb=inside.__contains__)
                    count += 1
    return count


def _whole(node: fx.Node) -> fx.Node:
    """The tensor that a node is a view of; where a span made that, what it hands on: the rest is not there at a hit."""
    source = viewed(node)
    made_by_a_span = (node.meta.get(REGION) or 0) % 2 == 1
    return node if source is None or made_by_a_span else _whole(source)


def _view(node: fx.Node, copies: dict[Any, fx.Node], region: int) -> fx.Node:
    """What a node is of a copy of the whole tensor, by the operations that look at it in another shape."""
    key = view_key(node) if is_tensor(node) else node
    if key not in copies:
        source = viewed(node)
        assert source is not None, f"{node} is no view of what was copied"
        base = _view(source, copies, region)
        if key not in copies:  # what writes to a tensor gives that back
            made = node.graph.node_copy(node, lambda a: base if a is source else a)
            made.meta = {}
            copies[key] = mark(made, region, value_of(node))
    return copies[key]
