from __future__ import annotations

import operator

import torch
from torch import fx

from fx_cache.passes.outline import REGION, fake, mark
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import storage_key, written_storages


def insert_probes(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Computes the residual of each head's blocks.

    Before::

        x0 = embed(...);  x1 = block(x0);  span(x1)

    After::

        x0 = embed(...);  x1 = block(x0);  probe_0 = x1 - x0;  span(x1)

    Where the head writes to ``x0`` in place, a copy taken before it is used; where it joins ``x1`` to others, the part.

    Requires: `mark_regions`.
    Ensures: one node ``probe_k`` at the end of region 2k.
    """
    assert context.plan is not None
    for k, span in enumerate(context.plan.spans):
        before, after = span.probe
        written = written_storages(span.head)
        if storage_key(before) in written:
            with gm.graph.inserting_before(span.head[0]):
                copied = gm.graph.call_function(torch.clone, (before,))
            before = mark(copied, 2 * k, fake(torch.clone, before))
        first = next(n for n in gm.graph.nodes if n.meta.get(REGION) == 2 * k + 1)
        with gm.graph.inserting_before(first):
            if span.part is not None:
                whole, after = after, gm.graph.call_function(operator.getitem, (after, span.part))
                mark(after, 2 * k, fake(lambda value, part=span.part: value[part], whole))
            probe = gm.graph.create_node("call_function", operator.sub, (after, before), name=f"probe_{k}")
        context.probes.append(mark(probe, 2 * k, fake(operator.sub, after, before)))
    return len(context.plan.spans)
