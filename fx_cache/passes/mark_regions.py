from __future__ import annotations

from torch import fx

from fx_cache.errors import stage
from fx_cache.passes.outline import REGION
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.spans import plan_spans


def mark_regions(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Plans the spans and marks every node with its region: 2k before span k, 2k + 1 inside it.

    What takes the parts of a joined stream that are read behind a span moves to its end: it hands on only these.

    Requires: `separate_sequences`.
    Ensures: `context.plan`; with a plan that does not refuse, ``meta[REGION]`` on every node but inputs and output.
    """
    with stage("plan_spans"):
        context.plan = plan = plan_spans(gm.graph, context.config, context.without)
    if plan.refusal is not None:
        return 0
    for span in plan.spans:
        last = span.nodes[-1]
        for node in span.taken:
            last.append(node)
            last = node
    inside = {n: 2 * k + 1 for k, span in enumerate(plan.spans) for n in (*span.nodes, *span.taken)}
    region = 0
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node in inside:
            region = inside[node]
        elif region % 2:
            region += 1
        node.meta[REGION] = region
    return len(plan.spans)
