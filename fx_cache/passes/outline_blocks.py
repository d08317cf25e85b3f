from __future__ import annotations

from statistics import mode

from torch import fx

from fx_cache.passes.outline import REGION, identifier, outline
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import is_scalar


def outline_blocks(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Makes a call of every block; like blocks share one sub-module and are told apart by their weights.

    Before::

        a = linear(x, blocks_0_weight);  ...;  b = linear(a, blocks_1_weight);  ...

    After::

        blocks_0 = self.blocks(x, blocks_0_weight, ...);  blocks_1 = self.blocks(blocks_0[0], blocks_1_weight, ...)

    With ``regional=False`` blocks stay as they are, and become part of the pieces that `outline_glue` makes.

    Requires: `mark_regions`, `protect_streams`, `insert_probes`.
    Ensures: as many sub-modules as there are kinds of blocks, each compiled once whatever the depth.
    """
    assert context.plan is not None
    if not context.config.regional:
        return 0
    cached = {name for span in context.plan.spans for name in span.stacks}
    count = 0
    for report in context.plan.stacks:
        if report.stack.name not in cached:
            continue
        name = identifier(report.stack.name)
        for block in report.stack.blocks:
            # A pass before this one may have moved nodes out of the block or put new ones into it.
            parts = [(n.meta[REGION], n in context.rests) for n in block.nodes if REGION in n.meta]
            if not parts:
                continue
            main = mode([p for p in parts if not p[1]] or parts)
            for part in sorted(set(parts)):
                kept = [n for n in block.nodes if (n.meta.get(REGION), n in context.rests) == part]
                if part != main and all(map(is_scalar, kept)):
                    continue
                nodes = [kept[0]]
                while nodes[-1] is not kept[-1]:
                    nodes.append(nodes[-1].next)
                kind, suffix = ("block", "") if part == main else ("rest", "_rest")
                outline(gm, nodes, f"{name}_{kind}", context.templates, f"{name}_{block.index}{suffix}")
                count += 1
    return count
