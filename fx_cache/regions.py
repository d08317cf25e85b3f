"""Writes out the regions that a model marks with ``torch.compiler.nested_compile_region``.

Dynamo captures such a region once, as a graph of its own, and calls that wherever the region runs. Blocks marked so are
captured sooner; but what a graph only calls, nobody can look into.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from fx_cache.patterns.graph import attribute_of, value_of, values_for


def written_out(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with the operations of every marked region in the place of its call.

    Before: ``y = invoke_subgraph(self.r, "r", x, w0)[0]; z = invoke_subgraph(self.r, "r", y, w1)[0]``
    After:  ``y = linear(x, w0); z = linear(y, w1)``

    Args:
        gm: a graph as Dynamo captured it; it is left as it is.

    Returns:
        A new graph of the same inputs and outputs, each node with a value of its own and the path of the module that
        it came from. `gm` itself if nothing is marked.
    """
    if not gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
        return gm
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    held: dict[str, Any] = {}
    first_calls: dict[str, tuple[fx.GraphModule, str]] = {}
    for node in gm.graph.nodes:
        if _is_call(node):
            region, _, *operands = node.args
            path = _path(node)
            if region.target not in first_calls:
                first_calls[region.target] = written_out(attribute_of(gm, region.target)), path
            body, first_path = first_calls[region.target]
            env[node] = _copied(body, graph, [env.get(a, a) for a in operands], held, (first_path, path))
        elif node.op == "call_function" and node.target is operator.getitem and _is_call(node.args[0]):
            env[node] = env[node.args[0]][node.args[1]]
        elif not (node.op == "get_attr" and node.users and all(_is_call(user) for user in node.users)):
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op in ("get_attr", "call_module"):
                held[node.target] = attribute_of(gm, node.target)
    made = fx.GraphModule(held, graph)
    made.meta.update(gm.meta)
    return made


def _is_call(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is invoke_subgraph


def _copied(
    body: fx.GraphModule, graph: fx.Graph, operands: Sequence[Any], held: dict[str, Any], renamed: tuple[str, str]
) -> Any:
    """Copies a region's operations into `graph`, called with `operands`, and what they hold into `held`.

    Returns what the region returns. The capture recorded the values of its first call alone; they are computed anew.
    """
    values = values_for(body, [value_of(a) if isinstance(a, fx.Node) else a for a in operands])
    env = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in body.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        if node.op == "placeholder":
            continue
        copy = env[node] = graph.node_copy(node, env.__getitem__)
        copy.meta = {**node.meta, "example_value": values[node]}
        if "nn_module_stack" in node.meta:
            copy.meta["nn_module_stack"] = {
                key: (_renamed(path, *renamed), kind) for key, (path, kind) in node.meta["nn_module_stack"].items()
            }
        if node.op in ("get_attr", "call_module"):
            copy.target = f"region_{len(held)}"
            held[copy.target] = attribute_of(body, node.target)
    raise AssertionError("a graph without output")


def _path(call: fx.Node) -> str:
    """Path of the module that a region was called in."""
    stack = list(call.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def _renamed(path: str, first: str, now: str) -> str:
    """A module's path in the first call of its region as it is in this one."""
    inside = path == first or path.startswith(f"{first}.")
    return now + path[len(first) :] if first and inside else path
