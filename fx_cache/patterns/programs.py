"""Tells whether two captured graphs compute the same, but for their sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from fx_cache.patterns.graph import attribute_of, is_scalar, is_tensor, operation, source_of, value_of

MAX_NAMES = 256
"""Combinations of sizes whose names are remembered."""


@dataclass(frozen=True, eq=False)
class Program:
    """What a captured graph computes, but for its sizes.

    Attributes:
        wiring: digest of its operations and of what each takes; not of integers.
        numbers: the integers among the arguments, in order; an expression where one is computed, or given.
        sizes: symbols in these that are sizes of an input: (symbol, position of the input, dimension).
        given: symbols in these that are inputs: (symbol, position of the input).
    """

    wiring: str
    numbers: tuple[Any, ...]
    sizes: tuple[tuple[sympy.Symbol, int, int], ...]
    given: tuple[tuple[sympy.Symbol, int], ...]
    _names: dict[Hashable, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.Graph) -> Program:
        """The program of a graph."""
        digest = hashlib.sha256()
        numbers: list[Any] = []
        made: dict[sympy.Symbol, str] = {}
        for part in _parts(graph, numbers, made):
            digest.update(repr(part).encode())
        sizes = _sizes(graph)
        others = _others(graph, numbers, {symbol for symbol, _, _ in sizes}, made)
        numbers = [n.xreplace(others) if isinstance(n, sympy.Basic) else n for n in numbers]
        symbols = {str(symbol): symbol for symbol in others.values()}
        inputs = enumerate(graph.find_nodes(op="placeholder"))
        given = tuple((symbols[source], i) for i, n in inputs if (source := source_of(n)) in symbols)
        return cls(digest.hexdigest(), tuple(numbers), sizes, given)

    def at(self, args: Sequence[Any], given: Collection[int] = ()) -> str:
        """The name of what the graph computes of inputs of these sizes.

        Equal for the static and the dynamic graph of one forward. Different for graphs that compute from other tensors,
        in another order, with other numbers or other Python values, or in another precision (autocast).

        Args:
            args: the graph's inputs.
            given: positions of those that are numbers and have to be the same ones.
        """
        sizes = tuple([args[i].shape[dim] for _, i, dim in self.sizes])
        values = tuple([args[i] if i in given else None for _, i in self.given])
        name = self._names.get((sizes, values))
        if name is None:
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            known = {symbol: sympy.Integer(n) for (symbol, _, _), n in zip(self.sizes, sizes, strict=True)}
            known |= {s: sympy.Integer(n) for (s, _), n in zip(self.given, values, strict=True) if n is not None}
            numbers = [n.xreplace(known) if isinstance(n, sympy.Basic) else n for n in self.numbers]
            digest = hashlib.sha256(" ".join(map(str, numbers)).encode())
            name = self._names[sizes, values] = f"{self.wiring[:32]}-{digest.hexdigest()[:32]}"
        return name


def _sizes(graph: fx.Graph) -> tuple[tuple[sympy.Symbol, int, int], ...]:
    """Where each symbol that is a size of an input is to be read."""
    found: dict[sympy.Symbol, tuple[int, int]] = {}
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        for dim, size in enumerate(value_of(node).shape if is_tensor(node) else ()):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found.setdefault(size.node.expr, (i, dim))
    return tuple((symbol, *place) for symbol, place in found.items())


def _others(
    graph: fx.Graph, numbers: Sequence[Any], sizes: Collection[sympy.Symbol], made: Mapping[sympy.Symbol, str]
) -> dict[sympy.Symbol, sympy.Symbol]:
    """What to call the other symbols: a number that is given by its source, one that depends on data by its maker."""
    names = dict(made)
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            names[value.node.expr] = source_of(node)
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for number in numbers:
        free = sorted(number.free_symbols, key=str) if isinstance(number, sympy.Basic) else ()
        for symbol in free:
            if symbol not in sizes and symbol not in found:
                found[symbol] = sympy.Symbol(names.get(symbol, str(symbol)), integer=True)
    return found


def _numbers(value: Any) -> list[Any]:
    """A host value, or several: an expression where one is symbolic, else itself."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return [value.node.expr]
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value if isinstance(value, int | float | str) else type(value).__name__]


def _parts(
    graph: fx.Graph, numbers: list[Any], made: dict[sympy.Symbol, str], within: str = ""
) -> Iterator[tuple[Any, ...]]:
    """What is to be equal of two graphs.

    Args:
        graph: the graph.
        numbers: takes the integers among the arguments.
        made: takes, of each symbol that is not given, what makes it.
        within: where the graph is called.
    """
    index: dict[fx.Node, Any] = {}
    scalars: set[fx.Node] = set()
    for node in graph.nodes:
        if is_scalar(node) or (node.op == "placeholder" and isinstance(value_of(node), torch.SymInt)):
            scalars.add(node)
            if node.op != "placeholder":
                sources = [index[a] for a in node.all_input_nodes if a in index]
                for symbol in _free(value_of(node)):
                    made.setdefault(symbol, f"{within}{operation(node)} of {sources}")
            continue
        if "assert" in operation(node):
            continue
        dtype = value_of(node).dtype if is_tensor(node) else None
        if node.op == "placeholder":
            index[node] = source_of(node)
            continue
        index[node] = len(index)
        for k, symbol in enumerate(_free(value_of(node))):
            made.setdefault(symbol, f"{within}{index[node]}, size {k}")
        gm = graph.owning_module
        inner = None if gm is None or node.op != "get_attr" else attribute_of(gm, str(node.target))
        if isinstance(inner, fx.GraphModule):
            yield "sub-graph", *_parts(inner.graph, numbers, made, f"{within}{index[node]}: ")
            continue
        arguments = [*_leaves(node.args, index, scalars, numbers), *_leaves(node.kwargs, index, scalars, numbers)]
        yield node.op, _name(node.target), arguments, dtype


def _free(value: Any) -> list[sympy.Symbol]:
    """The symbols in a number, or in the sizes of a tensor or of several, in order."""
    if isinstance(value, torch.Tensor):
        value = tuple(value.shape)
    if isinstance(value, list | tuple):
        return list(dict.fromkeys(symbol for item in value for symbol in _free(item)))
    expression = value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else None
    return sorted(expression.free_symbols, key=str) if isinstance(expression, sympy.Basic) else []


def _name(target: Any) -> str:
    """What an operation is called, with the library that it is from."""
    if isinstance(target, str | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def _leaves(value: Any, index: dict[fx.Node, Any], scalars: set[fx.Node], numbers: list[Any]) -> Iterator[Any]:
    if isinstance(value, fx.Node):
        if value in scalars:
            numbers += _numbers(value_of(value))
            yield "number"
        else:
            yield "node", index[value]
    elif isinstance(value, slice):
        yield from _leaves((value.start, value.stop, value.step), index, scalars, numbers)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item, index, scalars, numbers)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield "("
        for item in value:
            yield from _leaves(item, index, scalars, numbers)
    elif isinstance(value, int) and not isinstance(value, bool):
        numbers.append(value)
        yield "number"
    elif value is None or isinstance(value, str | float | bool | complex | torch.dtype | torch.device | torch.layout):
        yield value
    elif type(value).__repr__ is not object.__repr__:  # of an enum, or the like, its value
        yield repr(value)
    else:
        yield type(value).__name__
