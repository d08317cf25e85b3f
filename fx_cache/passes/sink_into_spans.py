from __future__ import annotations

from torch import fx

from fx_cache.passes.outline import REGION, region_nodes
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.chains import StackReport
from fx_cache.patterns.graph import touches, written_storages


def sink_into_spans(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Moves what is computed in front of a span, and used by nothing but it, into the span.

    Before::

        x1, text1 = block(x0, text0);  probe = x1 - x0   span { x2 = block(x1, text1) }

    After, where nothing behind the span reads the text::

        x1, seen = block(x0, text0);  probe = x1 - x0   span { text1 = rest_of_block(seen);  x2 = block(x1, text1) }

    Blocks of the same kind in the span are put in the same order, and marked to be outlined in the same two parts.

    Requires: `mark_regions`.
    Ensures: a hit skips all that only the span needs, where that is work; like blocks stay alike.
    """
    assert context.plan is not None
    count = 0
    for k, span in enumerate(context.plan.spans):
        first = region_nodes(gm.graph, 2 * k + 1)[0]
        for node in span.sinks:
            first.prepend(node)
            node.meta[REGION] = 2 * k + 1
            count += 1
        context.rests.update(span.sinks)
        for report in context.plan.stacks if span.sinks else ():
            if report.stack.name in span.stacks:
                _split_alike(gm, context, report)
    return count


def _split_alike(gm: fx.GraphModule, context: RewriteContext, report: StackReport) -> None:
    """Moves, in blocks of the kind of one that was split, the same part behind the others."""
    written = written_storages(gm.graph.nodes)
    blocks, kinds = report.stack.blocks, report.streams.kinds
    moved: dict[int, list[int]] = {}
    for block, kind in zip(blocks, kinds, strict=True):
        places = [i for i, n in enumerate(block.nodes) if n in context.rests]
        if places:
            moved[kind] = places
    for block, kind in zip(blocks, kinds, strict=True):
        rest = [block.nodes[i] for i in moved.get(kind, ())]
        if context.rests.intersection(rest) or any(touches(n, written) for n in rest):
            continue
        last = block.nodes[-1]
        for node in rest:
            if node is not last:
                last.append(node)
            last = node
        context.rests.update(rest)
