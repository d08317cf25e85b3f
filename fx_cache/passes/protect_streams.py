from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fx_cache.passes.outline import REGION, fake, mark, region_nodes
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import storage_key, view_key, written_storages


def protect_streams(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Gives a span its own copy of a stream that its blocks write to in place.

    Before::

        span { x.add_(attention(x)) }   tail { out = f(x) }

    After::

        span { x_1 = x.clone();  x_1.add_(attention(x_1)) }   tail { out = f(x_1) }

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
        clones: dict[tuple[Any, ...], fx.Node] = {}
        # The youngest name of a tensor first: that is the stream's value at the cut.
        for node in reversed([n for n in before if storage_key(n) in written]):
            readers = [u for u in node.users if u in inside or u.meta.get(REGION, 1 << 30) > 2 * k + 1]
            if not readers:
                continue
            key = view_key(node)
            if key not in clones:
                with gm.graph.inserting_before(nodes[0]):
                    clones[key] = gm.graph.call_function(torch.clone, (node,))
                mark(clones[key], 2 * k + 1, fake(torch.clone, node))
                context.copies[clones[key]] = node
            node.replace_all_uses_with(clones[key], delete_user_cb=lambda u, readers=readers: u in readers)
            count += 1
    return count
