from __future__ import annotations

from torch import fx

from fx_cache.passes.outline import REGION, region_nodes
from fx_cache.passes.runner import RewriteContext


def sink_into_spans(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Moves what is computed in front of a span, and used by nothing but it, into the span.

    Before::

        x1, text1 = block(x0, text0);  probe = x1 - x0   span { x2 = block(x1, text1) }

    After, where nothing behind the span reads the text::

        x1, seen = block(x0, text0);  probe = x1 - x0   span { text1 = rest_of_block(seen);  x2 = block(x1, text1) }

    Requires: `mark_regions`.
    Ensures: a hit skips all that only the span needs, where that is work.
    """
    assert context.plan is not None
    count = 0
    for k, span in enumerate(context.plan.spans):
        first = region_nodes(gm.graph, 2 * k + 1)[0]
        for node in span.sinks:
            first.prepend(node)
            node.meta[REGION] = 2 * k + 1
            count += 1
    return count
