"""Makes graphs of some of a graph's outputs: what can be made without all that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fx_cache.passes.outline import build
from fx_cache.patterns.calls import Part
from fx_cache.patterns.contexts import find_contexts
from fx_cache.patterns.graph import ancestors, draws_random, positions, storage_key, written_inputs
from fx_cache.patterns.values import data_inputs
from fx_cache.patterns.work import Work


class GraphParts:
    """The outputs of a graph that can be made without others, and the graphs that make them.

    They may take no operation that writes to an input of the graph or draws random numbers.

    Attributes:
        work: these outputs, by number, and the FLOPs of each; none where nobody could ask for a part, since all outputs
            depend on the same inputs.
    """

    def __init__(self, gm: fx.GraphModule | None, work: Work) -> None:
        """
        Args:
            gm: the graph, with versions: who reads behind a write depends on it. It is kept if need be, and left as
                it is. None: of a graph that is a whole forward nobody asks for a part.
            work: its FLOPs.
        """
        self.work: dict[int, int] = {}
        self._made: dict[tuple[int, ...], Part] = {}
        if gm is None:
            return
        inputs = list(gm.graph.find_nodes(op="placeholder"))
        outputs = _outputs(gm.graph)
        if len({frozenset(ancestors(n, reads=data_inputs).intersection(inputs)) for n in outputs.values()}) < 2:
            return
        behind = {k: _behind(gm.graph, [n]) for k, n in outputs.items()}
        self._gm = gm
        memory = {storage_key(n) for n in inputs}
        self.work = {
            k: sum(map(work.of, nodes))
            for k, nodes in behind.items()
            if not any(draws_random(n) or memory.intersection(map(storage_key, written_inputs(n))) for n in nodes)
        }

    def part(self, outputs: Sequence[int]) -> Part:
        """What makes some of the outputs, of what the graph is called with; it runs eagerly.

        Args:
            outputs: their numbers, each a key of `work`.
        """
        numbers = tuple(outputs)
        if numbers not in self._made:
            self._made[numbers] = self._build(numbers)
        return self._made[numbers]

    def _build(self, outputs: tuple[int, ...]) -> Part:
        graph = self._gm.graph
        given = _outputs(graph)
        behind = _behind(graph, [given[k] for k in outputs])
        order = positions(graph)
        inputs = list(graph.find_nodes(op="placeholder"))
        taken = [i for i, n in enumerate(inputs) if n in behind]
        operations = sorted((n for n in behind if n.op not in ("placeholder", "get_attr")), key=order.__getitem__)
        part = build(self._gm, operations, [inputs[i] for i in taken], [given[k] for k in outputs]).forward

        def make(args: Sequence[Any]) -> Sequence[Any]:
            made: Sequence[Any] = part(*[args[i] for i in taken])
            return made

        return make


def _behind(graph: fx.Graph, outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """What outputs are made of, with the nodes that enter and leave the contexts that it is made in."""
    nodes = list(graph.nodes)
    contexts = [nodes[first : last + 1] for first, last in find_contexts(graph)]
    found: set[fx.Node] = set()
    more = set(outputs)
    while more - found:
        found |= set().union(*map(ancestors, more))
        more = {edge for within in contexts if not found.isdisjoint(within) for edge in (within[0], within[-1])}
    return found


def _outputs(graph: fx.Graph) -> dict[int, fx.Node]:
    """Those of a graph's outputs that are values of it, by number."""
    (values,) = next(iter(graph.find_nodes(op="output"))).args
    assert isinstance(values, list | tuple)
    return {k: n for k, n in enumerate(values) if isinstance(n, fx.Node)}
