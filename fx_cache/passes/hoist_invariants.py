from __future__ import annotations

import itertools
import operator

from torch import fx

from fx_cache.ops import once
from fx_cache.passes.outline import REGION, Templates, build, identifier, inputs_of, mark, outline
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import is_scalar, value_of


def hoist_invariants(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Lets what is the same at every step of a request be computed once.

    Before::

        text = linear(prompt, w);  x1 = block(x0, text);  x2 = block(x1, text)

    After, with what each block makes of the text for itself among it::

        def forward(..., keep):
            once = once(keep, self.invariants, (prompt, w, ...), told_by=(0,))
            key_0 = once[0];  ...;  x1 = block(x0, key_0, ...)

    Requires: `mark_regions`, `insert_probes`.
    Ensures: what it moves depends on nothing but the operands; of them ``told_by`` are no weights.
    """
    assert context.plan is not None
    found = context.plan.invariants
    if not found.kept:
        return 0
    graph = gm.graph
    operands = inputs_of(gm, found.nodes)
    invariants = build(gm, found.nodes, operands, found.kept)
    for node in invariants.graph.nodes:
        node.meta.pop(REGION, None)
    gm.add_submodule("invariants", invariants)
    if context.config.regional:
        _outline_by_block(invariants, found.nodes, context)
    inputs = list(graph.find_nodes(op="placeholder"))
    weights = {inputs[i] for i in context.plan.roles.weights}
    told_by = tuple(i for i, n in enumerate(operands) if n.op == "placeholder" and n not in weights)
    with graph.inserting_after(inputs[-1]):
        keep = graph.create_node("placeholder", "keep", name="keep")
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in [n for n in operands if n.op == "get_attr"]:
        first.prepend(node)
    with graph.inserting_before(first):
        makes = mark(graph.get_attr("invariants"), 0)
        arguments = (keep, makes, tuple(operands))
        call = graph.create_node("call_function", once, arguments, {"told_by": told_by}, name="once")
        mark(call, 0, tuple(map(value_of, found.kept)))
        items = [mark(graph.call_function(operator.getitem, (call, i)), 0) for i in range(len(found.kept))]
    for node, item in zip(found.kept, items, strict=True):
        mark(item, None, value_of(node))
        node.replace_all_uses_with(item)
        context.templates.moved[node] = item
    for node in reversed(found.nodes):
        if not node.users:
            del node.meta[REGION]
            graph.erase_node(node)
    for node, item in zip(found.kept, items, strict=True):
        item.name = node.name  # free again, now that the node of that name is gone
    return len(found.kept)


def _outline_by_block(invariants: fx.GraphModule, nodes: tuple[fx.Node, ...], context: RewriteContext) -> None:
    """Makes a call of what each block makes for itself; like blocks share one sub-module."""
    assert context.plan is not None
    owners = {n.name: (r.stack.name, b.index) for r in context.plan.stacks for b in r.stack.blocks for n in b.nodes}
    names = {n.name for n in nodes}
    copies = [n for n in invariants.graph.nodes if n.name in names]
    templates = Templates()
    for owner, group in itertools.groupby(copies, key=lambda n: owners.get(n.name)):
        run = list(group)
        if owner is not None and not all(map(is_scalar, run)):
            name = identifier(owner[0])
            outline(invariants, run, f"{name}_invariants", templates, f"{name}_{owner[1]}")
