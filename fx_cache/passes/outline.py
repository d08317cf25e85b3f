"""Moves runs of nodes into sub-modules. Every pass that cuts a graph uses these functions."""

from __future__ import annotations

import contextlib
import copy
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fx_cache.ops import version
from fx_cache.patterns.graph import external_inputs, is_scalar, is_tensor, structure, symbols_of, value_of

REGION = "fx_cache_region"
"""Key of `node.meta`: 2 * k before span k, 2 * k + 1 inside it; behind the last of n spans, 2 * n."""


@dataclass
class Templates:
    """What outlining has done to a graph.

    Attributes:
        targets: the sub-modules by structure: like runs share one.
        moved: for each node that went into a sub-module and is read outside, the node that stands for it now.
    """

    targets: dict[Any, str] = field(default_factory=dict)
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def now(self, node: fx.Node) -> fx.Node:
        while node in self.moved:
            node = self.moved[node]
        return node

    def target(self, gm: fx.GraphModule, key: Any, name: str, make: Callable[[], fx.GraphModule]) -> str:
        if key not in self.targets:
            unique, i = name, 1
            while hasattr(gm, unique):
                unique, i = f"{name}_{i}", i + 1
            gm.add_submodule(unique, make())
            self.targets[key] = unique
        return self.targets[key]


def identifier(path: str) -> str:
    """A module path as a name in a graph."""
    return re.sub(r"\W+", "_", path).strip("_")


def region_nodes(graph: fx.Graph, region: int) -> list[fx.Node]:
    """The nodes of one region, in order."""
    return [n for n in graph.nodes if n.meta.get(REGION) == region]


def mark(node: fx.Node, region: int | None, value: Any = None) -> fx.Node:
    """Gives a new node its region and value. Nothing else of another node's meta may be copied onto it."""
    if region is not None:
        node.meta[REGION] = region
    if value is not None:
        node.meta["example_value"] = value
    return node


def fake(function: Callable[..., Any], *nodes: fx.Node) -> Any:
    """The fake value of `function` over the values of nodes."""
    values = [value_of(n) for n in nodes]
    # Not the mode of the tracing context: Dynamo gives its backends a mode of their own.
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), contextlib.nullcontext())
    with torch.no_grad(), mode:
        return function(*values)


def live_outputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The tensors of a run that are used behind it, by others or by scalars that others use."""
    region = set(nodes)

    def used_outside(node: fx.Node) -> bool:
        return any(u not in region or (is_scalar(u) and used_outside(u)) for u in node.users)

    return [n for n in nodes if is_tensor(n) and used_outside(n)]


def build(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    prefix: str = "",
) -> fx.GraphModule:
    """A module of copies of `nodes`; takes `inputs`, named without `prefix`, returns the tuple of `outputs`.

    Scalars from outside are computed again inside. Callable sub-graphs that are read as attributes come along.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        placeholder = graph.placeholder(
            short if (short := node.name.removeprefix(prefix)).isidentifier() else node.name
        )
        placeholder.meta = {"example_value": value_of(node)}
        env[node] = placeholder

    def bring(node: fx.Node) -> fx.Node:
        if node not in env:
            assert is_scalar(node) or node.op == "get_attr", f"{node} is not an input of the run that reads it"
            env[node] = graph.node_copy(node, bring)
            env[node].meta = {k: v for k, v in node.meta.items() if k != REGION}
        return env[node]

    for node in nodes:
        if node.target is version:  # the same tensor: within a piece the order of its operations tells the rest
            env[node] = bring(node.args[0])  # type: ignore[arg-type]
            continue
        env[node] = graph.node_copy(node, bring)
        env[node].meta = copy.copy(node.meta)
    graph.output(tuple(env[o] for o in outputs))
    return fx.GraphModule(gm, graph)


def inputs_of(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What a sub-module made of `nodes` has to be given, the sizes that its inputs' shapes are made of last."""
    inputs = [n for n in external_inputs(nodes) if not _is_subgraph(gm, n)]
    return inputs + [n for n in size_inputs(gm.graph, inputs) if n not in inputs]


def size_inputs(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The graph's integer inputs whose symbols occur in the shapes of `nodes`.

    A compiler binds a symbol to an input that has it as its size; in ``[1, s0 * s1 // 4]`` it could not.
    """
    symbols = set().union(*(symbols_of(value_of(n)) for n in nodes))
    return [
        n
        for n in graph.find_nodes(op="placeholder")
        if isinstance(value_of(n), torch.SymInt) and symbols_of(value_of(n)) & symbols
    ]


def _is_subgraph(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), torch.nn.Module)


def outline(gm: fx.GraphModule, nodes: Sequence[fx.Node], name: str, templates: Templates, call_name: str) -> fx.Node:
    """Replaces a run of nodes by one call of a sub-module, shared with runs of the same structure.

    Scalars stay behind where somebody else reads them.
    """
    inputs, outputs = inputs_of(gm, nodes), live_outputs(nodes)
    index = {n: i for i, n in enumerate(nodes)}
    key = (structure(nodes, inputs), tuple(index[o] for o in outputs))
    target = templates.target(gm, key, name, lambda: build(gm, nodes, inputs, outputs, f"{call_name}_"))
    region = nodes[0].meta.get(REGION)
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.create_node("call_module", target, tuple(inputs), name=call_name)
    mark(call, region, tuple(value_of(o) for o in outputs))
    templates.moved |= replace_by_call(gm, nodes, outputs, call)
    return call


def replace_by_call(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], call: fx.Node
) -> dict[fx.Node, fx.Node]:
    """Hands the results of `call` to the readers of `outputs` and removes `nodes`; returns what stands for what."""
    region = set(nodes)
    moved: dict[fx.Node, fx.Node] = {}
    last = call
    for i, output in enumerate(outputs):
        with gm.graph.inserting_after(last):
            last = moved[output] = gm.graph.call_function(operator.getitem, (call, i))
        mark(last, call.meta.get(REGION), value_of(output))
        output.replace_all_uses_with(last, delete_user_cb=lambda u: u not in region or is_scalar(u))
    for node in reversed(nodes):
        if not node.users:
            gm.graph.erase_node(node)
    for node in [n for n in nodes if n.users]:
        assert is_scalar(node), f"{node} is used outside the run that makes it, and is no output of it"
        last.append(node)
        last = node
    for output, item in moved.items():
        item.name = output.name  # free again, now that the node of that name is gone
    return moved
