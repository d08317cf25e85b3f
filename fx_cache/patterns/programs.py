"""Tells whether two captured graphs compute the same, but for their sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fx_cache.patterns.graph import attribute_of, is_scalar, is_tensor, operation, source_of, value_of


@dataclass(frozen=True)
class Symbol:
    """An integer that is computed, or given: which one in the order of the graph."""

    number: int


@dataclass(frozen=True)
class Program:
    """What a captured graph computes, but for its sizes.

    Attributes:
        wiring: digest of its operations and of what each takes; not of integers.
        numbers: the integers among the arguments, in order.
    """

    wiring: str
    numbers: tuple[int | Symbol, ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> Program:
        """The program of a graph.

        Another one for graphs that compute from other tensors, in another order, with other Python values, or in
        another precision (autocast).
        """
        digest = hashlib.sha256()
        numbers: list[int | Symbol] = []
        for part in _parts(graph, numbers):
            digest.update(repr(part).encode())
        return cls(digest.hexdigest(), tuple(numbers))

    def __hash__(self) -> int:
        return hash(self.wiring)

    def fits(self, other: Program) -> bool:
        """Whether both may be of one forward, a static and a dynamic graph of it, or of two sizes.

        An integer fits a symbol in its place, which may be a size, but not another integer.
        """
        return self is other or (
            self.wiring == other.wiring
            and all(a == b or type(a) is not type(b) for a, b in zip(self.numbers, other.numbers, strict=True))
        )


class Programs:
    """The programs of one model: those that fit each other go on with each other's requests."""

    def __init__(self) -> None:
        self._known: dict[str, list[list[Program]]] = {}

    def name_of(self, program: Program) -> str:
        """The name that a program has together with those that it fits."""
        groups = self._known.setdefault(program.wiring, [])
        number = next((i for i, group in enumerate(groups) if all(map(program.fits, group))), len(groups))
        if number == len(groups):
            groups.append([])
        if program not in groups[number]:
            groups[number].append(program)
        return f"{program.wiring}-{number}"


def _parts(graph: fx.Graph, numbers: list[int | Symbol]) -> Iterator[tuple[Any, ...]]:
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
            numbers.append(Symbol(symbols[value]))
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
