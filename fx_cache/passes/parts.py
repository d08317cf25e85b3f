"""Makes graphs of some of a graph's outputs: what can be made without all that it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fx_cache.passes.outline import build
from fx_cache.patterns.contexts import within_contexts
from fx_cache.patterns.graph import ancestors, draws_random, positions, storage_key, written_inputs
from fx_cache.patterns.work import Work


class GraphParts:
    """The outputs of a graph that can be made without others, and the graphs that make them.

    They may take no operation that writes to an input of the graph, draws random numbers or runs in a context.

    Attributes:
        work: these outputs, by number, and the FLOPs of each; none where all are made of the same inputs.
    """

    def __init__(self, gm: fx.GraphModule, work: Work) -> None:
        """
        Args:
            gm: the graph, with versions: who reads behind a write depends on it. It is kept if need be, and left as
                it is.
            work: its FLOPs.
        """
        inputs = list(gm.graph.find_nodes(op="placeholder"))
        behind = {k: ancestors(n) for k, n in _outputs(gm.graph).items()}
        self.work: dict[int, int] = {}
        self._made: dict[tuple[int, ...], tuple[tuple[int, ...], Callable[..., Any]]] = {}
        if len({frozenset(nodes.intersection(inputs)) for nodes in behind.values()}) < 2:
            return
        self._gm = gm
        memory = {storage_key(n) for n in inputs}
        contexts = within_contexts(gm.graph)
        self.work = {
            k: sum(map(work.of, nodes))
            for k, nodes in behind.items()
            if contexts.isdisjoint(nodes)
            and not any(draws_random(n) or memory.intersection(map(storage_key, written_inputs(n))) for n in nodes)
        }

    def make(self, outputs: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        """Makes some of the outputs.

        Args:
            outputs: their numbers.
            args: what the graph is called with.
        """
        numbers = tuple(outputs)
        if numbers not in self._made:
            self._made[numbers] = self._part(numbers)
        taken, part = self._made[numbers]
        made: tuple[Any, ...] = part(*[args[i] for i in taken])
        return made

    def _part(self, outputs: tuple[int, ...]) -> tuple[tuple[int, ...], Callable[..., Any]]:
        graph = self._gm.graph
        given = _outputs(graph)
        behind = set().union(*(ancestors(given[k]) for k in outputs))
        order = positions(graph)
        inputs = list(graph.find_nodes(op="placeholder"))
        taken = tuple(i for i, n in enumerate(inputs) if n in behind)
        operations = sorted((n for n in behind if n.op not in ("placeholder", "get_attr")), key=order.__getitem__)
        part = build(self._gm, operations, [inputs[i] for i in taken], [given[k] for k in outputs])
        return taken, part.forward


def _outputs(graph: fx.Graph) -> dict[int, fx.Node]:
    """Those of a graph's outputs that are values of it, by number."""
    (values,) = next(iter(graph.find_nodes(op="output"))).args
    assert isinstance(values, list | tuple)
    return {k: n for k, n in enumerate(values) if isinstance(n, fx.Node)}
