"""Makes writes in place visible as data flow: who reads behind a write reads a version of what was written.

A captured graph calls a tensor by one name before and behind a write to it, and by the names of its views: what these
hold when is told by the order of the calls alone. With versions it is told by the edges of the graph, and nobody who
reads those need know of writes: a later write is no ancestor of what was read before it, and a block that writes to its
stream and returns nothing feeds the next one.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from fx_cache.ops import version
from fx_cache.overlap import overlap
from fx_cache.patterns.graph import (
    is_scalar,
    is_tensor,
    operation,
    positions,
    storage_key,
    value_of,
    view_key,
    written_inputs,
)

_READS_DATA = {"item", "tolist", "equal", "allclose", "is_nonzero", "numpy", "__bool__", "__int__", "__float__"}
"""What makes a host value of what a tensor holds; anything else that does so looks at its form."""


def with_versions(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with a version for every name by which a tensor is read behind a write to it.

    Before: ``x.add_(a); y = f(x);  x[:, :4] = b; z = g(x)``
    After:  ``add_ = x.add_(a); y = f(add_);  setitem = add_[:, :4] = b; x_1 = version(add_, setitem); z = g(x_1)``

    Args:
        gm: a captured graph; it is left as it is.

    Returns:
        A new graph, of the same inputs and outputs, in which the same operations run in the same order; `gm` itself if
        nothing is read behind a write, or all has its version.
    """
    named = gm.graph.find_nodes(op="call_function", target=version)
    if named or not any(written_inputs(n) for n in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    return made if _rename(graph) else gm


def _rename(graph: fx.Graph) -> int:
    order = positions(graph)
    last_read = {n: max((order[u] for u in n.users), default=-1) for n in graph.nodes}
    holders: dict[int | None, list[fx.Node]] = defaultdict(list)
    now: dict[fx.Node, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if not _reads_form(node):
            for name in [a for a in node.all_input_nodes if a in now]:
                node.replace_input_with(name, now[name])
        if is_tensor(node):
            holders[storage_key(node)].append(node)
        last = node
        for target in written_inputs(node):
            key = storage_key(target)
            if key is None:
                continue
            names = holders[key] = [h for h in holders[key] if last_read[h] > order[node]]
            for name in names:
                if name is node or not overlap(value_of(name), value_of(target)):
                    continue
                if is_tensor(node) and view_key(node) == view_key(name):
                    now[name] = node  # it gives back what it wrote to
                else:
                    with graph.inserting_after(last):
                        last = graph.call_function(version, (now.get(name, name), node))
                    last.meta["example_value"] = value_of(name)
                    # Of the block that writes, where there is one.
                    last.meta |= {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
                    now[name] = last
                count += 1
    return count


def _reads_form(node: fx.Node) -> bool:
    """Whether a node reads shapes and the like alone, which no write changes."""
    return is_scalar(node) and operation(node) not in _READS_DATA
