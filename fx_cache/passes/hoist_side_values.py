from __future__ import annotations

from dataclasses import replace

from torch import fx

from fx_cache.errors import Refusal
from fx_cache.passes.outline import REGION, region_nodes
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.contexts import within_contexts
from fx_cache.patterns.graph import storage_key, touches, written_storages
from fx_cache.patterns.sinking import find_side_values, forms_read, made_of


def hoist_side_values(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Moves what a span computes for others, without using its own streams, in front of the span.

    Before::

        span { a = block(x);  side = table[3];  b = block(a) }   tail { out = f(b, side) }

    After::

        side = table[3]   span { a = block(x);  b = block(a) }   tail { out = f(b, side) }

    Requires: `mark_regions`.
    Ensures: whatever a span hands on depends on its streams, so that a stale copy of anything else is never used.
    """
    assert context.plan is not None
    written = written_storages(gm.graph.nodes)
    contexts = within_contexts(gm.graph)
    count = 0
    for k, span in enumerate(context.plan.spans):
        nodes = region_nodes(gm.graph, 2 * k + 1)
        varying = made_of(gm.graph, span.probe[0])
        moving = find_side_values(nodes, {lo.value for lo in span.live_outs}, varying)
        inner = written_storages(nodes)
        stuck = next((n for n in moving if storage_key(n) in written or touches(n, inner)), None)
        within = next((n for n in moving if n in contexts), None)
        where, refusal = f"stack {' + '.join(span.stacks)}", None
        if stuck is not None:
            refusal = Refusal(
                where,
                f"{stuck.name}, which is or reads a tensor written in place, made inside blocks and used behind them",
                "values from the blocks that nobody writes to in place",
                "replace the write in place by an operation that returns a new tensor",
            )
        elif within is not None:
            refusal = Refusal(
                where,
                f"{within.name}, made inside blocks, of none of their streams, in a context, and used behind them",
                "contexts such as autocast around the blocks' own work alone, or around the whole model call",
                "compute it before the blocks",
            )
        if refusal is not None:
            reasons = {**context.plan.reasons, **dict.fromkeys(span.stacks, refusal)}
            context.plan = replace(context.plan, refusal=refusal, reasons=reasons)
            return count
        for node, read in forms_read(moving, {n for n in nodes if n in varying}):
            node.replace_input_with(read, span.probe[1])
        anchor = nodes[0].prev
        for node in nodes:
            if node in moving:
                anchor.append(node)
                node.meta[REGION] = 2 * k
                anchor = node
                count += 1
    return count
