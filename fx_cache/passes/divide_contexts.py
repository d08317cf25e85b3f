from __future__ import annotations

from torch import fx

from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.chains import read_stacks
from fx_cache.patterns.contexts import find_contexts
from fx_cache.patterns.graph import positions
from fx_cache.patterns.inputs import classify_inputs

MIN_PART = 0.25
"""The part of a graph's nodes from which on a context may hold several blocks."""


def divide_contexts(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Leaves a context that holds several blocks at each of their ends, and enters it anew.

    Before::

        a = enter_autocast(...);  y = block(x);  z = block(y);  exit_autocast(a)

    After::

        a = enter_autocast(...);  y = block(x);  exit_autocast(a)
        b = enter_autocast(...);  z = block(y);  exit_autocast(b)

    Requires: `separate_sequences`.
    Ensures: a block is in contexts of its own, and no cut between blocks divides one.
    """
    del context
    nodes = list(gm.graph.nodes)
    pairs = [
        (nodes[first], nodes[last])
        for first, last in find_contexts(gm.graph)
        if last - first >= MIN_PART * len(nodes) and nodes[first] in nodes[last].all_input_nodes
    ]
    if not pairs:
        return 0
    order = positions(gm.graph)
    cuts: set[fx.Node] = set()
    for report in read_stacks(gm.graph, classify_inputs(gm.graph)):
        for block in report.stack.blocks:
            cuts |= {block.nodes[0], block.nodes[-1].next}
    count = 0
    for cut in sorted(cuts, key=order.__getitem__):
        around = [(enter, leave) for enter, leave in pairs if order[enter] < order[cut] <= order[leave]]
        around = [(enter, leave) for enter, leave in around if enter.next is not cut and leave is not cut]
        with gm.graph.inserting_before(cut):
            for _, leave in reversed(around):
                gm.graph.node_copy(leave, lambda n: n)
            for enter, leave in around:
                # What is left at the end is what was entered last.
                leave.replace_input_with(leave.all_input_nodes[0], gm.graph.node_copy(enter))
                count += 1
    return count
