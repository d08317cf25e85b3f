"""The calls of one whole forward that was captured in several graphs: what each graph is, and who made what it took."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch import fx
from torch._guards import CompileContext

from fx_cache.errors import Refusal
from fx_cache.patterns.forms import Form
from fx_cache.patterns.graph import (
    ancestors,
    draws_random,
    is_tensor,
    same_shape,
    source_of,
    storage_key,
    written_storages,
)
from fx_cache.patterns.groups import groups_of
from fx_cache.patterns.inputs import InputRoles, classify_inputs, goes_into_linear, sinusoids_of, token_sources
from fx_cache.patterns.places import distances, in_place, only_accumulated
from fx_cache.patterns.programs import Program
from fx_cache.patterns.values import data_inputs

Place = tuple[int, int]
"""A call, and one of its outputs; or what it was the first to be given (`given_as`), if nobody known made that."""


def given_as(position: int) -> int:
    """What stands in a place for an argument of a call, instead of the number of an output."""
    return -1 - position


UNKNOWN = -1
"""In the place of a user's input: something of which it is not known where it comes from."""


Part = Callable[[Sequence[Any]], Sequence[Any]]
"""Makes some outputs of a graph of what that is called with."""


class Parts(Protocol):
    """What a graph can make without all that it is given.

    Attributes:
        work: the outputs that can be made without others, by number, and the FLOPs of each.
    """

    @property
    def work(self) -> Mapping[int, int]: ...

    def part(self, outputs: Sequence[int]) -> Part:
        """What makes some of these outputs."""


@dataclass(frozen=True)
class GraphFacts:
    """What is known of one captured graph.

    Attributes:
        program: what it computes.
        roles: the roles of its inputs; none is a latent, since what is denoised only the end of the forward shows.
        names: where each input comes from, in the terms of the captured code; the same in every graph of that code.
        tokens: for each output, the inputs whose tokens it holds.
        shown: for each output, the inputs that its numbers depend on.
        ways: for each output, the inputs that it is made of but weights: through how many operations at least, and
            whether elements are moved on that way (`in_place`).
        accumulated: inputs of which it makes nothing but what something is added to, or put into.
        sinusoids: for each output, the inputs whose sinusoids it is, if another graph embeds a time by it.
        linear: inputs that go into a linear layer by themselves.
        written: inputs that it writes to in place.
        work: its FLOPs.
        span_work: those in spans of its own; 0 if it has none.
        frame: number of the captured code; the same for graphs that it was captured in anew.
        random: an operation that draws random numbers, or None.
        broken: place and reason of the graph break that ends it, or None.
        gradients: why nothing that it makes may be reused, or None.
        groups: names of the process groups whose ranks compute it together.
        parts: what it can make without all that it is given.
    """

    program: Program
    roles: InputRoles
    names: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    shown: tuple[tuple[int, ...], ...]
    ways: tuple[Mapping[int, tuple[int, bool]], ...]
    accumulated: tuple[int, ...]
    sinusoids: tuple[frozenset[int], ...]
    linear: tuple[int, ...]
    written: tuple[int, ...]
    work: int
    span_work: int
    frame: int
    random: str | None
    broken: str | None
    gradients: Refusal | None
    groups: tuple[str, ...]
    parts: Parts

    @cached_property
    def given(self) -> tuple[int, ...]:
        """The inputs that are no weights."""
        weights = frozenset(self.roles.weights)
        return tuple(i for i in range(len(self.names)) if i not in weights)

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """The weights that it does not write to itself, in the order of their names."""
        return self._by_name(self.roles.weights)

    @cached_property
    def held(self) -> tuple[int, ...]:
        """The same of other inputs that are attributes or global; the user may have given them."""
        return self._by_name([i for i in self.given if is_held(self.names[i])])

    def _by_name(self, inputs: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(frozenset(inputs).difference(self.written), key=self.names.__getitem__))

    @property
    def layers(self) -> Hashable:
        """Captured code and its weights: the same for another pass of a request, and at another size."""
        return self.frame, frozenset(self.names[i] for i in self.roles.weights)


def read_facts(
    gm: fx.GraphModule, broken: str | None, gradients: Refusal | None, span_share: float, work: int, parts: Parts
) -> GraphFacts:
    """Reads a captured graph as a part of a forward.

    Args:
        gm: the graph as Dynamo captured it.
        broken: place and reason of the graph break that ends it, or None.
        gradients: why nothing that it makes may be reused, or None.
        span_share: the part of its FLOPs in spans of its own.
        work: its FLOPs.
        parts: what it can make without all that it is given.
    """
    graph = gm.graph
    roles = classify_inputs(graph)
    roles = replace(roles, latents=(), conditioning=(*roles.latents, *roles.conditioning))
    inputs = list(graph.find_nodes(op="placeholder"))
    outputs = next(iter(graph.find_nodes(op="output"))).args[0]
    computed = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    far = {i: distances(inputs[i], computed) for i in roles.conditioning if is_tensor(inputs[i])}
    nodes = [output if isinstance(output, fx.Node) else None for output in outputs]
    sources = [set() if n is None else token_sources(n) for n in nodes]
    behind = [set() if n is None else ancestors(n, reads=data_inputs) for n in nodes]
    curved = {i: sinusoids_of(n) for i, n in enumerate(inputs) if i not in roles.weights}
    written = written_storages(graph.nodes)
    compile_id = CompileContext.current_compile_id()
    return GraphFacts(
        program=Program.of(graph),
        roles=roles,
        names=tuple(map(source_of, inputs)),
        tokens=tuple(tuple(i for i in roles.conditioning if inputs[i] in held) for held in sources),
        shown=tuple(tuple(i for i, n in enumerate(inputs) if n in of_output) for of_output in behind),
        ways=tuple(
            {} if n is None else {i: (d[n], _is_moved(n, inputs[i], computed)) for i, d in far.items() if n in d}
            for n in nodes
        ),
        accumulated=tuple(i for i in roles.conditioning if only_accumulated(inputs[i], computed)),
        sinusoids=tuple(frozenset(i for i, ends in curved.items() if n in ends) for n in nodes),
        linear=tuple(i for i, n in enumerate(inputs) if i not in roles.weights and goes_into_linear(n)),
        written=tuple(i for i, n in enumerate(inputs) if storage_key(n) in written),
        work=work,
        span_work=round(span_share * work),
        frame=-1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id,
        random=next((n.name for n in graph.nodes if draws_random(n)), None),
        broken=broken,
        gradients=gradients,
        groups=groups_of(graph.nodes),
        parts=parts,
    )


def _is_moved(output: fx.Node, given: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    return output is not given and same_shape(output, given) and not in_place(output, given, nodes)


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from that a graph is given.

    Attributes:
        of: the outputs of calls in whose memory it lies.
        known: whether it holds just what these made, or what is looked at otherwise: what the user gave, what objects
            hold, and real numbers. It is not known what code between graphs has made.
    """

    of: frozenset[Place] = frozenset()
    known: bool = False


@dataclass(frozen=True)
class InputTrace:
    """One tensor that a graph was called with.

    Attributes:
        form: shape and dtype.
        made_by: who made it, or most of it.
        tokens: the user's inputs whose tokens it holds, and `UNKNOWN` if it may hold others; none if nothing is known.
        others: how many tokens at its beginning and at its end are none of what was made, but were joined to that.
        whole: whether it is just what was made.
        memory: the call that made the memory it lies in, whatever has been written there since; None if none did.
        unseen: whether nobody known made it, and it holds other numbers than at the call before of the same code.
        added: outputs that code between graphs seems to have added to what the call before of the same code was given,
            or to have put in other places: it does not go on with them.
        origin: where it comes from, but for what it holds a part of.
        shown: the user's inputs that it depends on, and `UNKNOWN` if it may depend on others.
    """

    form: Form
    made_by: Place | None
    tokens: frozenset[int]
    others: tuple[int, int] = (0, 0)
    whole: bool = True
    memory: int | None = None
    unseen: bool = False
    added: frozenset[Place] = frozenset()
    origin: Origin = Origin()
    shown: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Call:
    """One call of a graph within a forward.

    Attributes:
        family: which code it was; equal for calls of graphs that one function was captured in.
        facts: the graph.
        owner: the model's name of the first weight that it was given; empty without one.
        inputs: its input tensors by name.
        outputs: forms of its outputs, None for what is no tensor.
        through: numbers of the outputs that are inputs of it, handed through.
        shared: numbers of those that lie in the memory of another output or an input.
        held: of outputs the last call at whose end somebody held them; the number of all if they were returned.
    """

    family: Hashable
    facts: GraphFacts
    owner: str
    inputs: Mapping[str, InputTrace]
    outputs: tuple[Form | None, ...]
    through: frozenset[int]
    shared: frozenset[int] = frozenset()
    held: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> list[int]:
        """Numbers of the outputs that are tensors."""
        return [i for i, form in enumerate(self.outputs) if form is not None]


def layout(facts: GraphFacts, outputs: Sequence[Form | None], streams: Collection[str]) -> Hashable:
    """What has to be the same of two graphs of one code, for their outputs to be the same ones by number.

    Args:
        facts: of the graph.
        outputs: what it makes; None for what is no tensor.
        streams: names of the inputs that may be streams.
    """
    return tuple(
        None if form is None else (len(form[0]), form[1], frozenset(facts.names[i] for i in shown) & frozenset(streams))
        for form, shown in zip(outputs, facts.shown, strict=True)
    )


def is_held(name: str) -> bool:
    """Whether an input, by its name in the captured code, comes from a global variable, or is an attribute."""
    return name.startswith("G[") or "." in name
