"""Writes out what a graph only calls: what is within a call, nobody can look into.

Dynamo captures a region marked with ``torch.compiler.nested_compile_region`` once, as a graph of its own, and calls
that wherever the region runs; likewise what ``torch.utils.checkpoint`` recomputes, and each layer that a ``scan`` goes
through.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from fx_cache.passes.outline import fake, mark
from fx_cache.patterns.graph import ancestors, attribute_of, is_tensor, is_weight, value_of, values_for

enter_autocast: Any = torch.amp.autocast_mode._enter_autocast
exit_autocast: Any = torch.amp.autocast_mode._exit_autocast
set_grad_enabled: Any = torch._C._set_grad_enabled


@dataclass(frozen=True)
class Region:
    """A call of a sub-graph that may as well stand in its place.

    Attributes:
        body: reads the sub-graph.
        operands: what it is called with.
        autocast: what autocast around it is entered with, if there is one.
        gradients: whether they are enabled in it, if it says so.
    """

    body: fx.Node
    operands: Sequence[Any]
    autocast: tuple[Any, ...] | None = None
    gradients: bool | None = None


_REGIONS: dict[str, Callable[..., Region]] = {
    "invoke_subgraph": lambda body, name, *operands: Region(body, operands),
    "tag_activation_checkpoint": lambda body, *operands: Region(body, operands),
    "wrap_activation_checkpoint": lambda body, *operands: Region(body, operands),
    "wrap": lambda body, *operands: Region(body, operands),
    "strict_mode": lambda body, operands: Region(body, operands),
    "wrap_with_set_grad_enabled": lambda enabled, body, *operands: Region(body, operands, gradients=enabled),
    "wrap_with_autocast": lambda device, dtype, enabled, cache, body, *operands: Region(
        body, operands, autocast=(device, dtype, enabled, cache)
    ),
}
"""By the name of a higher-order operator, how its arguments are to be read. What is not here stays a call."""


def written_out(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with the operations of every region in the place of its call.

    Before: ``y = invoke_subgraph(self.r, "r", x, w0)[0]; z = invoke_subgraph(self.r, "r", y, w1)[0]``
    After:  ``y = linear(x, w0); z = linear(y, w1)``

    A scan over weights, stacked layer by layer, becomes its layers.

    Args:
        gm: a graph as Dynamo captured it; it is left as it is.

    Returns:
        A new graph of the same inputs and outputs, each node with a value of its own and the path of the module that
        it came from. `gm` itself if there is nothing to write out.
    """
    if not any(_region(n) or _layers(n) for n in gm.graph.nodes):
        return gm
    writer = _Writer(gm)
    with _contexts() as entered:
        for node in gm.graph.nodes:
            _follow(node, entered)
            writer.write(node)
    made = fx.GraphModule(writer.held, writer.graph)
    made.meta.update(gm.meta)
    return made


class _Writer:
    """Copies a graph node by node, and what is called into the place of its call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        self.held: dict[str, Any] = {}
        self._gm = gm
        self._env: dict[fx.Node, Any] = {}
        self._bodies: dict[str, tuple[fx.GraphModule, str]] = {}

    def write(self, node: fx.Node) -> None:
        """Copies a node, or writes out what it calls."""
        region, layers = _region(node), _layers(node)
        if region is not None:
            self._env[node] = self._region(region, node)
        elif layers:
            self._env[node] = self._scan(node, layers)
        elif node.target is operator.getitem and isinstance(self._env.get(_first(node)), tuple | list):
            self._env[node] = self._env[_first(node)][_args(node)[1]]
        elif not (node.op == "get_attr" and node.users and all(_body(user) is node for user in node.users)):
            self._env[node] = self.graph.node_copy(node, self._env.__getitem__)
            if node.op in ("get_attr", "call_module"):
                self.held[str(node.target)] = attribute_of(self._gm, str(node.target))

    def _region(self, region: Region, call: fx.Node) -> Any:
        operands = fx.map_arg(tuple(region.operands), self._env.__getitem__)
        if region.gradients in (None, torch.is_grad_enabled()) and region.autocast is None:
            return self._called(region.body, operands, call)
        if region.autocast is None:
            self.graph.call_function(set_grad_enabled, (region.gradients,))
            results = self._called(region.body, operands, call)
            self.graph.call_function(set_grad_enabled, (torch.is_grad_enabled(),))
            return results
        context = self.graph.call_function(enter_autocast, region.autocast)
        with _contexts() as entered:
            _follow(context, entered)
            results = self._called(region.body, operands, call)
        self.graph.call_function(exit_autocast, (context,))
        return results

    def _scan(self, call: fx.Node, layers: int) -> tuple[Any, ...]:
        body, *rest = _args(call)
        carried, stacked, others = (fx.map_arg(tuple(a), self._env.__getitem__) for a in rest)
        made = []
        for i in range(layers):
            parts = [self._part(x, i) for x in stacked]
            results = self._called(body, (*carried, *parts, *others), call)
            carried, outputs = results[: len(carried)], results[len(carried) :]
            made.append(outputs)
        used = {_args(user)[1] for user in call.users}
        collected = [
            self._stacked(each) if len(carried) + k in used else None for k, each in enumerate(zip(*made, strict=True))
        ]
        return (*carried, *collected)

    def _part(self, stacked: fx.Node, layer: int) -> fx.Node:
        return mark(
            self.graph.call_method("select", (stacked, 0, layer)), None, fake(lambda x: x.select(0, layer), stacked)
        )

    def _stacked(self, layers: Sequence[fx.Node]) -> fx.Node:
        return mark(
            self.graph.call_function(torch.stack, (tuple(layers),)), None, fake(lambda *x: torch.stack(x), *layers)
        )

    def _called(self, region: fx.Node, operands: Sequence[Any], call: fx.Node) -> Any:
        """Copies a sub-graph's operations, called with `operands`, and what they hold; returns what it returns.

        The capture recorded the values of its first call alone; they are computed anew.
        """
        target, path = str(region.target), _path(call)
        if target not in self._bodies:
            self._bodies[target] = written_out(attribute_of(self._gm, target)), path
        body, first_path = self._bodies[target]
        values = values_for(body, [value_of(a) if isinstance(a, fx.Node) else a for a in operands])
        env = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in body.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder":
                continue
            copy = env[node] = self.graph.node_copy(node, env.__getitem__)
            copy.meta = {**node.meta, "example_value": values[node]}
            if "nn_module_stack" in node.meta:
                copy.meta["nn_module_stack"] = {
                    key: (_renamed(path_, first_path, path), kind)
                    for key, (path_, kind) in node.meta["nn_module_stack"].items()
                }
            if node.op in ("get_attr", "call_module"):
                copy.target = f"region_{len(self.held)}"
                self.held[copy.target] = attribute_of(body, str(node.target))
        raise AssertionError("a graph without output")


def _args(node: fx.Node) -> Any:
    """The arguments of a node, whatever they are."""
    return node.args


def _name(node: fx.Node) -> str:
    """What a higher-order operator is called; "" for any other node."""
    return node.target.name() if isinstance(node.target, HigherOrderOperator) else ""


def _region(node: fx.Node) -> Region | None:
    """The region that a node calls, if it may stand in its place."""
    read = _REGIONS.get(_name(node))
    if read is None or any(isinstance(a, fx.Node) for a in node.kwargs.values()):
        return None
    return read(*_args(node))


def _layers(node: fx.Node) -> int:
    """How many layers a scan over weights has; 0 where it is none, or their number is not known."""
    if _name(node) != "scan":
        return 0
    stacked: list[fx.Node] = list(_args(node)[2])
    given = [{a for a in ancestors(x) if a.op in ("placeholder", "get_attr") and is_tensor(a)} for x in stacked]
    if not any(sources and all(map(is_weight, sources)) for sources in given):
        return 0
    if any(user.target is not operator.getitem for user in node.users):
        return 0
    count = value_of(stacked[0]).shape[0]
    return count if isinstance(count, int) else 0


def _body(node: fx.Node) -> fx.Node | None:
    """What reads the sub-graph that is written out in the place of a node."""
    region = _region(node)
    if region is not None:
        return region.body
    return _first(node) if _layers(node) else None


def _first(node: fx.Node) -> Any:
    """The first argument of a node, if that is a node."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


@contextmanager
def _contexts() -> Iterator[dict[fx.Node, Any]]:
    """Autocast as the nodes of a graph enter and leave it; what is not left is left at the end."""
    entered: dict[fx.Node, Any] = {}
    try:
        yield entered
    finally:
        for context in reversed(entered.values()):
            exit_autocast(context)


def _follow(node: fx.Node, entered: dict[fx.Node, Any]) -> None:
    """Enters or leaves the autocast that a node enters or leaves: values within it are of other types."""
    target: Any = node.target
    if target is enter_autocast:
        entered[node] = enter_autocast(*node.args)
    elif target is exit_autocast:
        exit_autocast(entered.pop(_first(node)))


def _path(call: fx.Node) -> str:
    """Path of the module that a region was called in."""
    stack = list(call.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def _renamed(path: str, first: str, now: str) -> str:
    """A module's path in the first call of its region as it is in this one."""
    inside = path == first or path.startswith(f"{first}.")
    return now + path[len(first) :] if first and inside else path
