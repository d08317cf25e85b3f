"""Drives a model that was captured in several graphs, and reuses spans whose blocks lie in graphs of their own.

The first forward of a model is watched; from the order of its calls its stacks are known (`patterns/relays.py`). From
then on one decision is made where a span begins. On a miss every graph in the span computes, and what it makes is
kept; on a hit every graph gives back what it made then, and those that end the streams give what the span began with
plus what the blocks added. Code between the graphs runs either way; on a hit it sees the same values as then, and so
takes the same way.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from fx_cache.config import CacheConfig
from fx_cache.errors import CacheWarning, FxCacheError, Refusal
from fx_cache.patterns.relays import GraphFacts, RelayPlan, plan_relays
from fx_cache.patterns.spans import MIN_OTHER_WORK, MIN_SHARE
from fx_cache.runtime.forwards import Forward, Moves, comparable, family_of, surroundings
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.given import Control
from fx_cache.runtime.identity import SMALL, StorageHold, identity_key
from fx_cache.runtime.policy import decide
from fx_cache.runtime.registry import store_of
from fx_cache.runtime.sessions import Branch, Store

MAX_MISFITS = 4
"""Forwards that may run otherwise than planned before the model is watched again."""


HISTORY = 4
"""Forwards whose inputs are compared with those of the next one, to see which of them is denoised."""


class Graph(Protocol):
    """A compiled graph."""

    facts: GraphFacts

    def step(self, forward: Forward, args: Sequence[Any]) -> Any:
        """Runs it, with whatever it caches by itself."""

    def compute(self, *args: Any) -> Any:
        """Runs it, and caches nothing."""


class Run(Protocol):
    """What drives the calls of one forward."""

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any: ...


class Relays:
    """The relays of all compiled models, by what was compiled and its configuration."""

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[Any, dict[CacheConfig, Relay]] = WeakKeyDictionary()

    def of(self, root: Any, config: CacheConfig) -> Relay:
        by_config = self._found.setdefault(root, {})
        if config not in by_config:
            by_config[config] = Relay(config)
        return by_config[config]

    def call(self, graph: Graph, config: CacheConfig, args: Sequence[Any]) -> Any:
        """Runs a graph that is a part of a forward, as the forward's other graphs ask for it."""
        around = surroundings()
        forward = around.forward
        if forward is None:
            return graph.compute(*args)
        if forward.run is None:
            forward.run = self.of(forward.root, config).begin(forward)
        forward.see_schedule(graph.facts.roles, args)
        return forward.run.call(forward, graph, family_of(around.innermost, graph.facts), args)


class Relay:
    """What is known of one compiled model that is captured in several graphs.

    Attributes:
        plans: spans over several graphs.
        enabled: programs of the graphs that hold a stack worth caching by themselves.
        refusal: why nothing is cached; None while that is not known.
        misfits: forwards since one ran as planned.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.plans: tuple[RelayPlan, ...] = ()
        self.enabled: frozenset[str] = frozenset()
        self.refusal: Refusal | None = None
        self.misfits = 0
        self.store: Store | None = None
        self._watched: tuple[Forward, WatchRun] | None = None
        self._history: deque[Inputs] = deque(maxlen=HISTORY)
        self._moves: Moves | None = None

    def begin(self, forward: Forward) -> Run:
        """What drives a forward that begins."""
        self._see_moves(forward)
        self._learn()
        if self.enabled or self.refusal is not None:
            return PlainRun(self)
        if self.plans and self.misfits < MAX_MISFITS:
            self.misfits += 1
            return RelayRun(self)
        self.misfits = 0
        run = WatchRun()
        self._watched = forward, run
        return run

    def _see_moves(self, forward: Forward) -> None:
        """Compares what was given with the forwards before, until it is clear what changes from step to step."""
        if self._moves is None:
            given = Inputs(forward.inputs)
            found = {moves for before in self._history if (moves := given.moves_since(before)) is not None}
            self._moves = found.pop() if len(found) == 1 else None
            self._history.append(given)
        if self._moves is not None:
            forward.moves = self._moves

    def read(self) -> Forward | None:
        """Plans what is cached where, by the forward that was watched; None if none was."""
        if self._watched is None:
            return None
        forward = self._watched[0]
        if self._moves is not None:
            forward.moves = self._moves
        plans, refusal = plan_relays(forward.calls, self.config)
        total = sum(c.facts.work for c in forward.calls)
        own = {c.facts.program: w for c in forward.calls if (w := c.facts.span_work) >= MIN_SHARE * total > 0}
        most = max(own.values(), default=0)
        if own and most >= max(((p.share or 0.0) * total for p in plans), default=0.0):
            self.plans = ()
            self.enabled = frozenset(p for p, work in own.items() if work >= MIN_OTHER_WORK * most)
        else:
            self.plans, self.refusal = plans, refusal
        return forward

    def _learn(self) -> None:
        """What is cached where from the next forward on; the one that was watched was the first step."""
        forward = self.read()
        if forward is None or self._watched is None:
            return
        run, self._watched = self._watched[1], None
        for program, (store, branch) in forward.branches.items():
            if program not in self.enabled:
                store.forget(branch)
        if self.plans:
            self.store = self.store or store_of(forward.weight, self.config)
            branch = self.open(forward)
            for slot, plan in zip(branch.slots, self.plans, strict=True):
                verdict = decide(self.store.config, slot.counters, branch.record.step, filled=False)
                slot.tensors, slot.script = run.kept(forward, plan)
                slot.control, slot.open = Control.of([]), False
                slot.counters.record(branch.record.step, verdict.reason or "nothing cached")
        elif self.refusal is not None:
            warnings.warn(f"dit_cache runs this model uncached. {self.refusal}", CacheWarning, stacklevel=2)

    def open(self, forward: Forward) -> Branch:
        """The branch that a forward belongs to; counts the step."""
        assert self.store is not None
        latents = {latent for p in self.plans if (latent := p.latent) is not None}
        given = forward.given(latents, len(self.plans))
        branch = self.store.begin(self.program, len(self.plans), given)
        if any(slot.open for slot in branch.slots):  # its last forward was broken off
            self.store.discard(branch)
            branch = self.store.begin(self.program, len(self.plans), given)
        for slot in branch.slots:
            slot.open = True
        return branch

    @property
    def program(self) -> Hashable:
        return "relay", self.plans


class Inputs:
    """Who the inputs of one forward were."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        known = [v if comparable(v) else None for v in inputs]
        self._keys = [identity_key([v]) for v in known]
        tensors = {i: v for i, v in enumerate(known) if isinstance(v, torch.Tensor)}
        self._large = {i for i, v in tensors.items() if v.numel() > SMALL and v.is_floating_point()}
        self._small = {i for i, v in tensors.items() if v.numel() <= SMALL}
        self._small |= {i for i, v in enumerate(known) if isinstance(v, int | float) and not isinstance(v, bool)}
        self._hold = StorageHold(known)

    def moves_since(self, other: Inputs) -> Moves | None:
        """What differs, if it looks like two steps of a request: one large tensor, and something small (a timestep)."""
        if len(self._keys) != len(other._keys):
            return None
        different = [i for i, (a, b) in enumerate(zip(self._keys, other._keys, strict=True)) if a != b]
        large = [i for i in different if i in self._large]
        small = [i for i in different if i in self._small]
        if len(large) != 1 or not small or len(different) > 1 + len(small):
            return None
        return Moves(frozenset(large), frozenset(small))


class PlainRun:
    """Graphs run by themselves: those that hold a stack worth caching cache it, the others compute."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        del family
        enabled = graph.facts.program in self._relay.enabled
        outputs = graph.step(forward, args) if enabled else graph.compute(*args)
        forward.note(graph.facts, args, outputs)
        return outputs


@dataclass(frozen=True)
class Entry:
    """What one call in a span gives back: of each output the number of a stored tensor or of a stream, or itself."""

    family: Hashable
    outputs: tuple[tuple[str, Any], ...]


class Script:
    """The calls of a span, as they were when it was computed, and the tensors that they made."""

    def __init__(self, streams: int) -> None:
        self.entries: list[Entry] = []
        self.residuals: list[torch.Tensor | None] = [None] * streams
        self.values: list[torch.Tensor] = []

    def add(
        self, family: Hashable, outputs: Sequence[Any], ends: dict[int, int], starts: Sequence[torch.Tensor]
    ) -> None:
        """Keeps what a call made.

        Args:
            family: the code that was called.
            outputs: what it made.
            ends: for tensors among them that end a stream, its number.
            starts: what each stream began with.
        """
        kept: list[tuple[str, Any]] = []
        number = -1
        for output in outputs:
            if not isinstance(output, torch.Tensor):
                kept.append(("constant", output))
                continue
            number += 1
            stream = ends.get(number)
            if stream is not None:
                kept.append(("stream", stream))
                self.residuals[stream] = output - starts[stream]
            else:
                kept.append(("value", len(self.values)))
                self.values.append(output.clone())
        self.entries.append(Entry(family, tuple(kept)))

    def tensors(self, probe: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Everything that is stored: the probe, the residuals, the values."""
        residuals = [r for r in self.residuals if r is not None]
        assert len(residuals) == len(self.residuals)
        return (probe, *residuals, *self.values)


def _ends(plan: RelayPlan, family: Hashable) -> dict[int, int]:
    """Which tensors that a family gives back end which streams, in the last block of a span."""
    return {s.output: k for k, s in enumerate(plan.streams) if s.maker == family}


class WatchRun:
    """The first forward: computes, and remembers everything that a span may turn out to need."""

    def __init__(self) -> None:
        self._outputs: list[tuple[Any, ...]] = []
        self._began: list[dict[str, torch.Tensor]] = []

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        facts = graph.facts
        began = {
            name: a.clone()
            for i, (name, a) in enumerate(zip(facts.names, args, strict=True))
            if isinstance(a, torch.Tensor) and i not in facts.roles.weights and self._is_new(forward, a)
        }
        outputs = graph.step(forward, args)
        forward.trace(family, facts, args, outputs)
        forward.note(facts, args, outputs)
        self._began.append(began)
        self._outputs.append(tuple(o.clone() if isinstance(o, torch.Tensor) else o for o in outputs))
        return outputs

    def _is_new(self, forward: Forward, value: torch.Tensor) -> bool:
        """Whether a tensor is none of the outputs kept; in inference mode writes to those cannot be seen."""
        return value.is_inference() or forward.made_by(value) is None

    def kept(self, forward: Forward, plan: RelayPlan) -> tuple[tuple[torch.Tensor, ...], Script]:
        """What the span of a plan would have stored in this forward."""
        calls = forward.calls
        begins = [i for i, c in enumerate(calls) if c.family == plan.family][plan.before :]
        fn, end = plan.ranges[1]

        def value(block: int, name: str) -> torch.Tensor:
            made = calls[begins[block]].inputs[name].made_by
            began = self._began[begins[block]].get(name)
            found = began if began is not None or made is None else self._outputs[made[0]][made[1]]
            assert isinstance(found, torch.Tensor)
            return found

        main = plan.streams[0].name
        starts = [value(fn, s.name) for s in plan.streams]
        script = Script(len(plan.streams))
        ended: set[int] = set()
        i = begins[fn]
        while len(ended) < len(plan.streams):
            last = i >= begins[end - 1]
            ends = _ends(plan, calls[i].family) if last else {}
            script.add(calls[i].family, self._outputs[i], ends, starts)
            ended |= set(ends.values())
            i += 1
        return script.tensors(starts[0] - value(0, main)), script


class RelayRun:
    """A forward with spans over several graphs."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._legs = [Leg(plan, k) for k, plan in enumerate(relay.plans)]
        self._branch: Branch | None = None

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        leg = self._legs[0] if self._legs else None
        if leg is None:
            return graph.compute(*args)
        if leg.begins(graph, family, args):
            if self._branch is None:
                self._branch = self._relay.open(forward)
            assert self._relay.store is not None
            leg.decide(self._relay.store, self._branch, self._relay.program, graph, args)
        outputs = leg.call(graph, family, args)
        if leg.over:
            self._legs.pop(0)
            if not self._legs:
                self._relay.misfits = 0
        forward.note(graph.facts, args, outputs)
        return outputs


class Leg:
    """One span over several graphs, in one forward."""

    def __init__(self, plan: RelayPlan, number: int) -> None:
        self._plan = plan
        self._number = number
        self._seen = 0
        self._head: torch.Tensor | None = None
        self._starts: list[torch.Tensor] = []
        self._probe: torch.Tensor | None = None
        self._gate: SpanGate | None = None
        self._branch: Branch | None = None
        self._script: Script | None = None
        self._at = 0
        self._ended: set[int] = set()
        self._hit = False

    @property
    def _block(self) -> int:
        """Number of the present block, from 1; below that before the first one."""
        return self._seen - self._plan.before

    @property
    def over(self) -> bool:
        return len(self._ended) == len(self._plan.streams)

    def begins(self, graph: Graph, family: Hashable, args: Sequence[Any]) -> bool:
        """Takes notice of a call, and says whether the span begins with it."""
        if family != self._plan.family:
            return False
        self._seen += 1
        if self._block == 1:
            self._head = self._stream(graph, args, 0).clone()
        return self._block == self._plan.ranges[1][0] + 1

    def _stream(self, graph: Graph, args: Sequence[Any], k: int) -> torch.Tensor:
        value = args[graph.facts.names.index(self._plan.streams[k].name)]
        assert isinstance(value, torch.Tensor)
        return value

    def decide(self, store: Store, branch: Branch, program: Hashable, graph: Graph, args: Sequence[Any]) -> None:
        """The one decision for all graphs of the span."""
        assert self._head is not None
        self._branch = branch
        # Copies: the graphs of the blocks, or code between them, may write to them.
        self._starts = [self._stream(graph, args, k).clone() for k in range(len(self._plan.streams))]
        self._probe = self._starts[0] - self._head
        slot = branch.slots[self._number]
        self._gate = SpanGate(store, branch, program, self._number, Control.of([]))
        probe = self._probe

        def measure() -> torch.Tensor:
            assert slot.tensors is not None
            return residual_diff(slot.tensors[0], probe)

        self._hit = self._gate(measure)
        self._script = slot.script if self._hit else Script(len(self._plan.streams))

    def call(self, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        """Runs a graph, or gives back what it made when the span was computed."""
        if self._script is None or self.over:
            return graph.compute(*args)
        assert self._branch is not None and self._gate is not None and self._probe is not None
        ends = _ends(self._plan, family) if self._block == self._plan.ranges[1][1] else {}
        if self._hit:
            outputs = self._again(family)
        else:
            outputs = graph.compute(*args)
            made = [o for o in outputs if isinstance(o, torch.Tensor)]
            ends = {i: k for i, k in ends.items() if i < len(made) and made[i].shape == self._starts[k].shape}
            self._script.add(family, outputs, ends, self._starts)
        self._ended |= set(ends.values())
        if self.over:
            slot = self._branch.slots[self._number]
            if not self._hit:
                slot.tensors, slot.script = self._script.tensors(self._probe), self._script
                slot.control = self._gate.control
            slot.counters.record(self._branch.record.step, self._gate.reason)
            slot.open = False
        return outputs

    def _again(self, family: Hashable) -> tuple[Any, ...]:
        assert self._script is not None
        entry = self._script.entries[self._at] if self._at < len(self._script.entries) else None
        if entry is None or entry.family != family:
            raise FxCacheError(
                f"stack {self._plan.name}: got a call of another graph in a step that reuses it; expected the calls of "
                "the step that computed it, since code between the graphs sees the same values; what it does must "
                "depend on nothing else: compile this model with residual_diff_threshold=0 or mend the graph breaks."
            )
        self._at += 1
        outputs: list[Any] = []
        for kind, what in entry.outputs:
            if kind == "stream":
                residual = self._script.residuals[what]
                assert residual is not None
                outputs.append(self._starts[what] + residual)
            else:
                outputs.append(self._script.values[what].clone() if kind == "value" else what)
        return tuple(outputs)


def residual_diff(previous: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    """``mean|previous - probe| / mean|previous|`` of two tensors of one shape; 0-d."""
    return (previous - probe).abs().mean() / previous.abs().mean()


class ObservedForward:
    """A compiled graph that caches nothing by itself."""

    def __init__(self, compiled: Callable[..., Any], facts: GraphFacts, config: CacheConfig, relays: Relays) -> None:
        """
        Args:
            compiled: the graph.
            facts: what is known of it as a part of a forward.
            config: the configuration that it was compiled with.
            relays: where to look up the forward's other graphs.
        """
        self._compiled = compiled
        self._config = config
        self._relays = relays
        self.facts = facts

    def __call__(self, *args: Any) -> Any:
        return self._relays.call(self, self._config, args)

    def step(self, forward: Forward, args: Sequence[Any]) -> Any:
        del forward
        return self._compiled(*args)

    def compute(self, *args: Any) -> Any:
        return self._compiled(*args)
