"""Drives a model that was captured in several graphs, and reuses spans whose blocks lie in graphs of their own.

The first forward of a model is watched; from the order of its calls its stacks are known (`patterns/relays.py`). From
then on one decision is made where a span begins. On a miss every graph in the span computes, and what it makes is
kept; on a hit every graph gives back what it made then, and those that end the streams give what the span began with
plus what the blocks added. What is made of no stream is made anew (`patterns/beside.py`). Code between the graphs runs
either way; where it takes another way than then, the forward is begun anew.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch._dynamo import config as dynamo_config
from torch.utils.weak import WeakTensorKeyDictionary

from fx_cache.config import CacheConfig
from fx_cache.errors import CacheWarning, Failure, Refusal, guarded
from fx_cache.patterns.calls import UNKNOWN, GraphFacts
from fx_cache.patterns.relays import RelayPlan, plan_relays
from fx_cache.patterns.spans import MIN_SHARE, least_gain
from fx_cache.runtime.device import captured
from fx_cache.runtime.follow import Look
from fx_cache.runtime.forwards import Forward, family_of, surroundings, weakly
from fx_cache.runtime.habits import Habits
from fx_cache.runtime.legs import WRITES, Graph, Leg, Misfit, WatchRun
from fx_cache.runtime.named import NamedSession, named_session, within
from fx_cache.runtime.net import Astray
from fx_cache.runtime.policy import decide
from fx_cache.runtime.registry import store_of
from fx_cache.runtime.sessions import Store
from fx_cache.runtime.slots import Branch
from fx_cache.runtime.weights import CHANGED, weights_of

T = TypeVar("T")

MAX_MISFITS = 2
"""Forwards in a row that may run otherwise than planned before the model is watched again."""

MAX_WATCHES = 4
"""Forwards that are watched without one that then runs as planned, before the model is left alone."""

MAX_LAYOUTS = 32
"""Ways of giving a model its inputs that are known at a time."""

ENOUGH_WATCHES = 2
"""Forwards that show nothing to cache, for there to be nothing."""

MAX_UNPLANNED = 1024
"""Requests and passes of which it is known at a time whether they had steps that ran otherwise than planned."""

MAX_STRAYS = 3
"""Forwards that may have to be begun anew, beyond as many that reused something, before the model is left alone."""

NOT_SETTLED = "whether forwards go as planned is not known yet"
STRAYED = "the forward went another way than the step that it was to reuse"
FAILED = "an error of dit_cache"
WAYWARD = "the forward went another way than planned"


class Run(Protocol):
    """What drives the calls of one forward."""

    @property
    def reusing(self) -> bool:
        """Whether calls were skipped in a span that has not ended."""

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any: ...

    def end(self, returned: Sequence[Any]) -> bool:
        """The forward is over, and returns this (`contents`); returns whether that counts."""

    def again(self) -> Run:
        """What drives it if it is begun anew."""


CAPTURED = (
    "dit_cache: got a forward in several graphs while a CUDA graph is captured; expected one graph; it computes; "
    "remove the graph breaks: torch.compile(..., fullgraph=True) says where they are."
)


class Relays:
    """The relays of all compiled models: one for each compilation."""

    def __init__(self) -> None:
        self._last: weakref.ref[Relay] | None = None
        self._found: WeakKeyDictionary[Any, Relay] = WeakKeyDictionary()
        self._lock = threading.RLock()

    def of(self, compilation: Any, config: CacheConfig) -> Relay:
        with self._lock:
            found = self._found.setdefault(compilation, Relay(config))
        self._last = weakref.ref(found)
        return found

    def end(self, name: str) -> None:
        """A session is over."""
        self._let_go(lambda _, named: named is not None and named.name == name)

    def reset(self, model: torch.nn.Module | None) -> None:
        """Nothing that a model, or any, has computed is to be reused."""
        held = {*map(id, weights_of(model))}
        self._let_go(lambda forward, _: model is None or forward.root is model or id(forward.weight) in held)

    def _let_go(self, of: Callable[[Forward, NamedSession | None], bool]) -> None:
        with self._lock:
            found = list(self._found.values())
        for relay in found:
            relay.let_go(of)

    @property
    def last(self) -> Relay | None:
        """The one that was asked for last, while its compilation lives."""
        return None if self._last is None else self._last()

    def call(self, graph: Graph, config: CacheConfig, args: Sequence[Any]) -> Any:
        """Runs a graph that is a part of a forward, as the forward's other graphs ask for it."""
        around, forward = surroundings(), None
        with guarded("begin") as guard:
            forward = None if captured() else around.forward
            if forward is not None:
                forward.run = forward.run or self.of(forward.compilation, config).begin(forward)
                forward.see_schedule(graph.facts, args)
        if guard.failure is not None and forward is not None:
            if forward.reusing:
                raise Astray
            self.of(forward.compilation, config).leave(forward, guard.failure)
        if forward is None:
            if captured():
                warnings.warn(CAPTURED, CacheWarning, stacklevel=2)
            return graph.compute(*args)
        return forward.run.call(forward, graph, family_of(around.innermost, graph.facts), args)


RELAYS = Relays()
"""Those of all that the backend has compiled."""


class Unplanned:
    """Forwards of a model that ran otherwise than planned, by what they may have been steps of.

    That is found out too late, or never. What was cached before one is not the last computed step's behind it.
    """

    def __init__(self) -> None:
        self._count: Counter[Hashable] = Counter()
        self._forgotten = 0
        self._lock = threading.Lock()

    def add(self, forward: Forward) -> None:
        with self._lock:
            if len(self._count) >= MAX_UNPLANNED:
                self._count.clear()
                self._forgotten += 1
            self._count[forward.step_of] += 1

    def before(self, forward: Forward) -> Hashable:
        """Another one than before if there was one that may be of the same request and pass."""
        with self._lock:
            return self._forgotten, self._count[forward.step_of]


class Relay:
    """What is known of one compiled model that is captured in several graphs.

    Attributes:
        plans: spans over several graphs.
        enabled: wirings of the graphs that hold a stack worth caching by themselves.
        refusal: why nothing is cached; None while that is not known.
        misfits: forwards since one ran as planned.
        unplanned: forwards that ran otherwise than planned.
        settled: whether the last of those that did ran no graph for the first time: the next one may reuse.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.plans: tuple[RelayPlan, ...] = ()
        self.enabled: frozenset[str] = frozenset()
        self.refusal: Refusal | None = None
        self.misfits = 0
        self.unplanned = Unplanned()
        self.settled = False
        self.store: Store | None = None
        self.lock = threading.RLock()
        self._anchor: Callable[[], torch.Tensor | None] = weakly(None)
        self._watched: tuple[Forward, WatchRun, NamedSession | None] | None = None
        self._counts = True
        self._seen: frozenset[str] = frozenset()
        self._layers: frozenset[Hashable] = frozenset()
        self._least = 0.0
        self._habits: OrderedDict[Hashable, Habits] = OrderedDict()
        self._ran: WeakSet[Graph] = WeakSet()
        self._written = WeakTensorKeyDictionary()
        self._layout: Hashable = None
        self._others: frozenset[int] = frozenset()
        self._watches = 0
        self._strays = 0

    def begin(self, forward: Forward) -> Run:
        """What drives a forward that begins."""
        with self.lock:
            return self._begin(forward)

    def _begin(self, forward: Forward) -> Run:
        forward.know(self._habits.setdefault(forward.layout, Habits()), self._written)
        self._habits.move_to_end(forward.layout)
        if len(self._habits) > MAX_LAYOUTS:
            self._habits.popitem(last=False)
        forward.learn()
        if self._watched is not None and not self._watched[0].over:  # in another thread
            self.unplanned.add(forward)
            return ComputingRun()
        self._learn()
        if self.enabled or self.refusal is not None:
            return PlainRun(self)
        if self.plans and self.misfits < MAX_MISFITS and not self._unfit(forward):
            self.misfits += 1
            return RelayRun(self, forward)
        self.misfits, self.settled = 0, False
        self.unplanned.add(forward)
        self._watches += 1
        run = WatchRun()
        forward.when_over(run.forget)
        self._watched, self._counts = (forward, run, named_session()), True
        return run

    def leave(self, forward: Forward, failure: Failure) -> None:
        """Behind an error of ours the model is left alone."""
        forward.run = ComputingRun()
        with self.lock:
            self.plans, self.enabled, self.refusal = (), frozenset(), failure

    def let_go(self, of: Callable[[Forward, NamedSession | None], bool]) -> None:
        """What was watched does not count as a step, if it is one `of` those; nothing of it is held any longer."""
        with self.lock:
            if self._watched is None or not of(self._watched[0], self._watched[2]):
                return
            self._counts = False
            if self._watched[0].returned:
                with guarded("learn"):
                    self._learn()

    def _unfit(self, forward: Forward) -> bool:
        """Whether a main stream is not known to show what is denoised, and more is known than when it was found."""
        if forward.layout != self._layout:  # there the inputs have other numbers
            return False
        others = forward.not_denoised
        known = all(plan.streams[0].shown - others - {UNKNOWN} for plan in self.plans)
        return not known and others != self._others

    def read(self) -> Forward | None:
        """Plans what is cached where, by the forward that was watched; None if none was."""
        if self._watched is None:
            return None
        forward = self._watched[0]
        if self._watched[1].failure is not None:
            self.plans, self.refusal = (), self._watched[1].failure
            return forward
        forward.may_come_back()
        plans, refusal = plan_relays(forward.traced, self.config, forward.not_denoised)
        total = sum(c.facts.work for c in forward.calls)
        own = {c.facts.program.wiring: w for c in forward.calls if (w := c.facts.span_work) >= MIN_SHARE * total > 0}
        most = max(own.values(), default=0)
        if own and most >= max(((p.share or 0.0) * total for p in plans), default=0.0):
            self.plans = ()
            self._seen = frozenset(c.facts.program.wiring for c in forward.calls)
            kept: dict[str, int] = {}
            for program, work in sorted(own.items(), key=lambda p: -p[1]):
                if work >= least_gain(total, list(kept.values())):
                    kept[program] = work
            self._least = max(MIN_SHARE * total, least_gain(total, list(kept.values())))
            self.enabled = frozenset(kept)
            self._layers = frozenset(c.facts.layers for c in forward.calls if c.facts.program.wiring in self.enabled)
        else:
            self.plans, self.refusal = plans, refusal
            self._layout, self._others = forward.layout, forward.not_denoised
        return forward

    def caches(self, facts: GraphFacts) -> bool:
        """Whether a graph caches by itself.

        At another pass of a request, or another size, there may be other graphs than the forward had that was watched:
        such a one does if it is made of the same layers, or if it is as much work as those that do.
        """
        if not self.enabled or facts.program.wiring in self._seen:
            return facts.program.wiring in self.enabled
        return facts.span_work > 0 and (facts.layers in self._layers or facts.span_work >= self._least)

    def _learn(self) -> None:
        """What is cached where from the next forward on; the one that was watched counts as a step."""
        forward = self.read()
        if forward is None or self._watched is None:
            return
        (*_, named), self._watched = self._watched, None
        for program, (store, branch) in forward.branches.items():
            if program.wiring not in self.enabled:
                store.forget(branch)
        if self.enabled:
            return
        if self.plans and self._watches > MAX_WATCHES:
            self.refusal = self._unsteady()
        if self.refusal is not None:
            self.plans = ()
            if self._watches < ENOUGH_WATCHES:
                self.refusal = None  # the first forward compiles, and may run otherwise than those behind it
            else:
                self._say()
        if self.plans and self._counts and not forward.written:
            # In the session that it ran in, whichever is open now. Nothing is kept of it: much may have happened since.
            with within(named):
                _, branch = self.open(forward, self.plans)
            for slot in branch.slots:
                verdict = decide(branch.config, slot.counters, branch.record.step, filled=False)
                slot.open = False
                slot.counters.record(branch.record.step, verdict.reason or "nothing cached")

    def _say(self) -> None:
        warnings.warn(f"dit_cache runs this model uncached. {self.refusal}", CacheWarning, stacklevel=2)

    def _unsteady(self) -> Refusal:
        limit = dynamo_config.recompile_limit
        return Refusal(
            "the forward, captured in several graphs",
            "calls of other graphs, or of the same ones with other values between them, from forward to forward",
            "the same ones",
            f"raise torch._dynamo.config.recompile_limit (now {limit}), which many small graphs run into (offloading "
            "by leaf makes them), or look for code in or between the blocks that goes another way at every step",
        )

    def ran(self, graph: Graph, args: Sequence[Any]) -> bool:
        """Takes notice of a graph that runs, and what it writes to; whether it has run before."""
        for i in graph.facts.written:
            self._written[args[i]] = None
        known = graph in self._ran
        self._ran.add(graph)
        return known

    def went_as_planned(self, reused: bool, settled: bool) -> None:
        """A forward is over.

        Args:
            reused: whether it reused anything.
            settled: whether it reused something, or ran no graph for the first time.
        """
        with self.lock:
            self.misfits, self.settled = 0, settled
            self._watches = 0 if settled else self._watches
            self._strays = max(0, self._strays - reused)

    def strayed(self) -> None:
        """A forward that reused something has to be begun anew."""
        with self.lock:
            self.settled = False
            self._strays += 1
            if self._strays < MAX_STRAYS:
                return
            self.refusal = self._unsteady()
        self._say()

    def found_by(self, weights: Sequence[torch.Tensor], forward: Forward) -> None:
        """Has its store found by some weights too: where no module was compiled, nothing else says whose it is."""
        for weight in weights:
            store_of(weight, self.config, forward.root, forward.compilation, self.store)

    def _store(self, forward: Forward, weights: Sequence[torch.Tensor]) -> Store:
        """Where its branches are kept, found by a weight that the model holds now."""
        before, anchor = self.store, self._anchor()
        if before is not None and (any(w is anchor for w in weights) if weights else anchor is not None):
            return before
        found = next((w for w in weights if w is forward.weight), next(iter(weights), forward.weight))
        self._anchor = weakly(found)
        return store_of(found, self.config, forward.root, forward.compilation, before)

    def open(self, forward: Forward, plans: tuple[RelayPlan, ...]) -> tuple[Store, Branch]:
        """The branch that a forward belongs to, under some plans, and where it is kept; counts the step."""
        with self.lock:
            branch = self._open(forward, plans)
            assert self.store is not None
            return self.store, branch

    def _open(self, forward: Forward, plans: tuple[RelayPlan, ...]) -> Branch:
        given, program = forward.given(), ("relay", plans)
        weights = forward.weights()
        self.store = self._store(forward, weights)
        lost = CHANGED if self.store.changed(program, weights, []) else None
        branch = self.store.begin(program, len(plans), given, lost)
        if any(slot.open for slot in branch.slots):  # its last forward was broken off
            self.store.failed(branch)
            branch = self.store.begin(program, len(plans), given)
        for slot in branch.slots:
            slot.open = True
        branch.busy = False  # its forward is many calls: what marks one that is broken off is `open`
        return branch


class ComputingRun:
    """A forward that caches nothing."""

    reusing = False

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        del forward, family
        return graph.compute(*args)

    def end(self, returned: Sequence[Any]) -> bool:
        del returned
        return True

    def again(self) -> Run:
        return self


class PlainRun(ComputingRun):
    """Graphs run by themselves: those that hold a stack worth caching cache it, the others compute."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        caches = self._relay.caches(graph.facts)
        with guarded("front") as before:
            self._relay.ran(graph, args)
            forward.front.add(forward, graph.facts, family, args)
        step = caches and before.failure is None
        outputs = graph.step(forward, args) if step else graph.compute(*args)
        with guarded("note") as behind:
            forward.note(graph.facts, args, outputs)
        failure = before.failure or behind.failure
        if failure is not None:
            self._relay.leave(forward, failure)
        return outputs


class RelayRun:
    """A forward with spans over several graphs."""

    def __init__(self, relay: Relay, forward: Forward) -> None:
        self._relay = relay
        self._forward = forward
        self._plans = relay.plans
        self._legs = [Leg(plan, k) for k, plan in enumerate(relay.plans)]
        self._store: Store | None = None
        self._branch: Branch | None = None
        self._look: Look | None = None
        self._lost = None if relay.settled and forward.caught else NOT_SETTLED
        self._calls: Counter[Hashable] = Counter()
        self._anchors: list[torch.Tensor] = []
        self._settled = True
        self._reused = False
        self._failed = False

    @property
    def reusing(self) -> bool:
        """Whether calls were skipped in a span that has not ended."""
        return any(leg.reusing for leg in self._legs)

    def call(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Any:
        outputs = self._ours(lambda: self._skip(forward, graph, family, args))
        if outputs is None:
            outputs = graph.compute(*args)
        self._ours(lambda: self._take(forward, graph, family, args, outputs))
        return outputs

    def _ours(self, what: Callable[[], T]) -> T | None:
        """Does what is not the model's. Behind an error of ours, or where it goes another way, the forward computes."""
        if self._failed:
            return None
        try:
            with guarded("relay") as guard:
                return what()
        except Misfit:  # it computes on, and none of its calls is counted any more
            if self.reusing:
                raise Astray from None
            self._give_up(WAYWARD)
        if guard.failure is not None:
            self._failed, self._relay.refusal = True, guard.failure
            if self.reusing:
                raise Astray
            self._give_up(FAILED)
        return None

    def _skip(self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any]) -> Sequence[Any] | None:
        """What a call made at another step, if it is skipped."""
        relay = self._relay
        self._settled = relay.ran(graph, args) and self._settled
        if any(not forward.made(args[i]) for i in graph.facts.written):
            self._lost = self._lost or WRITES
        if not isinstance(forward.root, torch.nn.Module):
            weights = [a for i in graph.facts.roles.weights if isinstance(a := args[i], torch.nn.Parameter)]
            self._anchors += weights[:1]
        if not self._legs:
            return None
        leg, number = self._legs[0], self._calls[family] + 1
        if leg.begins(graph, family, args, number):
            held: Sequence[torch.Tensor] = forward.weights() if self._branch is not None else ()
            if self._branch is None or self._store is None:  # which looks at the weights
                self._store, self._branch = relay.open(forward, self._plans)
                self._look = self._branch.look
            if forward.writes:
                self._lost = self._lost or WRITES
            leg.decide(
                self._store,
                self._branch,
                forward,
                graph,
                family,
                args,
                forward.front.so_far(forward.time, held),
                self._lost,
                relay.unplanned.before(forward),
            )
        outputs = leg.skip(forward, graph, family, args, number)
        if leg.passed is not None:
            forward.front.passed(family, leg.passed, reused=leg.hit)
        else:
            forward.front.add(forward, graph.facts, family, args)
        return outputs

    def _take(
        self, forward: Forward, graph: Graph, family: Hashable, args: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """Takes notice of what came of a call."""
        if self._legs:
            leg = self._legs[0]
            leg.take(forward, graph, family, args, outputs, self._calls[family] + 1)
            if leg.over:
                self._reused = self._reused or leg.hit
                self._legs.pop(0)
                self._relay.found_by(self._anchors, forward)
                if not self._legs:
                    assert self._store is not None and self._branch is not None
                    self._store.release(self._branch)
        self._calls[family] += 1
        forward.note(graph.facts, args, outputs)

    def end(self, returned: Sequence[Any]) -> bool:
        if self.reusing:
            return False
        if self._look is not None:
            self._look.came_out(returned)
        if self._legs:
            self._give_up(WAYWARD)
        elif self._branch is not None:
            self._relay.went_as_planned(self._reused, self._settled or self._reused)
        return True

    def again(self) -> Run:
        self._give_up(STRAYED)
        self._relay.strayed()
        return ComputingRun()

    def _give_up(self, why: str) -> None:
        """Computes from here on, and keeps nothing of spans that are not over."""
        self._legs = []
        branch, self._branch = self._branch, None
        if branch is None:
            self._relay.unplanned.add(self._forward)
            return
        store, step = self._store, branch.record.step
        assert store is not None
        with guarded("give_up") as guard:
            for slot in branch.slots:
                if slot.open or why == STRAYED:
                    slot.forget(why)
                    slot.counters.computed_after_all(step, why)
            store.release(branch)
        if guard.failure is not None:
            self._failed, self._relay.refusal = True, guard.failure


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
