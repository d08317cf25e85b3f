from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fx_cache.passes.outline import REGION, region_nodes
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.chains import StackReport
from fx_cache.patterns.graph import storage_key, touches, written_storages


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
                _split_alike(context, report)
    return count


def _split_alike(context: RewriteContext, report: StackReport) -> None:
    """Moves, in blocks of the kind of one that was split, the same part behind the others."""
    blocks, kinds = report.stack.blocks, report.streams.kinds
    moved: dict[int, list[int]] = {}
    for block, kind in zip(blocks, kinds, strict=True):
        places = [i for i, n in enumerate(block.nodes) if n in context.rests]
        if places:
            moved[kind] = places
    for block, kind in zip(blocks, kinds, strict=True):
        rest = [block.nodes[i] for i in moved.get(kind, ())]
        if context.rests.intersection(rest) or not _may_follow(rest, block.nodes):
            continue
        last = block.nodes[-1]
        for node in rest:
            if node is not last:
                last.append(node)
            last = node
        context.rests.update(rest)


def _may_follow(moving: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> bool:
    """Whether some nodes of a block may run behind all others of it, for what either write to in place."""
    touched: set[int | None] = set()
    written: set[int] = set()
    for node in reversed(nodes):
        own = written_storages([node])
        if node in moving:
            if touches(node, written) or own & touched:
                return False
        else:
            touched.update(map(storage_key, (node, *node.all_input_nodes)))
            written |= own
    return True
