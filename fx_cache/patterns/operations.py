"""The operations of a graph in a row, as the search for repeats sees them: what is alike, and what is alive where."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fx_cache.ops import version
from fx_cache.patterns.graph import (
    callee,
    descendants,
    hinted_shape,
    is_tensor,
    is_weight,
    operation,
    storage_key,
    value_of,
    viewed,
    written_inputs,
)
from fx_cache.patterns.inputs import classify_inputs

_TAKES = {"getitem", "select", "slice", "narrow"}

Form = tuple[Any, ...]
"""Shape and dtype of a tensor; the same for all sizes that are known at run time only."""


class Operations:
    """The operations of a graph that make a tensor or write to one, and do not just take it out of the weights.

    A version is none: its tensor is what the write made of it.

    Attributes:
        nodes: they themselves, in the order in which they run.
        letters: for each a number that is the same for like operations on weights of like shapes.
        varies: whether it depends on what is denoised.
        lives: the tensors.
        reads: what an operation reads beside weights: which operation makes it (below 0: a graph input), and its form.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = [n for n in graph.nodes if is_operation(n)]
        self._form = cache(_form)
        self.reads = cache(self._reads)
        self.letters = _letters(self.nodes, self._form)
        self.varies = _varies(graph, self.nodes)
        self._makers = {n: -1 - i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
        number = {n: i for i, n in enumerate(self.nodes)}
        number |= {v: i for n, i in number.items() for v in n.users if v.target is version and v.args[1] is n}
        self._makers |= number
        self.lives = _lives(graph, number, self._form)

    def _reads(self, operation: int) -> list[tuple[int, Form]]:
        inputs = [a for a in self.nodes[operation].all_input_nodes if is_tensor(a) and not is_weight(a)]
        return [(self._makers.get(a, -1), self._form(a)) for a in inputs]

    @cached_property
    def uses(self) -> list[set[int]]:
        """By operation, the numbers of the tensors that it uses."""
        return self._by_operation([life.uses for life in self.lives])

    @cached_property
    def makes(self) -> list[set[int]]:
        """By operation, the numbers of the tensors that it makes, looks at in another shape, or writes to."""
        return self._by_operation([life.makers for life in self.lives])

    def equal(self, a: int, b: int, size: int) -> bool:
        """Whether the same operations stand at two places, as many as asked for."""
        return b + size <= len(self.letters) and self.letters[a : a + size] == self.letters[b : b + size]

    def _by_operation(self, numbers: list[frozenset[int]]) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in self.nodes]
        for i, at in enumerate(numbers):
            for j in at:
                if 0 <= j < len(found):
                    found[j].add(i)
        return found


class Ancestry:
    """Which operations have a part in what is made before a place and used right behind it; looked up when asked."""

    def __init__(self, operations: Operations, place: int, until: int) -> None:
        """
        Args:
            operations: the graph.
            place: number of the operation before which it is made.
            until: number of the operation before which it is used.
        """
        self._operations = operations
        self._place = place
        used = {i for uses in operations.uses[place:until] for i in uses}
        self._needed = {i for i in used if operations.lives[i].born < place}
        self._counts = [0]

    def count(self, begin: int, end: int) -> int:
        """How many of the operations from `begin` to `end`, before the place."""
        uses, makes = self._operations.uses, self._operations.makes
        while len(self._counts) <= self._place - begin:
            j = self._place - len(self._counts)
            part = not self._needed.isdisjoint(makes[j])
            if part:
                self._needed |= uses[j]
            self._counts.append(self._counts[-1] + part)
        return self._counts[self._place - begin] - self._counts[self._place - end]


@dataclass(frozen=True)
class Cut:
    """A stretch of places, each before the operation of that number, with the same least number of tensors alive."""

    first: int
    last: int
    width: int


@dataclass(frozen=True)
class Life:
    """A tensor's storage: made by operation `born`, used by `uses`, last by `dies`; `form` is what it holds.

    `makers` are the operations that make it, look at it in another shape, or write to it.
    """

    born: int
    dies: int
    form: Form
    uses: frozenset[int]
    makers: frozenset[int]


def is_operation(node: fx.Node) -> bool:
    """Whether a node makes a tensor or writes to one, and does not just take it out of the weights."""
    if node.op not in ("call_function", "call_method", "call_module") or node.target is version:
        return False
    return not is_weight(node) if is_tensor(node) else bool(written_inputs(node))


def _lives(graph: fx.Graph, number: dict[fx.Node, int], form_of: Callable[[fx.Node], Form]) -> list[Life]:
    """The tensors of a graph.

    Args:
        graph: a captured forward.
        number: that of each operation, and of each version that of the write that made it.
        form_of: what a tensor holds.
    """
    inputs = [n for n in graph.find_nodes(op="placeholder") if is_tensor(n) and not is_weight(n)]
    # A tensor that is written to is another one from then on.
    holders: dict[Any, list[tuple[int, fx.Node]]] = defaultdict(list)
    tensor_of: dict[fx.Node, Any] = {}
    for node, i in [*((n, -1) for n in inputs), *sorted(number.items(), key=lambda item: item[1])]:
        if storage_key(node) is None:
            continue
        source, write = _origin(node)
        tensor_of[node] = write or (tensor_of.get(source, node) if source else node)
        holders[tensor_of[node]].append((i, node))
    found = []
    end = max(number.values(), default=0) + 2
    handed_out: set[Any] = set()
    for held in sorted(holders.values(), key=lambda h: -h[0][0]):
        born = held[0][0]
        # What is written to through a view is the whole tensor, as it is read behind the write.
        form = form_of(max((n for i, n in held if i == born), key=_size))
        uses = {number.get(u, i) for i, n in held for u in n.users if u.op != "output"}
        # What a block hands out beside its stream (keys and values for a cache) is not carried through the others.
        if not uses and form not in handed_out:
            handed_out.add(form)
            uses = {end}
        makers = frozenset(i for i, _ in held)
        found.append(Life(born, max(uses | makers), form, frozenset(uses), makers))
    return found


def _size(node: fx.Node) -> int:
    """Elements of a tensor."""
    return torch.Size(hinted_shape(value_of(node))).numel()


def _origin(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The tensor that a node is a view of, and the write behind which it is what it is; None where there is none."""
    if node.target is version:
        return None, node.args[1]  # type: ignore[return-value]
    if written_inputs(node):
        return None, node
    source = viewed(node)
    while source is not None and not is_tensor(source):
        source = viewed(source)
    return source, None


def within_blocks(lives: list[Life], stacks: list[list[int]]) -> list[Life]:
    """The same without what goes through a stack beside its streams: values all blocks read, and long skips."""
    streams = [_steady(lives, places) for places in stacks]
    found = []
    for life in lives:
        dies = life.dies
        for places, forms in zip(stacks, streams, strict=True):
            if life.born < places[1] and life.dies > places[2]:
                if life.form not in forms if life.born >= places[0] else life.dies <= places[-1]:
                    dies = life.born
            elif places[1] <= life.born < places[-1] and life.form not in forms:
                crossed = [p for p in places if life.born < p <= life.dies]
                if len(crossed) > 1:
                    dies = min(dies, (crossed[0] + crossed[1]) // 2)
        found.append(replace(life, dies=dies))
    return found


def _steady(lives: list[Life], places: list[int]) -> set[Any]:
    """The forms of which as many tensors made in a stack are alive behind each of its blocks: streams, and no skips."""
    made = [life for life in lives if places[0] <= life.born < places[-1]]
    # What the last but one block makes of a stream may be unused: the last one need not read it.
    alive = [Counter(life.form for life in made if life.born < p <= life.dies) for p in places[1:-2] or places[1:-1]]
    return {form for form in alive[0] if all(count[form] == alive[0][form] for count in alive)}


def _varies(graph: fx.Graph, ops: Sequence[fx.Node]) -> list[bool]:
    inputs = list(graph.find_nodes(op="placeholder"))
    latents = classify_inputs(graph).latents
    reached = descendants(graph, [inputs[i] for i in latents])
    return [n in reached or not latents for n in ops]


def _letters(ops: Sequence[fx.Node], form_of: Callable[[fx.Node], Form]) -> list[int]:
    numbers: dict[Any, int] = {}
    found = []
    for node in ops:
        weights = tuple(form_of(a) for a in node.all_input_nodes if is_weight(a))
        constants = (*_constants(node.args), *_constants(node.kwargs))
        if constants and _counts_up(node):
            constants = ()
        found.append(numbers.setdefault((node.op, callee(node), constants, form_of(node), weights), len(numbers)))
    return found


def _constants(value: Any) -> Iterator[str]:
    """What stands among the arguments of an operation beside nodes."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _constants(item)
    elif isinstance(value, dict):
        yield from _constants(tuple(value.values()))
    elif value is not None and not isinstance(value, fx.Node):
        yield repr(value)


def _counts_up(node: fx.Node) -> bool:
    """Whether the constants may be a block's number: taken out of a tensor that all blocks share, or made a tensor."""
    return operation(node) in _TAKES or not node.all_input_nodes


def _form(node: fx.Node) -> Form:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) and (written := written_inputs(node)):
        value = value_of(written[0])
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__,)
    shape = tuple("?" if _unbacked(s) else str(s) for s in value.shape)
    return shape, str(value.dtype)


def _unbacked(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def find_cuts(count: int, lives: list[Life]) -> list[Cut]:
    """Where the number of tensors alive is least, for stretches of equal number; the ends of the graph are cuts too."""
    change = [0] * (count + 3)
    for life in lives:
        if life.dies > life.born:
            change[life.born + 1] += 1
            change[life.dies + 1] -= 1
    alive = list(accumulate(change))[: count + 1]
    cuts: list[Cut] = []
    first = 0
    for i in range(1, count + 2):
        if i <= count and alive[i] == alive[first]:
            continue
        falls = first == 0 or alive[first - 1] > alive[first]
        rises = i > count or alive[i] > alive[first]
        if first == 0 or (falls and rises):
            cuts.append(Cut(first, i - 1, alive[first]))
        first = i
    if cuts[-1].last < count:
        cuts.append(Cut(count, count, alive[count]))
    return cuts
