"""Tells whether two captured graphs compute the same, but for their sizes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fx_cache.patterns.graph import attribute_of, is_scalar, is_tensor, operation, source_of, value_of

Numbers = tuple[Any, ...]
"""The integers among the arguments of a graph's operations, in order; where one is computed, or given, a `_Symbol`."""


class _Symbol(int):
    """The number of a node that computes an integer, or is given one."""


class Programs:
    """The programs of a process: graphs that may go on with each other's requests are of one program."""

    def __init__(self) -> None:
        self._known: dict[str, list[list[Numbers]]] = {}
        self._lock = threading.Lock()

    def of(self, graph: fx.Graph) -> str:
        """The name of the program that a captured graph is of.

        Equal for the static and the dynamic graph of one forward. Different for graphs that compute from other tensors,
        in another order, with other Python values, or in another precision (autocast). An integer is the same as a
        symbol in its place, which may be a size, but not as another integer.
        """
        digest = hashlib.sha256()
        numbers: list[Any] = []
        for part in _parts(graph, numbers):
            digest.update(repr(part).encode())
        name, own = digest.hexdigest(), tuple(numbers)
        with self._lock:
            groups = self._known.setdefault(name, [])
            for number, group in enumerate(groups):
                if all(_compatible(own, other) for other in group):
                    if own not in group:
                        group.append(own)
                    return f"{name}-{number}"
            groups.append([own])
            return f"{name}-{len(groups) - 1}"


def _compatible(one: Numbers, other: Numbers) -> bool:
    return all(a == b if type(a) is type(b) else True for a, b in zip(one, other, strict=True))


def _parts(graph: fx.Graph, numbers: list[Any]) -> Iterator[tuple[Any, ...]]:
    """What is to be equal of two graphs; integers go to `numbers`."""
    index: dict[fx.Node, Any] = {}
    symbols: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if is_scalar(node) or (node.op == "placeholder" and isinstance(value_of(node), torch.SymInt)):
            symbols[node] = len(symbols)
            continue
        if "assert" in operation(node):
            continue
        dtype = value_of(node).dtype if is_tensor(node) else None
        if node.op == "placeholder":
            index[node] = source_of(node)
            continue
        index[node] = len(index)
        gm = graph.owning_module
        inner = None if gm is None or node.op != "get_attr" else attribute_of(gm, str(node.target))
        if isinstance(inner, fx.GraphModule):
            yield "sub-graph", *_parts(inner.graph, numbers)
            continue
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", type(node.target))
        arguments = [*_leaves(node.args, index, symbols, numbers), *_leaves(node.kwargs, index, symbols, numbers)]
        yield node.op, str(target), arguments, dtype


def _leaves(value: Any, index: dict[fx.Node, Any], symbols: dict[fx.Node, int], numbers: list[Any]) -> Iterator[Any]:
    if isinstance(value, fx.Node):
        if value in symbols:
            numbers.append(_Symbol(symbols[value]))
            yield "number"
        else:
            yield "node", index[value]
    elif isinstance(value, slice):
        yield from _leaves((value.start, value.stop, value.step), index, symbols, numbers)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item, index, symbols, numbers)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield "("
        for item in value:
            yield from _leaves(item, index, symbols, numbers)
    elif isinstance(value, int) and not isinstance(value, bool):
        numbers.append(value)
        yield "number"
    elif value is None or isinstance(value, str | float | bool | complex | torch.dtype | torch.device | torch.layout):
        yield value
    else:
        yield type(value).__name__


PROGRAMS = Programs()
"""Those of this process."""
