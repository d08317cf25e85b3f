from __future__ import annotations

from torch import fx

from fx_cache.passes.outline import REGION
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import is_part_of_weight


def gather_weights(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Moves views of parts of weights to the front of their region, where a block reads them as it reads any weight.

    Before::

        a = linear(x, layers[1]);  b = linear(a, layers[2])

    After, so that the blocks differ in what they are given and not in what they do::

        w1 = layers[1];  w2 = layers[2];  a = linear(x, w1);  b = linear(a, w2)

    Requires: `mark_regions`.
    Ensures: none stands between the nodes of a block. (A view shows what is written later, too.)
    """
    del context
    count = 0
    fronts: dict[int, fx.Node] = {}
    for node in list(gm.graph.nodes):
        region = node.meta.get(REGION)
        if region is None:
            continue
        front = fronts.get(region)
        view = is_part_of_weight(node)
        if front is None:
            # Behind what stands before the region: a view moves here, anything else stays behind it.
            fronts[region] = node if view else node.prev
        elif view:
            fronts[region] = node
            if front.next is not node:
                front.append(node)
                count += 1
    return count
